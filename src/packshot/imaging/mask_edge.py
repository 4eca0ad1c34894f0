"""The edge of a mask at the photograph's own size."""

from __future__ import annotations

import cv2
import numpy as np

from packshot.imaging.framing import scaled_size
from packshot.imaging.pixels import to_unit

_SQUARE = np.ones((3, 3), np.uint8)
REFINE_SIDE = 1024  # px, longer side at which the edge filter is fitted


def shrink(array: np.ndarray, side: int) -> np.ndarray:
    """The picture with its longer side at most ``side`` px."""
    scale = min(1.0, side / max(array.shape[:2]))
    height, width = scaled_size((array.shape[0], array.shape[1]), scale)
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA)


def widened(mask_HW: np.ndarray, steps: int = 1) -> np.ndarray:
    """A bool mask and its neighbours within ``steps`` px."""
    return cv2.dilate(mask_HW.astype(np.uint8), _SQUARE, iterations=steps) > 0


def narrowed(mask_HW: np.ndarray, steps: int = 1) -> np.ndarray:
    """A bool mask without its outermost ``steps`` px."""
    return cv2.erode(mask_HW.astype(np.uint8), _SQUARE, iterations=steps) > 0


def stretched(alpha_HW: np.ndarray, black: float, white: float) -> np.ndarray:
    """Alpha with ``black`` and below at 0, ``white`` and above at 1, and a straight line between."""
    return np.clip((alpha_HW - black) / (white - black), 0, 1)


def refine(rgb_HWC: np.ndarray, mask_HW: np.ndarray, radius: int = 3, eps: float = 1e-4) -> np.ndarray:
    """Alpha at full size from a small hard mask.

    Colour guided filter (He, Sun, Tang, ECCV 2010), fitted at REFINE_SIDE and applied at full size (He, Sun, "Fast
    Guided Filter", 2015). Only a band around the mask's outline is taken from it; the rest stays 0 or 1.
    """
    height, width = rgb_HWC.shape[:2]
    guide_HWC = to_unit(shrink(rgb_HWC, REFINE_SIDE))
    size = guide_HWC.shape[1::-1]
    soft_HW = cv2.resize(mask_HW.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
    scale = size[0] / mask_HW.shape[1]
    window = max(1, round(radius * scale))
    slope_HWC, offset_HW = _guided_fit(guide_HWC, soft_HW, window, eps)
    full = (width, height)
    alpha_HW = (cv2.resize(slope_HWC, full) * to_unit(rgb_HWC)).sum(-1) + cv2.resize(offset_HW, full)
    band = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * window + 1,) * 2)
    hard = (soft_HW >= 0.5).astype(np.uint8)
    sure = (cv2.erode(hard, band), 1 - cv2.dilate(hard, band))
    inside, outside = (cv2.resize(part, full, interpolation=cv2.INTER_NEAREST) > 0 for part in sure)
    # The fit is an average over windows; stretching it back gives whole pixels next to the edge their 0 or 1.
    alpha_HW = stretched(alpha_HW, 0.1, 0.9)
    alpha_HW[inside], alpha_HW[outside] = 1.0, 0.0
    return alpha_HW.astype(np.float32)


def _guided_fit(guide_HWC: np.ndarray, target_HW: np.ndarray, radius: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope (H, W, 3) and offset (H, W) of the local linear models target ≈ slope · guide + offset."""

    def mean(array: np.ndarray) -> np.ndarray:
        return cv2.blur(array, (2 * radius + 1, 2 * radius + 1), borderType=cv2.BORDER_REFLECT)

    mean_guide, mean_target = mean(guide_HWC), mean(target_HW)
    products = np.stack([mean(guide_HWC[..., i] * guide_HWC[..., j]) for i, j in np.ndindex(3, 3)], -1)
    covariance = products.reshape(*target_HW.shape, 3, 3) - mean_guide[..., :, None] * mean_guide[..., None, :]
    cross = mean(guide_HWC * target_HW[..., None]) - mean_guide * mean_target[..., None]
    slope = np.linalg.solve(covariance + eps * np.eye(3, dtype=np.float32), cross[..., None])[..., 0]
    offset = mean_target - (slope * mean_guide).sum(-1)
    return mean(slope), mean(offset)

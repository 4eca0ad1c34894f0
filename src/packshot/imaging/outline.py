"""How far the object in a picture leaves the outline of the product that should be there."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from packshot.imaging.framing import scaled_size
from packshot.imaging.grabcut import grabcut

SEGMENT_SIDE = 512  # px, longer side at which outlines are compared
EXTENSION_TOLERANCE = 0.05  # E_obj above the noise floor by more than this counts as an extended product

Segment = Callable[[np.ndarray, np.ndarray], np.ndarray]


def segment_near(image_HW3: np.ndarray, keep_HW: np.ndarray, iterations: int = 4) -> np.ndarray:
    """GrabCut seeded by the keep mask: its inner part is surely object, what is far from it surely is not.

    The object may grow by up to a quarter of the mask's longer side; image_HW3 uint8, keep_HW bool; returns bool.
    """
    rows, columns = np.nonzero(keep_HW)
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    keep = keep_HW.astype(np.uint8)
    outside = cv2.distanceTransform(1 - keep, cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(np.pad(keep, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    labels = np.where(keep_HW, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[outside > side / 4] = cv2.GC_BGD
    labels[inside > min(max(1.0, 0.05 * side), inside.max() / 2)] = cv2.GC_FGD
    if not (labels == cv2.GC_BGD).any() and keep_HW.all():
        return keep_HW
    return grabcut(image_HW3, labels, iterations)


def touching(object_HW: np.ndarray, keep_HW: np.ndarray) -> np.ndarray:
    _, components = cv2.connectedComponents(object_HW.astype(np.uint8), connectivity=8)
    return object_HW & np.isin(components, np.unique(components[object_HW & keep_HW]))


def extension_of(object_HW: np.ndarray, keep_HW: np.ndarray) -> dict[str, float]:
    """How far the object found (m_o) leaves the keep mask (k), both bool (H, W).

    ``extension`` E_obj = |m_o \\ dilate(k, s)| / |k|; ``loss`` L_obj = |erode(k, s) \\ m_o| / |k|, with a tolerance
    s of 2 px per 1024. ``iou`` = |m_o ∩ k| / |m_o ∪ k|. ``expansion`` is the published formula, area(m_o ∪ k) -
    area(k), as a share of the picture. Only parts of m_o that touch k count, no other things.
    """
    found = touching(object_HW, keep_HW)
    tolerance = max(1, round(2 * max(keep_HW.shape) / 1024))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * tolerance + 1,) * 2)
    keep = keep_HW.astype(np.uint8)
    wide, narrow = cv2.dilate(keep, kernel) > 0, cv2.erode(keep, kernel) > 0
    area = keep_HW.sum()
    return {
        "extension": float((found & ~wide).sum() / area),
        "loss": float((narrow & ~found).sum() / area),
        "iou": float((found & keep_HW).sum() / (found | keep_HW).sum()),
        "expansion": float((found & ~keep_HW).sum() / keep_HW.size),
    }


def compare_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) at which outlines are compared: the picture's, its longer side at most SEGMENT_SIDE px."""
    scale = min(1.0, SEGMENT_SIDE / max(height, width))
    return scaled_size((width, height), scale)


def measure_extension(
    image_HW3: np.ndarray, matte_HW: np.ndarray, segment: Segment, size: tuple[int, int]
) -> dict[str, float]:
    """:func:`extension_of` the object that ``segment`` finds in a picture, both brought to ``size`` (width, height)."""
    keep = cv2.resize(matte_HW, size, interpolation=cv2.INTER_AREA) >= 128
    if not keep.any():
        return dict.fromkeys(("extension", "loss", "iou", "expansion"), math.nan)
    small = cv2.resize(image_HW3, size, interpolation=cv2.INTER_AREA)
    return extension_of(segment(small, keep), keep)


def is_extended(extension: float, floor: float) -> float:
    """1.0 when E_obj exceeds its noise floor, the same measure where the truth is 0, by more than the tolerance."""
    return float(extension > floor + EXTENSION_TOLERANCE)

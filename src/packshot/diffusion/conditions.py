"""Control maps: what a ControlNet is shown of a product. The same functions in training and at inference."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np


def inpaint(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The product's pixels, and -1 where the background is to be invented.

    image_HWC: RGB in [0, 1]; mask_HW: product's alpha in [0, 1]. Returns (H, W, 3) float32 in {-1} | [0, 1].
    """
    known = (mask_HW >= 0.5)[..., None]
    return np.where(known, image_HWC, -1.0).astype(np.float32)


def canny(image_HWC: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Edges of the product and its outline, nothing of the old background.

    Arguments as :func:`inpaint`. Returns (H, W, 3) float32 in {0, 1}.
    """
    product = np.where((mask_HW >= 0.5)[..., None], image_HWC, 0.5)
    inner = cv2.Canny((product * 255).astype(np.uint8), 100, 200)
    outline = cv2.Canny(((mask_HW >= 0.5) * 255).astype(np.uint8), 100, 200)
    edges = np.maximum(inner, outline).astype(np.float32) / 255
    return np.repeat(edges[..., None], 3, axis=2)


CONDITIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"inpaint": inpaint, "canny": canny}

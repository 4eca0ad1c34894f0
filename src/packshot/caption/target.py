"""Marking the product in a picture, so that the captioner knows what to leave out.

This marks the picture itself, for any model. A region in words (``captioner.product=box``) works for Florence-2 only,
and ``florence2.py`` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import ProductTarget

GREY = np.array((127, 127, 127), np.uint8)
RED = np.array((255, 0, 0), np.uint8)


def outline(pixels: np.ndarray, product: np.ndarray) -> np.ndarray:
    """A red line around the product, a hundredth of the longer side wide, outside of it where there is room."""
    reach = max(1, round(max(product.shape) / 100))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    ring = cv2.dilate(product.astype(np.uint8), kernel).astype(bool) & ~product
    return np.where(ring[..., None], RED, pixels)


def cover(pixels: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Plain grey in place of the product."""
    return np.where(product[..., None], GREY, pixels)


MARKS: dict[ProductTarget, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ProductTarget.outline: outline,
    ProductTarget.mask: cover,
}


def mark(
    images: Sequence[Image.Image], masks: Sequence[Image.Image | None], target: ProductTarget
) -> list[Image.Image]:
    """RGB images for the captioner; an image without a mask stays as it is.

    masks: "L", white = product, of the image's own size.
    """
    marked: list[Image.Image] = []
    for image, mask in zip(images, masks, strict=True):
        if mask is None or target not in MARKS:
            marked.append(image)
            continue
        product = np.asarray(mask.convert("L")) > 127
        marked.append(Image.fromarray(MARKS[target](np.asarray(image.convert("RGB")), product)))
    return marked

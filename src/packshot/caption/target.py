"""Telling a captioner which thing in the picture is the product, so that it knows what to leave out.

A region in words (``captioner.product=box``) is Florence-2's own and stands in ``florence2.py``; here the picture
itself is marked, for any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import ProductTarget

GREY = np.array((127, 127, 127), np.uint8)
RED = np.array((255, 0, 0), np.uint8)


def _outline(pixels: np.ndarray, product: np.ndarray) -> np.ndarray:
    """A red line around the product, a hundredth of the longer side wide, outside of it where there is room."""
    reach = max(1, round(max(product.shape) / 100))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    ring = cv2.dilate(product.astype(np.uint8), kernel).astype(bool) & ~product
    return np.where(ring[..., None], RED, pixels)


def _cover(pixels: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Plain grey in place of the product."""
    return np.where(product[..., None], GREY, pixels)


MARKS: dict[ProductTarget, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    ProductTarget.outline: _outline,
    ProductTarget.mask: _cover,
}


def mark(
    images: Sequence[Image.Image], masks: Sequence[Image.Image | None], target: ProductTarget
) -> list[Image.Image]:
    """RGB images as the captioner is to see them; an image without a mask stays as it is.

    masks: "L", white = product, of the image's own size.
    """
    if target not in MARKS:
        return list(images)

    def marked(image: Image.Image, mask: Image.Image | None) -> Image.Image:
        if mask is None:
            return image
        product = np.asarray(mask.convert("L")) > 127
        return Image.fromarray(MARKS[target](np.asarray(image.convert("RGB")), product))

    return [marked(image, mask) for image, mask in zip(images, masks, strict=True)]

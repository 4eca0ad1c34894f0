"""Where a mask is in doubt: the photo with the mask's outline and the places where the ways to a mask disagree."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from packshot.generate.product import Product
from packshot.imaging.mask_edge import shrink

SIDE = 640  # px, longer side
MASK = (40, 200, 90)  # the outline of the mask that was used
OUTSIDE = (230, 60, 200)  # what another way takes for product and the mask does not
INSIDE = (250, 150, 30)  # what the mask takes for product and another way does not
LEGEND = "green: the mask's outline; pink: seen as product by another way only; orange: in the mask only"


def tinted(image_HW3: np.ndarray, area_HW: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """A picture with an area half covered by a colour."""
    mixed = image_HW3 // 2 + np.array(color, np.uint8) // 2
    return np.where(area_HW[..., None], mixed, image_HW3)


def draw_doubt(product: Product) -> Image.Image | None:
    """The picture of a doubtful mask; None where nothing speaks against it."""
    if not product.mask_reasons:
        return None
    picture_HW3 = shrink(product.rgb_HW3, SIDE)
    mask_HW = shrink(product.matte_HW, SIDE) >= 128
    size = (mask_HW.shape[1], mask_HW.shape[0])
    for way_HW in product.mask_ways.values():
        other_HW = cv2.resize(way_HW.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
        picture_HW3 = tinted(picture_HW3, other_HW & ~mask_HW, OUTSIDE)
        picture_HW3 = tinted(picture_HW3, mask_HW & ~other_HW, INSIDE)
    picture_HW3 = np.ascontiguousarray(picture_HW3)
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture_HW3, contours, -1, MASK, max(1, max(size) // 240))
    return Image.fromarray(picture_HW3)


def evidence_text(product_mask: dict[str, dict[str, object]]) -> str:
    """The signs that speak against a mask, with their numbers and limits. product_mask: a certificate's evidence."""
    parts = []
    for sign in product_mask.values():
        if not sign["passed"]:
            parts.append(f"{sign['about']}: {sign['measured']:g}, limit {sign['limit']:g}")
    return "; ".join(parts)

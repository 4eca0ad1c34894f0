"""Which images are worth training on: each check gives a reason and the value that decided."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import QualityConfig
from packshot.imaging.decode import flatten

EMPTY_STD = 2.0  # of 255: less contrast than this is sensor noise or a blank page
OVERVIEW_SIDE = 1024
SHARPNESS_SIDE = 512  # px, longer side at which sharpness is measured, so that it does not depend on resolution


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian over the variance of the grey values, at 512 px.

    Dividing by the contrast keeps white products on white from counting as blurred. In-focus photographs have about
    0.05 to 1, the same blurred with a sigma of 3 px about 0.002; rounding to 8 bits keeps it from falling much lower.
    """
    grey = image.convert("L")
    grey.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE), Image.Resampling.BOX)
    grey_HW = np.asarray(grey, np.float64)
    return float(cv2.Laplacian(grey_HW, cv2.CV_64F).var() / max(grey_HW.var(), 1e-6))


def overview(image: Image.Image) -> Image.Image:
    """RGB over white, scaled to 1024 to 2047 px on the longer side where it has more: enough for every measure."""
    flat = image if image.mode == "RGB" else flatten(image)
    factor = max(flat.size) // OVERVIEW_SIDE
    return flat.reduce(factor) if factor > 1 else flat


def check(size: tuple[int, int], flat: Image.Image, quality: QualityConfig) -> tuple[str, str] | None:
    """(reason, measure) why an image is rejected, or None. size: of the image; flat: its :func:`overview`."""
    if min(size) < quality.min_side:
        return "too_small", f"{size[0]}x{size[1]}"
    contrast = float(cv2.meanStdDev(np.asarray(flat))[1].max())  # NumPy takes eight bytes a sample for it
    if contrast < EMPTY_STD:
        return "empty", f"std {contrast:.2f}"
    sharp = sharpness(flat)
    if sharp < quality.min_sharpness:
        return "blurred", f"sharpness {sharp:.5f}"
    return None

"""From a product's matte: its soft edge, its own colours under it, and the latent cells that show nothing else."""

from __future__ import annotations

import sys

import cv2
import numpy as np

from packshot.imaging.pixels import to_bytes, to_unit
from packshot.runs.folder import log

_SQUARE = np.ones((3, 3), np.uint8)
_CROP_MARGIN = 32  # px around the product that foreground estimation sees


def covered_box(alpha_HW: np.ndarray) -> tuple[slice, slice]:
    """Index of the smallest box with all pixels that are not 0; empty without any."""
    left, top, width, height = cv2.boundingRect(alpha_HW)
    return np.s_[top : top + height, left : left + width]


def soften_hard_edge(alpha_HW: np.ndarray) -> np.ndarray:
    """Anti-alias a mask that has no half-covered pixels; a soft matte is returned as it is.

    Only the pixels on both sides of the contour change, so the core is the same before and after. Parts of one or two
    pixels stay full.
    """
    ring = cv2.dilate(alpha_HW, _SQUARE) != cv2.erode(alpha_HW, _SQUARE)
    partial = (alpha_HW > 0) & (alpha_HW < 255)
    if partial.sum() >= 0.2 * ring.sum():
        return alpha_HW
    softened = np.where(ring, cv2.GaussianBlur(alpha_HW, (3, 3), 0), alpha_HW)
    # A wire of one or two pixels has no inside that would stay full: it keeps its own pixels, and softens outwards.
    thin = (alpha_HW > 0) & (cv2.morphologyEx(alpha_HW, cv2.MORPH_OPEN, _SQUARE) == 0)
    return np.where(thin, alpha_HW, softened)


def unmix(rgb_HW3: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    """The product's colours without what shines through from the old background.

    Multi-level foreground estimation (Germer et al. 2020, arXiv 2006.14970) on the product's surroundings. Uint8
    (H, W, 3); equals the photo where alpha is 255, continues the product's colours outwards where it is 0.
    """
    if "pymatting" not in sys.modules:
        log.info("loading pymatting; its very first import on a machine compiles for about a minute")
    import torch

    threads = torch.get_num_threads()
    from pymatting import estimate_foreground_ml

    rows, columns = np.nonzero(alpha_HW)
    top, left = max(rows.min() - _CROP_MARGIN, 0), max(columns.min() - _CROP_MARGIN, 0)
    window = np.s_[top : rows.max() + 1 + _CROP_MARGIN, left : columns.max() + 1 + _CROP_MARGIN]
    solid = alpha_HW >= min(128, int(alpha_HW.max()))  # glass may be clear everywhere
    foreground = np.empty_like(rgb_HW3)
    foreground[:] = np.rint(rgb_HW3[solid].mean(axis=0))
    estimate = estimate_foreground_ml(to_unit(rgb_HW3[window]), to_unit(alpha_HW[window]))
    assert isinstance(estimate, np.ndarray)  # a pair only if the background is asked for
    # numba starts a thread per core and leaves OpenMP set so: torch would go on with another number of threads, which
    # is slow where processes share the cores and changes the last bits of what is computed
    torch.set_num_threads(threads)
    foreground[window] = to_bytes(np.asarray(estimate))
    return np.where((alpha_HW == 255)[..., None], rgb_HW3, foreground)


def held_cells(coverage_HW: np.ndarray, cell: int) -> np.ndarray:
    """Which latent cells (``cell`` px wide) lie inside the product, as bool (H / cell, W / cell).

    The one definition for training, validation and generation.

    The product is eroded by 1/128 of the picture's side (8 px at 1024) first, so that the scene is generated a little
    way under its edge and no unfilled rim can show.
    """
    height, width = coverage_HW.shape
    radius = max(1, round((height * width) ** 0.5 / 128))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    inner = cv2.erode(coverage_HW, kernel)
    smallest = inner.reshape(height // cell, cell, width // cell, cell).min(axis=(1, 3))
    return smallest >= 0.999


def held_by_mask(mask_HW: np.ndarray, cell: int) -> np.ndarray:
    """:func:`held_cells` of a framed photograph's uint8 mask, softened as generation softens it."""
    return held_cells(to_unit(soften_hard_edge(mask_HW)), cell)

"""Whether a picture shows a second one of its product: the product is searched in the scene at several sizes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from packshot.imaging.color import to_lab
from packshot.imaging.mask_edge import shrink

SIDE = 128  # px, longer side at which the product is searched
SCALES = (0.45, 0.52, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a second product to the first
VISIBLE = 0.6  # share of a second product that must not be hidden or cut by the frame
SMALLEST = 8  # px, each side of what is searched; smaller things resemble everything
FEWEST = 30  # px of its area
DIFFERENCE = 40.0  # ΔE (root mean square) that outweighs a perfect correlation


@dataclass(frozen=True)
class Scene:
    """A picture without its product. lab_HW3: float32. seen_HW: float32, 1 where the scene shows, 0 where it is not."""

    lab_HW3: np.ndarray
    seen_HW: np.ndarray


def sums(plane_HW: np.ndarray, kernel_hw: np.ndarray) -> np.ndarray:
    """Sum of a plane under a kernel, at every place where the kernel lies inside."""
    return cv2.matchTemplate(plane_HW.astype(np.float32), kernel_hw.astype(np.float32), cv2.TM_CCORR)


def likeness(scene: Scene, thing_hw3: np.ndarray, shape_hw: np.ndarray) -> np.ndarray:
    """How alike a thing and each place of a scene are, by what is seen of the place: 1 the same, -inf not seen.

    Correlation over all three channels, less the root mean squared difference in units of DIFFERENCE: correlation
    alone takes any round thing for any other, and difference alone takes a plain wall for a plain product.
    """
    seen = sums(scene.seen_HW, shape_hw)
    count = np.maximum(seen, 1)
    squared = np.zeros_like(seen)
    together = np.zeros_like(seen)
    of_thing = np.zeros_like(seen)
    of_place = np.zeros_like(seen)
    for channel in range(3):
        plane_HW = scene.lab_HW3[..., channel] * scene.seen_HW
        thing_hw = thing_hw3[..., channel] * shape_hw
        cross = sums(plane_HW, thing_hw)
        place_sum = sums(plane_HW, shape_hw)
        place_squares = sums(plane_HW * scene.lab_HW3[..., channel], shape_hw)
        thing_sum = sums(scene.seen_HW, thing_hw)
        thing_squares = sums(scene.seen_HW, thing_hw * thing_hw3[..., channel])
        squared += place_squares + thing_squares - 2 * cross
        together += cross - place_sum * thing_sum / count
        of_thing += thing_squares - thing_sum**2 / count
        of_place += place_squares - place_sum**2 / count
    floor = count  # a variance of 1: what is even more even has no structure to compare
    correlation = together / np.sqrt(np.maximum(of_thing, floor) * np.maximum(of_place, floor))
    difference = np.sqrt(np.maximum(squared, 0) / count)
    return np.where(seen > VISIBLE * shape_hw.sum(), correlation - difference / DIFFERENCE, -np.inf)


def with_margin(scene: Scene, height: int, width: int) -> Scene:
    """A scene with an unseen margin at the left, the right and below: a second product may be cut by the frame."""
    margins = (0, height, width, width)
    lab_HW3 = cv2.copyMakeBorder(scene.lab_HW3, *margins, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    seen_HW = cv2.copyMakeBorder(scene.seen_HW, *margins, cv2.BORDER_CONSTANT, value=0)
    return Scene(lab_HW3, seen_HW)


def strongest_repeat(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> float | None:
    """The highest :func:`likeness` of the product with any place of the scene around it, at most 1.

    picture_HW3, matte_HW: uint8. None where the product is too small, or leaves no room for a second one.
    """
    matte_HW = shrink(matte_HW, SIDE)
    lab_HW3 = to_lab(shrink(picture_HW3, SIDE))
    solid_HW = matte_HW >= 128
    if not solid_HW.any():
        return None
    rows = np.flatnonzero(solid_HW.any(axis=1))
    columns = np.flatnonzero(solid_HW.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scene = Scene(lab_HW3, (matte_HW == 0).astype(np.float32))
    best = -np.inf
    for scale in SCALES:
        height, width = (max(1, round(side * scale)) for side in solid_HW[box].shape)
        if min(height, width) < SMALLEST or height >= matte_HW.shape[0] or width >= matte_HW.shape[1]:
            continue
        thing_hw3 = cv2.resize(lab_HW3[box], (width, height), interpolation=cv2.INTER_AREA)
        cover_hw = cv2.resize(solid_HW[box].astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        shape_hw = (cover_hw > 0.5).astype(np.float32)
        if shape_hw.sum() < FEWEST:
            continue
        wide = with_margin(scene, height // 3, width // 3)
        best = max(best, float(likeness(wide, thing_hw3, shape_hw).max()))
    return best if np.isfinite(best) else None

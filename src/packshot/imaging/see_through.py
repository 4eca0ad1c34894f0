"""Whether a photographed product lets its ground be seen through it, as glass does.

A mask cannot say so: it is full where the product is, and the old ground in it comes along. Two things give glass away.
Inside of a clear rim it has the ground's own colour, and what the ground has next to the outline (a table's edge, a
texture) goes on inside of it.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy.ndimage import map_coordinates

from packshot.imaging.color import to_lab
from packshot.imaging.saliency import Ground

NEAR_GROUND = 10.0  # ΔE from the ground, of what may be the ground seen through
RIM = 7  # px, width of a glass's rim at most
RIM_CONTRAST = 10.0  # ΔE from the ground, of three quarters of the rim; less is a product of the ground's colour
RIM_RATIO = 2.0  # contrast of the rim by that of what it surrounds
CORE = 0.25  # of the largest distance to the outline, from which a pixel belongs to the core
STEP = 6  # px along the outline, over which colours are compared
LEAST_CHANGE = 1.0  # ΔE of the ground over two steps; less is noise
TOLD_BY = 0.6  # ΔE, mean change of the ground along the outline, below which it tells nothing
OUTSIDE = (-4, -7)  # px from the outline, where the ground's colours are taken
INSIDE = (7, 11)  # px, where the product's are
SHORTEST = 80  # px, of an outline
DOWNWARDS = -0.6  # an outline's direction inwards by which it is a foot's; a floor mirrors there what is above it


def depth_inside(mask_HW: np.ndarray) -> np.ndarray:
    """Distance of a mask's pixels to its outline, px; the frame counts as outside."""
    return cv2.distanceTransform(np.pad(mask_HW.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]


def clear_share(rgb_HW3: np.ndarray, mask_HW: np.ndarray, ground: Ground) -> float:
    """Share of a mask's core that has the ground's colour, within a rim that stands out; 0 without such a rim."""
    lab_HW3 = to_lab(cv2.GaussianBlur(rgb_HW3, (0, 0), 1.0))
    distance_HW = np.linalg.norm(lab_HW3 - ground.lab_HW3, axis=-1)
    depth_HW = depth_inside(mask_HW)
    core_HW = depth_HW > max(RIM + 1.0, CORE * float(depth_HW.max()))
    clear_HW = core_HW & (distance_HW < NEAR_GROUND)
    if not clear_HW.any():
        return 0.0
    rim_HW = np.where(mask_HW & (depth_HW < RIM), distance_HW, 0).astype(np.float32)
    highest_HW = cv2.dilate(rim_HW, np.ones((RIM + 2, RIM + 2), np.uint8))
    rim = float(np.percentile(highest_HW[(depth_HW > 0) & (depth_HW < 1.6)], 25))
    if rim < RIM_CONTRAST or rim < RIM_RATIO * float(np.median(distance_HW[clear_HW])):
        return 0.0
    return float(clear_HW.sum() / core_HW.sum())


def ground_inside(rgb_HW3: np.ndarray, mask_HW: np.ndarray) -> float | None:
    """How much of the ground's changes along the outline is repeated inside of it, in [-1.2, 1.2].

    0 is an opaque product, whose colours know nothing of the ground's. None where the ground is too even to tell.
    """
    lab_HW3 = to_lab(cv2.GaussianBlur(rgb_HW3, (0, 0), 1.2))
    depth_HW = depth_inside(mask_HW)
    outside_HW = cv2.distanceTransform((~mask_HW).astype(np.uint8), cv2.DIST_L2, 5)
    down_HW, right_HW = np.gradient(cv2.GaussianBlur(depth_HW - outside_HW, (0, 0), 3))
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    weights = [np.zeros(0)]
    repeated = [np.zeros(0)]
    for contour in contours:
        if len(contour) < SHORTEST:
            continue
        points_N2 = contour[:, 0, ::-1]  # row, column
        inwards_N2 = np.stack([down_HW[tuple(points_N2.T)], right_HW[tuple(points_N2.T)]], axis=1)
        inwards_N2 /= np.linalg.norm(inwards_N2, axis=1, keepdims=True) + 1e-6
        ground_N3, outside_N = sampled(lab_HW3, points_N2, inwards_N2, OUTSIDE, ~mask_HW)
        product_N3, inside_N = sampled(lab_HW3, points_N2, inwards_N2, INSIDE, mask_HW)
        usable_N = outside_N & inside_N & (inwards_N2[:, 0] > DOWNWARDS)
        usable_N &= np.roll(usable_N, STEP) & np.roll(usable_N, -STEP)
        ground_change_N3 = change_along(ground_N3)
        change_N = np.linalg.norm(ground_change_N3, axis=1)
        share_N = (ground_change_N3 * change_along(product_N3)).sum(axis=1) / np.maximum(change_N**2, 0.25)
        weights.append(np.where(usable_N & (change_N > LEAST_CHANGE), change_N, 0))
        repeated.append(np.clip(share_N, -1.2, 1.2))  # a label's own edges count as one change of the ground at most
    weight_N = np.concatenate(weights)
    if not len(weight_N) or weight_N.mean() < TOLD_BY:
        return None
    return float((weight_N * np.concatenate(repeated)).sum() / weight_N.sum())


def sampled(
    lab_HW3: np.ndarray, points_N2: np.ndarray, inwards_N2: np.ndarray, depths: tuple[int, ...], where_HW: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean colours (N, 3) at some depths inwards from an outline, and which of them lie wholly in ``where_HW``."""
    highest = np.array(where_HW.shape) - 1
    colours = np.zeros((len(points_N2), 3))
    usable = np.ones(len(points_N2), bool)
    for depth in depths:
        places_N2 = points_N2 + depth * inwards_N2
        usable &= ((places_N2 >= 0) & (places_N2 <= highest)).all(axis=1)
        nearest = np.clip(np.rint(places_N2), 0, highest).astype(int)
        usable &= where_HW[tuple(nearest.T)]
        for channel in range(3):
            colours[:, channel] += map_coordinates(lab_HW3[..., channel], places_N2.T, order=1, mode="nearest")
    return colours / len(depths), usable


def change_along(colours_N3: np.ndarray) -> np.ndarray:
    """Change of colours over two steps along a closed outline, of colours slightly blurred along it: (N, 3)."""
    around_N3 = np.concatenate([colours_N3[-STEP * 3 :], colours_N3, colours_N3[: STEP * 3]])
    blurred_N3 = cv2.GaussianBlur(around_N3, (1, 13), sigmaX=0.01, sigmaY=2.0)[STEP * 3 : -STEP * 3]
    return np.roll(blurred_N3, -STEP, axis=0) - np.roll(blurred_N3, STEP, axis=0)

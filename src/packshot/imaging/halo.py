"""What is left of a photograph's old background around a product in a new picture."""

from __future__ import annotations

import cv2
import numpy as np

DEPTHS = (0, 1)  # px outside of the last pixel of the soft edge: where an old background would be left
CLEAR = 5  # px outside, where the picture shows its background alone
CONTRAST = 24.0  # 8-bit distance between old and new background below which nothing can be seen
AROUND = 32  # px around the matte that are looked at; the blur of its outline and CLEAR need less
FEWEST = 24  # points of the outline; a median over fewer says nothing
MOST = 4000  # points of the outline that are looked at


def outline_points(matte_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points just outside of a matte and their directions away from it: x, y in px, float32 (N, 2) each."""
    covered = (matte_HW > 0).astype(np.uint8)
    contours, _ = cv2.findContours(covered, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)
    every: np.ndarray = np.concatenate([np.asarray(contour) for contour in contours]).reshape(-1, 2)
    points: np.ndarray = every[:: max(1, len(every) // MOST)]
    rows = points[:, 1]
    columns = points[:, 0]
    soft_HW = cv2.GaussianBlur(covered.astype(np.float32), (0, 0), 2.0)
    slopes_HW2 = np.dstack([cv2.Sobel(soft_HW, cv2.CV_32F, 1, 0), cv2.Sobel(soft_HW, cv2.CV_32F, 0, 1)])
    down_hill_N2 = -slopes_HW2[rows, columns]
    length = np.linalg.norm(down_hill_N2, axis=1)
    known = length > 1e-3
    away = down_hill_N2[known] / length[known, None]
    return points[known].astype(np.float32), away.astype(np.float32)


def sampled(image_HWC: np.ndarray, points_N2: np.ndarray) -> np.ndarray:
    """A picture at points between its pixels, float32 (N, C)."""
    # remap takes at most 32,767 columns, and MOST points are fewer
    x = points_N2[None, :, 0]
    y = points_N2[None, :, 1]
    values = cv2.remap(image_HWC, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return values[0].astype(np.float32)


def room(matte_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of the outline that have clear background before them: the points, the directions away, and where the
    background is clear, float32 (N, 2) each."""
    points_N2, away_N2 = outline_points(matte_HW)
    far_N2 = points_N2 + CLEAR * away_N2
    height, width = matte_HW.shape
    inside = (far_N2 >= 0).all(axis=1) & (far_N2[:, 0] < width) & (far_N2[:, 1] < height)
    if inside.any():
        inside[inside] = sampled(matte_HW, far_N2[inside]).reshape(-1) == 0
    return points_N2[inside], away_N2[inside], far_N2[inside]


def neighbourhood(matte_HW: np.ndarray) -> tuple[slice, slice] | None:
    """The rows and columns of a matte and of all that is looked at around it; None where it is empty."""
    left, top, width, height = cv2.boundingRect(matte_HW)
    if width == 0:
        return None
    return (
        slice(max(0, top - AROUND), top + height + AROUND),
        slice(max(0, left - AROUND), left + width + AROUND),
    )


def old_background_left(
    picture_HW3: np.ndarray, photo_HW3: np.ndarray, foreground_HW3: np.ndarray, matte_HW: np.ndarray
) -> float | None:
    """Share of the way from the clean edge to the old background that a picture's edge has gone, 0 to 1.

    The clean edge is the product's own colours (``foreground``) over the new background, by the matte. Median over the
    points of the outline where both backgrounds differ enough, the worst of DEPTHS; all uint8, on one grid. None where
    they do not differ, or the frame leaves no room.
    """
    near = neighbourhood(matte_HW)
    if near is None:
        return None
    matte_HW = np.ascontiguousarray(matte_HW[near])
    picture_HW3 = np.ascontiguousarray(picture_HW3[near])
    photo_HW3 = np.ascontiguousarray(photo_HW3[near])
    foreground_HW3 = np.ascontiguousarray(foreground_HW3[near])
    points_N2, away_N2, far_N2 = room(matte_HW)
    if len(points_N2) < FEWEST:
        return None
    new = sampled(picture_HW3, far_N2)
    way = sampled(photo_HW3, far_N2) - new
    length = (way**2).sum(axis=1)
    differs = length > CONTRAST**2
    if differs.sum() < FEWEST:
        return None
    worst = 0.0
    for depth in DEPTHS:
        places_N2 = points_N2 + depth * away_N2
        alpha = sampled(matte_HW, places_N2).reshape(-1, 1) / 255
        clean = alpha * sampled(foreground_HW3, places_N2) + (1 - alpha) * new
        surplus = (sampled(picture_HW3, places_N2) - clean) * way
        left = surplus.sum(axis=1)[differs] / length[differs]
        worst = max(worst, float(np.median(np.clip(left, 0, 1))))
    return worst

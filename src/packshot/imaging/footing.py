"""Whether a product stands on something: next to its foot the ground is darker than farther away.

A product that stands keeps light from the ground at its foot, so that brightness rises step by step on the way down
from there. Below one that hangs in the air it changes as the ground's pattern has it. That tells few of them apart
(docs/verifier.md), so the limit lets all but the clearest pass.
"""

from __future__ import annotations

import cv2
import numpy as np

from packshot.imaging.mask_edge import shrink
from packshot.imaging.shadows import FOOT, Outline, outline_of

SIDE = 128  # px, longer side at which the foot is looked at
STEPS = (1, 2, 3, 4, 6, 8, 11, 14)  # px below the foot of a product of SIZE px; the first two of any product
SIZE = 60.0
DARK = 0.02  # added to linear light before the logarithm
RISE = 0.005  # of the logarithm, from which light counts as rising
FEWEST = 3  # px of ground beside the foot
# A logistic fit on 513 rendered training scenes and the same products lifted from their shadows (tools/fit_checks.py).
WEIGHTS = (-2.7219, 1.0516, -3.4015, -0.5168)
OFFSET = 1.7645


def light_below(light_HW: np.ndarray, solid_HW: np.ndarray, free_HW: np.ndarray, box: Outline) -> np.ndarray | None:
    """Median logarithm of the light at each of STEPS below the foot's columns, float (8,); None if nothing is seen.

    A step that the frame hides repeats the one before.
    """
    height, _ = solid_HW.shape
    columns = np.flatnonzero(solid_HW.any(axis=0))
    ends = height - np.argmax(solid_HW[::-1, columns], axis=0)
    low = ends > box.bottom - FOOT * box.height
    columns = columns[low]
    ends = ends[low]
    levels: list[float] = []
    for step in STEPS:
        reach = step if step <= 2 else max(1, round(step * box.size / SIZE))
        rows = ends + reach
        seen = rows < height
        seen[seen] = free_HW[rows[seen], columns[seen]]
        if seen.any():
            levels.append(float(np.median(light_HW[rows[seen], columns[seen]])))
        elif not levels:
            return None
        else:
            levels.append(levels[-1])
    return np.array(levels)


def darker_side(light_HW: np.ndarray, solid_HW: np.ndarray, free_HW: np.ndarray, box: Outline) -> float:
    """How much darker the ground is next to the foot than farther to the side, on its darker side, in logarithm."""
    distance_HW = cv2.distanceTransform((~solid_HW).astype(np.uint8), cv2.DIST_L2, 5) / box.size
    rows, columns = np.indices(solid_HW.shape)
    beside = free_HW & (rows > box.bottom - FOOT * box.height) & (rows < box.bottom + 0.02 * box.height)
    foot = np.flatnonzero(solid_HW[max(0, box.bottom - max(1, round(FOOT * box.height))) : box.bottom].any(axis=0))
    found = []
    for side in (columns < foot[0], columns > foot[-1]):
        near = beside & side & (distance_HW < 0.1)
        far = beside & side & (distance_HW > 0.3) & (distance_HW < 0.6)
        enough = min(near.sum(), far.sum()) >= FEWEST
        found.append(float(np.median(light_HW[far]) - np.median(light_HW[near])) if enough else 0.0)
    return max(found)


def signs(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> np.ndarray | None:
    """What speaks for a product that stands, float (4,): the rise of light over a short and a long way down, the share
    of steps down at which it rises, and how much darker the ground beside the foot is. None where no ground is seen."""
    matte_HW = shrink(matte_HW, SIDE)
    solid_HW = matte_HW >= 128
    if not solid_HW.any():
        return None
    grey_HW = cv2.cvtColor(shrink(picture_HW3, SIDE), cv2.COLOR_RGB2GRAY)
    light_HW = np.log((grey_HW.astype(np.float32) / 255) ** 2.2 + DARK)
    box = outline_of(solid_HW)
    free_HW = matte_HW == 0
    levels = light_below(light_HW, solid_HW, free_HW, box)
    if levels is None:
        return None
    start = levels[:2].mean()
    rising = float((np.diff(levels) > RISE).mean())
    beside = darker_side(light_HW, solid_HW, free_HW, box)
    return np.array([levels[3] - start, levels[5] - start, rising, beside])


def floats(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> float | None:
    """Probability, in [0, 1], that a product hangs in the air; None where no ground is seen below it. All uint8."""
    found = signs(picture_HW3, matte_HW)
    if found is None:
        return None
    return float(1 / (1 + np.exp(-(found @ np.array(WEIGHTS) + OFFSET))))

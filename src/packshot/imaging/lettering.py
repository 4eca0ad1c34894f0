"""Writing in the background of a picture: strokes of one contrast that stand in a row like letters.

Nothing is read. Printed words are marks of like height, like contrast and like weight on one line with even gaps, and
leaves, pebbles and tiles seldom are all of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from packshot.imaging.framing import scaled_size

SIDE = 256  # px, longer side at which writing is looked for
STROKES = (9, 15, 23)  # px: a stroke of a letter is thinner than these
CONTRASTS = (25, 45, 80)  # of 255 between a letter and its ground, at least
HEIGHTS = (0.035, 0.2)  # of a letter, as shares of the picture's side
LONGEST = 12  # letters of a line that count


@dataclass(frozen=True)
class Box:
    """A place in a picture, px."""

    left: int
    top: int
    width: int
    height: int

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def bottom(self) -> int:
        return self.top + self.height


@dataclass(frozen=True)
class Mark(Box):
    """A piece of a stroke map. contrast: mean difference from its ground. weight: its area as a share of its box."""

    contrast: float
    weight: float


def marks_in(strokes_HW: np.ndarray, contrast: int) -> list[Mark]:
    """Pieces of the size and shape of letters, from left to right. strokes_HW: uint8, contrast to the ground."""
    solid = (strokes_HW > contrast).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(solid, connectivity=8)
    side = max(strokes_HW.shape)
    found = []
    for number in range(1, count):
        left, top, width, height, area = map(int, stats[number])
        fits = HEIGHTS[0] * side <= height <= HEIGHTS[1] * side and 0.08 * height <= width <= 1.6 * height
        if not fits or area < 0.15 * width * height:
            continue
        box = np.s_[top : top + height, left : left + width]
        mean = float(strokes_HW[box][labels[box] == number].mean())
        found.append(Mark(left, top, width, height, mean, area / (width * height)))
    return sorted(found, key=lambda mark: (mark.left, mark.top))


def follows(last: Mark, mark: Mark) -> bool:
    """Whether a mark may be the next letter on the line of another."""
    taller = max(last.height, mark.height)
    gap = mark.left - last.right
    if not -0.1 * taller <= gap <= 0.6 * taller or mark.left <= last.left:
        return False
    if min(last.height, mark.height) < 0.5 * taller:
        return False
    same_foot = abs(mark.bottom - last.bottom) <= 0.25 * taller
    same_head = abs(mark.top - last.top) <= 0.25 * taller
    alike = abs(mark.contrast - last.contrast) <= 0.35 * max(mark.contrast, last.contrast)
    return alike and (same_foot or same_head)


def line_from(marks: list[Mark], first: int) -> list[Mark]:
    """The line of letters that begins at a mark."""
    line = [marks[first]]
    for mark in marks[first + 1 :]:
        if follows(line[-1], mark):
            line.append(mark)
    return line


def regularity(line: list[Mark]) -> float:
    """How much a line looks printed, in [0, 1]: feet or heads on one line, one contrast, clear strokes."""
    height = max(mark.height for mark in line)
    feet = np.array([mark.bottom for mark in line], float)
    heads = np.array([mark.top for mark in line], float)
    contrasts = np.array([mark.contrast for mark in line])
    places = np.array([mark.left for mark in line], float)
    wobble = min(rest_of_line(places, feet), rest_of_line(places, heads)) / height
    spread = float(contrasts.std() / contrasts.mean())
    strength = min(1.0, float(contrasts.mean()) / 80)
    return float(np.exp(-3 * wobble - 2 * spread) * strength)


def rest_of_line(places: np.ndarray, heights: np.ndarray) -> float:
    """Mean distance of the middle half of points from a straight line through them, in px."""
    if len(places) < 3:
        return 0.0
    slope, offset = np.polyfit(places, heights, 1)
    rest = np.sort(np.abs(heights - slope * places - offset))
    return float(rest[: max(1, len(rest) * 3 // 4)].mean())


def writing(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> float:
    """How much the background looks written on: letters of the best line, each by the line's regularity; 0 for none.

    picture_HW3, matte_HW: uint8. The product and its surroundings of a few pixels do not count: its own label may be
    written.
    """
    scale = SIDE / max(matte_HW.shape)
    size = scaled_size((matte_HW.shape[1], matte_HW.shape[0]), scale)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey_HW = cv2.cvtColor(cv2.resize(picture_HW3, size, interpolation=how), cv2.COLOR_RGB2GRAY)
    small_HW = cv2.resize(matte_HW, size, interpolation=cv2.INTER_AREA)
    near_HW = cv2.dilate(small_HW, np.ones((9, 9), np.uint8)) > 0
    best = 0.0
    for stroke in STROKES:
        window = cv2.getStructuringElement(cv2.MORPH_RECT, (stroke, stroke))
        for lighter in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
            strokes_HW = cv2.morphologyEx(grey_HW, lighter, window)
            strokes_HW[near_HW] = 0
            for contrast in CONTRASTS:
                best = max(best, best_line(marks_in(strokes_HW, contrast)))
    return best


def best_line(marks: list[Mark]) -> float:
    """The highest score of any line of at least two letters."""
    best = 0.0
    for first in range(len(marks)):
        line = line_from(marks, first)[:LONGEST]
        if len(line) > 1:
            best = max(best, len(line) * regularity(line))
    return best

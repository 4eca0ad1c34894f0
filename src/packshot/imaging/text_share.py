"""How much of a picture lies under lines of text: watermarks, prices, printed labels. Needs no model.

Letters are shapes darker or lighter than their surroundings, of one tone and with thin strokes; a line is at least four
of them side by side, on one baseline, of like height, tone and stroke. Slanted, handwritten and single words of up to
three letters are not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from packshot.imaging.lettering import Box

SIDE = 640  # px, longer side at which text is looked for
FEWEST = 4  # letters in a line
# px, sides of the squares that tell a stroke from what surrounds it: thin strokes and thick ones.
SURROUNDINGS = (9, 21)
CONTRAST = 18  # of 255, of a stroke against its surroundings
HEIGHT = (7, 120)  # px
ALONE = 0.4  # share of a line in what stands out around it, at least
FILL = (0.12, 0.95)  # share of a letter's box under its strokes


@dataclass(frozen=True)
class Letter(Box):
    """A shape that can be a letter. tone: its grey value. stroke, area: thickness and area of its strokes, px."""

    tone: float
    stroke: float
    area: int


def text_share(image: Image.Image) -> float:
    """Share of an RGB picture under boxes around lines of text, in [0, 1]; 0 where no line is found."""
    grey_HW = np.asarray(image.convert("L"))
    factor = SIDE / max(grey_HW.shape)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    grey_HW = cv2.resize(grey_HW, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    covered_HW = np.zeros(grey_HW.shape, bool)
    for dark_HW in (grey_HW, 255 - grey_HW):
        letters, strong_HW = find_letters(dark_HW)
        for line in find_lines(letters):
            top = min(letter.top for letter in line)
            bottom = max(letter.bottom for letter in line)
            if stands_alone(line, strong_HW, top, bottom):
                covered_HW[top:bottom, line[0].left : line[-1].right] = True
    return float(covered_HW.mean())


def stands_alone(line: list[Letter], strong_HW: np.ndarray, top: int, bottom: int) -> bool:
    """Whether a line is most of what stands out around it; among hairs, feathers and leaves rows of any kind occur."""
    margin = (bottom - top) // 2
    around_HW = strong_HW[
        max(0, top - margin) : bottom + margin, max(0, line[0].left - margin) : line[-1].right + margin
    ]
    return sum(letter.area for letter in line) >= ALONE * float(around_HW.sum())


def find_letters(grey_HW: np.ndarray) -> tuple[list[Letter], np.ndarray]:
    """Shapes darker than their surroundings that can be letters, from left to right; and where anything stands out.

    grey: uint8 picture. The second is 1 in each pixel of a shape, letter or not, else 0.
    """
    found: dict[tuple[int, int, int, int], Letter] = {}
    everything_HW = np.zeros(grey_HW.shape, np.uint8)
    for side in SURROUNDINGS:
        contrast_HW = cv2.morphologyEx(grey_HW, cv2.MORPH_BLACKHAT, np.ones((side, side), np.uint8))
        strong_HW = (contrast_HW > CONTRAST).astype(np.uint8)
        everything_HW |= strong_HW
        count, labels_HW, boxes, _ = cv2.connectedComponentsWithStats(strong_HW, connectivity=8)
        depth_HW = cv2.distanceTransform(strong_HW, cv2.DIST_L2, 3)
        for number in range(1, count):
            left, top, width, height, area = map(int, boxes[number])
            if not (HEIGHT[0] <= height <= HEIGHT[1] and 2 <= width <= 2.2 * height + 2):
                continue
            if not FILL[0] <= area / (width * height) <= FILL[1]:
                continue
            part = slice(top, top + height), slice(left, left + width)
            inside_HW = labels_HW[part] == number
            stroke = 2 * float(depth_HW[part][inside_HW].max())
            tone = tone_of(grey_HW[part][inside_HW], contrast_HW[part][inside_HW])
            if tone is not None and stroke <= 0.5 * height:
                # both squares find most letters, at boxes that differ by a pixel
                place = left // 2, top // 2, width // 2, height // 2
                found[place] = Letter(left, top, width, height, tone, stroke, area)
    return sorted(found.values(), key=lambda letter: (letter.left, letter.top)), everything_HW


def tone_of(values_N: np.ndarray, contrast_N: np.ndarray) -> float | None:
    """The grey value of a shape without its soft edge; None where it has no one tone, as printed letters have."""
    core_N = contrast_N > 0.5 * contrast_N.max()
    if core_N.mean() < 0.4 or values_N[core_N].std() > 0.2 * contrast_N.max() + 4:
        return None
    return float(np.median(values_N[core_N]))


def find_lines(letters: list[Letter]) -> list[list[Letter]]:
    """Rows of letters that belong together. letters: from left to right."""
    lines = []
    used: set[int] = set()
    for first in range(len(letters)):
        if first in used:
            continue
        places = [first]
        for place in range(first + 1, len(letters)):
            last, letter = letters[places[-1]], letters[place]
            if letter.left - last.right > 2.5 * last.height:
                break
            if place not in used and follows(last, letter):
                places.append(place)
        line = [letters[place] for place in places]
        if is_line(line):
            used.update(places)
            lines.append(line)
    return lines


def follows(last: Letter, letter: Letter) -> bool:
    """Whether a letter can stand next to another one in a word or after a space."""
    gap = letter.left - last.right
    low, high = sorted((last.height, letter.height))
    thin, thick = sorted((last.stroke, letter.stroke))
    on_line = abs(last.bottom - letter.bottom) <= 0.35 * high or abs(last.top - letter.top) <= 0.2 * high
    near = -0.3 * min(last.width, letter.width) <= gap <= 1.2 * high
    return near and on_line and high <= 1.9 * low and thick <= 2.2 * thin and abs(last.tone - letter.tone) <= 40


def is_line(line: list[Letter]) -> bool:
    """Whether letters make a line: enough of them, longer than high, most of them on one baseline."""
    if len(line) < FEWEST:
        return False
    height = float(np.median([letter.height for letter in line]))
    bottoms = np.array([letter.bottom for letter in line])
    on_base = np.abs(bottoms - np.median(bottoms)) <= max(1.5, 0.08 * height)
    return line[-1].right - line[0].left >= 1.8 * height and float(on_base.mean()) >= 0.6

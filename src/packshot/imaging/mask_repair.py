"""What colours alone leave out of a mask, pieces and thin arms, and what they add to it, a shadow or a mirror image."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from packshot.imaging.color import to_lab
from packshot.imaging.mask_doubt import PLAIN_FRAME, colour_gradient
from packshot.imaging.mask_edge import narrowed, shrink, widened
from packshot.imaging.saliency import Ground

STANDS_OUT = 12.0  # ΔE from the ground, of a part that was left out
SHARP = 0.25  # slope at a part's outline by its contrast, per px; shadows are softer
SMALLEST = 2e-4  # of the picture: what is smaller is a speck of dust
MOST = 12  # parts that are added; more are a pattern of the ground
HOLE = 0.02  # of the mask: smaller ones are reflections
FADED = 0.8  # contrast of a mirror image's lower third by that of its upper one
SHADED_DEPTH = 1.5  # ΔE from the ground, of a shadow
SHADED_SLOPE = 6.0  # ΔE per px, above which there is an edge between a shadow and the product
SHADED_MOST = 0.3  # of the mask, that a shadow takes
SHADED_SOFT = 0.2  # slope between a shadow and the ground by its contrast, per px
FAINT_SHARE = 0.07  # of the mask, that a part of the ground's colour has at least which may be the product's
FAINT_EDGE = 0.3  # ΔE per px, above the ground's noise, of such a part's outline
FOOT = 0.85  # of the mask's height, below which a part may be a shadow or a mirror image
SOFT = 0.6  # slope at the outline by the contrast, per px, below which a shaded part is a shadow
GROUND_COLOUR = 2.0  # ΔE from the ground, besides its spread, that a hole has at most
SHADOW_LIGHT = 0.35  # of the ground's, that a shadow before it has at least
SHADOW_TINT = 8.0  # ΔE, by which a shadow's colour differs from the ground's with less light
SHADOW_LEVELS = (8.0, 14.0, 20.0, 28.0)  # L* below which pieces at the foot may be a shadow
SHADOW_MOST = 0.1  # of the mask, that is taken for a shadow
SEAM = 8.0  # ΔE per px, mean slope between a shadow and the product that throws it
SHADOW_OPEN = 0.35  # slope between a shadow and the ground, by that of the seam; a product ends more sharply
SHADOW_DEPTH = 12.0  # L* by which a shadow is darker than the ground farther away
SHADOW_RIM = 4  # px around a shadow in which dark pixels belong to it
SLIVER = 0.005  # of the mask
MIRROR_SIDE = 160  # px, longer side at which a mirror image is looked for
MIRROR_LIKENESS = 0.9  # correlation of a mirror image with what it mirrors
MIRROR_CONTRAST = (0.08, 0.72)  # of a mirror image to what it mirrors
MIRROR_HEIGHTS = (0.2, 0.25, 0.32, 0.4, 0.5, 0.63, 0.8, 1.0)  # of a mirror image to what it mirrors
MIRROR_SPREAD = 8.0  # 8-bit steps, of what is mirrored: in less there is nothing to recognise
MIRROR_SHIFT = 0.03  # of the product's height, by which the line found may be off
MIRROR_REST = 22.0  # 8-bit steps: what the mirror image lacks of full contrast has the ground's colour, to this
_SQUARE = np.ones((3, 3), np.uint8)


def left_out(rgb_HW3: np.ndarray, mask_HW: np.ndarray, ground: Ground) -> np.ndarray:
    """Parts before a studio's ground that stand out from it with sharp edges and are not in the mask, bool (H, W).

    Nothing where there are so many of them that the ground has a pattern. Mirror images, which fade, are no parts.
    """
    lab_HW3 = to_lab(rgb_HW3)
    ground_HW3 = ground.lab_HW3
    contrast_HW = np.linalg.norm(lab_HW3 - ground_HW3, axis=-1)
    candidates_HW = (contrast_HW > STANDS_OUT + 2 * ground.spread) & ~widened(mask_HW)
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(candidates_HW.astype(np.uint8), connectivity=8)
    slope_HW = cv2.dilate(colour_gradient(rgb_HW3) / 4, _SQUARE)
    large = 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= max(12, SMALLEST * mask_HW.size))
    parts = []
    for number in large:
        part_HW = labels_HW == number
        rim_HW = part_HW & ~narrowed(part_HW)
        sharpness = np.median(slope_HW[rim_HW]) / np.percentile(contrast_HW[part_HW], 75)
        inner_HW = narrowed(part_HW)
        shaded = inner_HW.any() and is_shaded(lab_HW3[inner_HW], ground_HW3[inner_HW])
        fading = is_low(part_HW, mask_HW) and fades(contrast_HW, part_HW)
        if sharpness >= SHARP and not shaded and not fading and not touches_frame(part_HW):
            parts.append(part_HW)
    if not parts or len(parts) > MOST:
        return np.zeros_like(mask_HW)
    return np.logical_or.reduce(parts)


def fades(contrast_HW: np.ndarray, part_HW: np.ndarray) -> bool:
    """Whether a part's contrast with the ground decreases from its upper to its lower third."""
    rows = np.flatnonzero(part_HW.any(axis=1))
    third = max(1, len(rows) // 3)
    upper = contrast_HW[rows[:third]][part_HW[rows[:third]]].mean()
    lower = contrast_HW[rows[-third:]][part_HW[rows[-third:]]].mean()
    return bool(lower < FADED * upper)


def is_shaded(lab_N3: np.ndarray, ground_N3: np.ndarray) -> bool:
    """Whether colours are those of the ground with less light, as in a hard shadow; black things are darker."""
    light = np.median(lab_N3[:, 0] / np.maximum(ground_N3[:, 0], 1))
    tint = np.median(lab_N3[:, 1:] - light * ground_N3[:, 1:], axis=0)
    return bool(SHADOW_LIGHT < light < 1 and np.hypot(*tint) < SHADOW_TINT)


def united(
    rgb_HW3: np.ndarray, network_HW: np.ndarray, colours_HW: np.ndarray, ground: Ground
) -> tuple[np.ndarray, np.ndarray]:
    """The mask by colours with the large parts that only the network sees, and the holes among these that it lacks.

    Colours alone lose a white bottle before a white wall; the network fills rings and adds shadows. Both bool (H, W).
    """
    lab_HW3 = to_lab(cv2.GaussianBlur(rgb_HW3, (0, 0), 1.0))
    distance_HW = np.linalg.norm(lab_HW3 - ground.lab_HW3, axis=-1)
    slope_HW = colour_gradient(rgb_HW3, 0.7) / 4
    enclosed_HW = ~touching_frame(~colours_HW)
    parts_HW = network_HW & ~colours_HW
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(parts_HW.astype(np.uint8), connectivity=4)
    smallest = HOLE * network_HW.sum()
    united_HW = colours_HW.copy()
    holes_HW = np.zeros_like(united_HW)
    for number in 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= smallest):
        part_HW = labels_HW == number
        inner_HW = narrowed(part_HW, 3)
        inner_HW = inner_HW if inner_HW.any() else part_HW
        around_HW = widened(part_HW) & ~network_HW & ~widened(colours_HW, 3)
        if np.median(distance_HW[part_HW]) < GROUND_COLOUR + ground.spread:
            large = part_HW.sum() >= FAINT_SHARE * network_HW.sum()
            if (
                not large
                or (enclosed_HW & part_HW).any()
                or not has_outline(slope_HW, around_HW, ~widened(network_HW | colours_HW, 4))
            ):
                holes_HW |= part_HW
                continue
        elif is_low(part_HW, colours_HW) and is_shaded(lab_HW3[inner_HW], ground.lab_HW3[inner_HW]):
            edge = around_HW if around_HW.any() else part_HW
            if np.median(slope_HW[edge]) < SOFT * np.percentile(distance_HW[part_HW], 75):
                continue
        united_HW |= part_HW
    return closed(united_HW) & ~holes_HW, holes_HW


def closed(mask_HW: np.ndarray) -> np.ndarray:
    """A bool mask without gaps of a pixel or two."""
    return cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_CLOSE, _SQUARE) > 0


def has_outline(slope_HW: np.ndarray, around_HW: np.ndarray, outside_HW: np.ndarray) -> bool:
    """Whether nearly all of a part's outer rim has an edge, however faint, that stands out from the ground's noise."""
    highest_HW = cv2.dilate(slope_HW, np.ones((7, 7), np.uint8))
    if not around_HW.any() or not outside_HW.any():
        return False
    noise = float(np.median(highest_HW[outside_HW]))
    return float(np.percentile(highest_HW[around_HW], 15)) > FAINT_EDGE + 1.5 * noise


def is_low(part_HW: np.ndarray, mask_HW: np.ndarray) -> bool:
    """Whether a part lies at the foot of a mask or below it, where shadows and mirror images are."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    if not len(rows):
        return False
    return float(np.flatnonzero(part_HW.any(axis=1)).mean()) > rows[0] + FOOT * len(rows)


def touching_frame(mask_HW: np.ndarray) -> np.ndarray:
    """The pieces of a mask that reach the frame, bool (H, W)."""
    _, labels_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=4)
    frame = np.concatenate([labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1]])
    return np.isin(labels_HW, frame[frame > 0])


def touches_frame(part_HW: np.ndarray) -> bool:
    """Whether a part reaches the frame: then it is rather something else in the picture."""
    return bool(part_HW[0].any() or part_HW[-1].any() or part_HW[:, 0].any() or part_HW[:, -1].any())


def joined(mask_HW: np.ndarray, parts_HW: np.ndarray) -> np.ndarray:
    """A mask and the parts that were left out of it, without a gap between them where they are neighbours."""
    return mask_HW | parts_HW | (widened(parts_HW) & widened(mask_HW))


def shadow_at_foot(rgb_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Dark pieces at the lower outline that have an edge against the product and none against the ground, bool (H, W).

    Colours alone take a deep shadow for the product where the product has dark colours, too.
    """
    light_HW = to_lab(cv2.GaussianBlur(rgb_HW3, (0, 0), 1.0))[..., 0]
    slope_HW = colour_gradient(rgb_HW3) / 4
    rows = np.flatnonzero(mask_HW.any(axis=1))
    low_HW = mask_HW.copy()
    low_HW[: rows[0] + (rows[-1] - rows[0]) // 2] = False
    found_HW = np.zeros_like(mask_HW)
    ground = ground_light(light_HW, mask_HW)
    for darkness in SHADOW_LEVELS:
        if darkness > ground - SHADOW_DEPTH:  # the ground itself is dark
            break
        dark_HW = low_HW & (light_HW < darkness)
        opened = cv2.morphologyEx(dark_HW.astype(np.uint8), cv2.MORPH_OPEN, _SQUARE)
        count, labels_HW, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
        for number in range(1, count):
            if stats[number, cv2.CC_STAT_AREA] > SHADOW_MOST * mask_HW.sum():
                continue
            piece_HW = labels_HW == number
            around_HW = widened(piece_HW, 2) & ~piece_HW
            open_HW = around_HW & ~mask_HW
            seam_HW = around_HW & mask_HW & ~dark_HW
            if not open_HW.any() or not seam_HW.any():
                continue
            seam = float(slope_HW[seam_HW].mean())
            if seam > SEAM and float(slope_HW[open_HW].mean()) < SHADOW_OPEN * seam:
                found_HW |= piece_HW
    if not found_HW.any():
        return found_HW
    found_HW |= widened(found_HW, SHADOW_RIM) & low_HW & (light_HW < SHADOW_LEVELS[-1])
    return found_HW | cut_loose(mask_HW & ~found_HW)


def soft_shadow(rgb_HW3: np.ndarray, mask_HW: np.ndarray, ground: Ground) -> np.ndarray:
    """Pieces at the foot of a mask that have a studio's ground's colour with less light, an edge against the product
    and none against the ground, bool (H, W)."""
    lab_HW3 = to_lab(cv2.GaussianBlur(rgb_HW3, (0, 0), 1.0))
    slope_HW = colour_gradient(rgb_HW3) / 4
    distance_HW = np.linalg.norm(lab_HW3 - ground.lab_HW3, axis=-1)
    light_HW = lab_HW3[..., 0] / np.maximum(ground.lab_HW3[..., 0], 1)
    tint_HW = np.linalg.norm(lab_HW3[..., 1:] - light_HW[..., None] * ground.lab_HW3[..., 1:], axis=-1)
    shaded_HW = (light_HW > SHADOW_LIGHT) & (light_HW < 1) & (tint_HW < SHADOW_TINT)
    shaded_HW &= (distance_HW > SHADED_DEPTH + ground.spread) & mask_HW
    pieces = (shaded_HW & (slope_HW < SHADED_SLOPE)).astype(np.uint8)
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(pieces, connectivity=4)
    found_HW = np.zeros_like(mask_HW)
    area = mask_HW.sum()
    fits = (stats[1:, cv2.CC_STAT_AREA] >= SLIVER * area) & (stats[1:, cv2.CC_STAT_AREA] <= SHADED_MOST * area)
    for number in 1 + np.flatnonzero(fits):
        piece_HW = labels_HW == number
        open_HW = widened(piece_HW, 3) & ~widened(mask_HW)
        if not is_low(piece_HW, mask_HW) or not open_HW.any():
            continue
        if np.median(slope_HW[open_HW]) < SHADED_SOFT * np.percentile(distance_HW[piece_HW], 75):
            found_HW |= piece_HW
    if not found_HW.any():
        return found_HW
    found_HW |= widened(found_HW, SHADOW_RIM) & shaded_HW & ~narrowed(mask_HW & ~found_HW, 2)
    return found_HW | cut_loose(mask_HW & ~found_HW)


def ground_light(light_HW: np.ndarray, mask_HW: np.ndarray) -> float:
    """Median L* of the ground beside and below the lower half of a mask; 0 where the frame leaves none."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    reach = max(3, round(0.15 * len(rows)))
    around_HW = widened(mask_HW, reach) & ~widened(mask_HW, 2)
    around_HW[: rows[0] + (rows[-1] - rows[0]) // 2] = False
    return float(np.median(light_HW[around_HW])) if around_HW.any() else 0.0


def cut_loose(mask_HW: np.ndarray) -> np.ndarray:
    """The small pieces of a mask, such as slivers that a cut leaves, bool (H, W)."""
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=4)
    small = 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] < SLIVER * mask_HW.sum())
    return np.isin(labels_HW, small)


@dataclass(frozen=True)
class MirrorFit:
    """How well ``below = contrast * above + (1 - contrast) * rest`` holds. rest: a colour, 8-bit steps."""

    correlation: float
    contrast: float
    rest: np.ndarray

    def is_faint(self, ground: np.ndarray) -> bool:
        """Whether it has less contrast than a copy, and has the ground's colour instead."""
        low, high = MIRROR_CONTRAST
        return low < self.contrast < high and float(np.abs(self.rest - ground).max()) < MIRROR_REST


def mirror_fit(above_N3: np.ndarray, below_N3: np.ndarray) -> MirrorFit:
    """The best fit of pixels below a line to those that they may mirror."""
    above_mean = above_N3.mean(axis=0)
    below_mean = below_N3.mean(axis=0)
    above = above_N3 - above_mean
    below = below_N3 - below_mean
    power = float((above**2).sum())
    together = float((above * below).sum())
    contrast = together / max(power, 1e-6)
    correlation = together / max(np.sqrt(power * float((below**2).sum())), 1e-6)
    return MirrorFit(correlation, contrast, (below_mean - contrast * above_mean) / max(1 - contrast, 1e-3))


def mirror_line(rgb_HW3: np.ndarray, mask_HW: np.ndarray) -> int | None:
    """The row below which a mask shows its upper part again, mirrored and fainter; None where it does not.

    A floor that shines mixes its own colour with the mirrored one. So the lower part must correlate with what is above
    the line, have less contrast, and lack what the ground next to it has. Seen from above it is shorter, too.
    """
    small_HW = shrink(mask_HW.astype(np.uint8) * 255, MIRROR_SIDE) >= 128
    if not small_HW.any():
        return None
    rows = np.flatnonzero(small_HW.any(axis=1))
    top = int(rows[0])
    bottom = int(rows[-1]) + 1
    small_HW3 = cv2.GaussianBlur(shrink(rgb_HW3, MIRROR_SIDE), (0, 0), 0.8).astype(np.float32)
    shown = Mirrored(small_HW3, small_HW, ~widened(small_HW, 2), top, bottom)
    best: tuple[float, int | None] = (MIRROR_LIKENESS, None)
    for line in range(top + (bottom - top) // 2, bottom - max(3, (bottom - top) // 40)):
        for height in MIRROR_HEIGHTS:
            likeness = shown.likeness(line, height)
            if likeness > best[0]:
                best = (likeness, line)
    if best[1] is None:
        return None
    found = round(best[1] * len(mask_HW) / len(small_HW))
    return sharpest_row(cv2.GaussianBlur(rgb_HW3, (0, 0), 0.8).astype(np.float32), mask_HW, found)


@dataclass(frozen=True)
class Mirrored:
    """A picture whose mask may go on into a mirror image. pixels_HW3: float32. beside_HW: clearly outside of the mask.
    top, bottom: rows of the mask."""

    pixels_HW3: np.ndarray
    mask_HW: np.ndarray
    beside_HW: np.ndarray
    top: int
    bottom: int

    def likeness(self, line: int, height: float) -> float:
        """How much what is below a line is the mirror image of what is above, -1 where it cannot be one.

        Twice: as far as the mask goes, because a mirror image may fade, and as far as a whole one would go, because
        the mask may end within one colour.
        """
        whole = min(len(self.mask_HW), line + round((line - self.top) * height))
        beside_HW = self.beside_HW[line : self.bottom]
        if beside_HW.sum() < 20:
            return -1.0
        ground = np.median(self.pixels_HW3[line : self.bottom][beside_HW], axis=0)
        best = -1.0
        for end in {min(self.bottom, whole), whole}:
            up = line - 1 - np.round(np.arange(end - line) / height).astype(int)
            up = up[up >= self.top]
            below = np.s_[line : line + len(up)]
            pairs_HW = self.mask_HW[up]
            covered = (pairs_HW & self.mask_HW[below]).sum()
            if covered < max(20, 0.8 * self.mask_HW[line : self.bottom].sum()):
                continue
            above_N3 = self.pixels_HW3[up][pairs_HW]
            if above_N3.std(axis=0).max() < MIRROR_SPREAD:
                continue
            fit = mirror_fit(above_N3, self.pixels_HW3[below][pairs_HW])
            if fit.is_faint(ground):
                best = max(best, fit.correlation)
        return best


def sharpest_row(pixels_HW3: np.ndarray, mask_HW: np.ndarray, line: int) -> int:
    """The row near a line where the mask's colours change most: there the product ends and its mirror image begins."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    reach = max(3, round(MIRROR_SHIFT * len(rows)))
    changes: dict[int, float] = {}
    for row in range(max(1, line - reach), min(len(mask_HW), line + reach + 1)):
        inside = mask_HW[row] & mask_HW[row - 1]
        if inside.any():
            changes[row] = float(np.abs(pixels_HW3[row, inside] - pixels_HW3[row - 1, inside]).mean())
    return max(changes, key=lambda row: changes[row]) if changes else line


def repair(rgb_HW3: np.ndarray, mask_HW: np.ndarray, ground: Ground) -> np.ndarray:
    """A mask with the parts that were left out, and without its shadow and its mirror image. mask_HW: not empty."""
    shadow_HW = shadow_at_foot(rgb_HW3, mask_HW)
    mask_HW = mask_HW & ~shadow_HW
    if ground.spread < PLAIN_FRAME:
        soft_HW = soft_shadow(rgb_HW3, mask_HW, ground)
        shadow_HW |= soft_HW
        mask_HW &= ~soft_HW
        mask_HW = joined(mask_HW, left_out(rgb_HW3, mask_HW, ground) & ~widened(shadow_HW))
    line = mirror_line(rgb_HW3, mask_HW)
    if line is not None:
        mask_HW[line:] = False
    return mask_HW

"""What speaks for a mask and what against it, measured at the size that GrabCut works at."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from packshot.imaging.color import to_lab
from packshot.imaging.pixels import to_bytes

NETWORK_AGREES = 0.85  # IoU of the mask with the network's own from which the two count as one (docs/log.md)
PLAIN_FRAME = 5.0  # ΔE; a frame of less spread is a studio's ground, see saliency.frame_spread
_SQUARE = np.ones((3, 3), np.uint8)


def first_guess(saliency_HW: np.ndarray) -> tuple[np.ndarray, float]:
    """(H, W) bool and the threshold, Otsu's, that made it; both sides are non-empty unless the input is constant."""
    levels = to_bytes(saliency_HW)
    threshold, likely = cv2.threshold(levels, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return likely > 0, threshold / 255


def ramp(value: float, low: float, high: float) -> float:
    """0 below ``low``, 1 above ``high``, a straight line between."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def plausible_area(share: float) -> float:
    """A product fills between 2 % and 80 % of a product photo."""
    return min(ramp(share, 0.002, 0.02), 1 - ramp(share, 0.8, 0.97))


def colour_gradient(rgb_HWC: np.ndarray) -> np.ndarray:
    """Length of the Lab colour's Sobel gradient, slightly blurred, float32 (H, W)."""
    lab_HWC = to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), 1.0))
    across = cv2.Sobel(lab_HWC, cv2.CV_32F, 1, 0)
    down = cv2.Sobel(lab_HWC, cv2.CV_32F, 0, 1)
    return np.sqrt((across**2 + down**2).sum(-1))


def evidence(rgb_HWC: np.ndarray, saliency_HW: np.ndarray, raw_HW: np.ndarray, mask_HW: np.ndarray) -> dict[str, float]:
    """What speaks for a mask, each in [0, 1].

    area: its share of the picture. border: how little of the frame it touches. edges: the colour gradient along its
    outline as a percentile of the whole picture's (0.5 is what chance gives). contrast: mean saliency inside minus
    outside. start: agreement (IoU) of the first guess, from saliency alone, with the result, from colours. compact:
    agreement of GrabCut's own result with its cleaned form; noise is speckle. single: share of the largest piece.
    """
    gradient_HW = colour_gradient(rgb_HWC)
    outline = cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    ranks = np.searchsorted(np.sort(gradient_HW, axis=None), gradient_HW[outline], side="left") / gradient_HW.size
    frame = np.concatenate([mask_HW[1], mask_HW[-2], mask_HW[:, 1], mask_HW[:, -2]])
    first_HW, _ = first_guess(saliency_HW)
    pieces = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA]
    return {
        "area": plausible_area(float(mask_HW.mean())),
        "border": 1 - ramp(float(frame.mean()), 0.15, 0.6),
        "edges": ramp(float(ranks.mean()), 0.55, 0.85),
        "contrast": ramp(float(saliency_HW[mask_HW].mean() - saliency_HW[~mask_HW].mean()), 0.2, 0.45),
        "start": ramp(iou(first_HW, mask_HW), 0.25, 0.75),
        "compact": ramp(iou(raw_HW, mask_HW), 0.4, 0.9),
        "single": ramp(float(pieces.max() / pieces.sum()), 0.4, 0.8),
    }


def iou(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Intersection over union of two masks, 0 if both are empty."""
    return float((a_HW & b_HW).sum() / max(1, (a_HW | b_HW).sum()))


@dataclass(frozen=True)
class Finding:
    """A mask and the independent ways to it, all (H, W) at one size.

    rgb_HWC: uint8. mask_HW: the mask that was chosen, bool. network_HW: the network's alpha in [0, 1]; None without a
    network. salient_HW: the mask that GrabCut finds from the saliency alone, bool. frame_spread: see ``saliency``.
    lost_HW: thin parts that the cleaning of the mask took away, bool.
    """

    rgb_HWC: np.ndarray
    mask_HW: np.ndarray
    network_HW: np.ndarray | None
    salient_HW: np.ndarray
    frame_spread: float
    lost_HW: np.ndarray

    @property
    def plain(self) -> bool:
        """Whether the picture was taken before a studio's ground."""
        return self.frame_spread < PLAIN_FRAME


def edges_left(found: Finding) -> float:
    """Length of the sharp edges outside of the mask, in perimeters of the mask.

    Before a plain ground there should be none: shadows are soft. A cap that was kept without its bottle leaves the
    bottle's outline.
    """
    slope_HW = colour_gradient(found.rgb_HWC) / 4
    mask = found.mask_HW.astype(np.uint8)
    reach = max(3, round(0.025 * max(mask.shape))) | 1
    outside = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))) == 0
    if not outside.any():
        return 0.0
    steep = slope_HW > max(1.0, 6 * float(np.median(slope_HW[outside])))
    crest = (slope_HW >= 0.999 * cv2.dilate(slope_HW, np.ones((1, 3)))) | (
        slope_HW >= 0.999 * cv2.dilate(slope_HW, np.ones((3, 1)))
    )
    perimeter = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, _SQUARE).sum() / 2
    return float((steep & crest & outside).sum() / max(1, perimeter))


def network_left(found: Finding) -> float:
    """What the network sees of the product outside of the mask, as a share of the mask's area."""
    if found.network_HW is None:
        return 0.0
    outside = cv2.dilate(found.mask_HW.astype(np.uint8), _SQUARE, iterations=2) == 0
    return float(found.network_HW[outside].sum() / max(1, found.mask_HW.sum()))


def ways_disagree(found: Finding) -> bool:
    """Whether the ways to a mask that know nothing of each other lead to different ones."""
    by_saliency = iou(found.salient_HW, found.mask_HW)
    if found.network_HW is None:
        return not found.plain or by_saliency < 0.95
    return iou(found.network_HW >= 0.5, found.mask_HW) < NETWORK_AGREES


def incomplete(found: Finding) -> bool:
    """Whether a part of the product seems to be outside of the mask."""
    if found.plain and edges_left(found) >= 1.0:
        return True
    return network_left(found) > (0.15 if found.plain else 0.3)


def touches_frame(found: Finding) -> bool:
    """Whether the mask runs along the frame: the product may be cut, or the ground was taken for it."""
    mask = found.mask_HW
    sides = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return max(float(side.mean()) for side in sides) > 0.05


def thin_parts_lost(found: Finding) -> bool:
    """Whether cleaning took away parts as long as a fifth of the mask's perimeter."""
    perimeter = cv2.morphologyEx(found.mask_HW.astype(np.uint8), cv2.MORPH_GRADIENT, _SQUARE).sum() / 2
    return float(found.lost_HW.sum()) > 0.2 * perimeter


# Reason code -> whether it holds.
DOUBTS = {
    "mask_ways_disagree": ways_disagree,
    "mask_incomplete": incomplete,
    "mask_touches_frame": touches_frame,
    "thin_parts_lost": thin_parts_lost,
}


# What each code means to the person who looks at the mask.
REMEDIES = {
    "mask_ways_disagree": "two independent ways to the mask lead to different outlines",
    "mask_incomplete": "something that looks like a part of the product is outside of the mask",
    "mask_touches_frame": "the mask runs along the frame; the product may be cut, or the ground was taken for it",
    "thin_parts_lost": "thin parts, such as a wire or a handle, were not kept",
    "mask_inverted": "the mask is full along the frame; matte.invert=true swaps black and white",
}


def doubts(found: Finding) -> tuple[str, ...]:
    """The codes of what speaks against a mask; none: it is accepted."""
    return tuple(code for code, holds in DOUBTS.items() if holds(found))


def mask_file_doubts(alpha_HW: np.ndarray) -> tuple[str, ...]:
    """The codes of what speaks against a mask that a person gave: full along the frame, it is probably inverted."""
    solid = alpha_HW >= 0.5
    frame = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    return ("mask_inverted",) if frame.mean() > 0.9 else ()

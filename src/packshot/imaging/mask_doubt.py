"""What speaks for a mask and what against it, measured at the size that GrabCut works at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.special import expit

from packshot.imaging.color import to_lab
from packshot.imaging.pixels import to_bytes
from packshot.imaging.saliency import Ground
from packshot.imaging.see_through import clear_share, ground_inside

NETWORK_AGREES = 0.85  # IoU of the mask with the network's own from which the two count as one (docs/log.md)
MOST_EDGES = 1.0  # perimeters of a mask, of sharp edges outside of it
MOST_LEFT = 0.3  # of the mask, that the segmentation network sees outside of it
MOST_LEFT_PLAIN = 0.15  # the same before a studio's ground, where that network seldom errs
MOST_LOST = 0.2  # perimeters of a mask, of thin parts that were not kept
# The same limits in large pictures, where the judge of masks weighs most of this (docs/verifier.md).
NETWORK_AGREES_LARGE = 0.5
MOST_EDGES_LARGE = 2.0
MOST_LEFT_LARGE = 1.5
MOST_LEFT_PLAIN_LARGE = 0.5
MOST_LOST_LARGE = 0.3
LINE = 0.03  # of the longer side, that an edge outside of a mask has at least
SHARPER = 1.5  # slope of a sharp edge by its slope when blurred by 3 px; that of a shadow hardly changes
MOST_PIECES = 6  # of a product: a set of three bottles, a pair of shoes
SPECK = 0.02  # of a mask's largest piece
PLAIN_FRAME = 5.0  # ΔE; a frame of less spread is a studio's ground, see saliency.Ground
# A logistic fit on half of the products of held-out renders, in scenes and before walls (benchmarks/mask_doubts.py).
WEIGHTS = (6.514, 0.978, -1.537, -1.801, 11.018, 2.039, -1.019)
OFFSET = -15.41
MOST_LIKELY = 0.82  # there, 97 % of the masks with at least this probability were right
LIKELY_LARGE = 0.6  # the same of the network that judges masks of large pictures (docs/verifier.md)
LARGE = 300  # px, longer side from which colours tell more than in small pictures
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


def colour_gradient(rgb_HWC: np.ndarray, blur: float = 1.0) -> np.ndarray:
    """Length of the Lab colour's Sobel gradient, slightly blurred (px), float32 (H, W)."""
    lab_HWC = to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), blur))
    across = cv2.Sobel(lab_HWC, cv2.CV_32F, 1, 0)
    down = cv2.Sobel(lab_HWC, cv2.CV_32F, 0, 1)
    return np.sqrt((across**2 + down**2).sum(-1))


def evidence(rgb_HWC: np.ndarray, saliency_HW: np.ndarray, raw_HW: np.ndarray, mask_HW: np.ndarray) -> dict[str, float]:
    """What speaks for a mask, each in [0, 1].

    area: its share of the picture. border: how little of the frame it touches. edges: the colour gradient along its
    outline as a percentile of the whole picture's (0.5 is what chance gives). contrast: mean saliency inside minus
    outside. start: agreement (IoU) of the first guess, from saliency alone, with the result, from colours; saliency
    fills what a wire encloses, so the result with its holes filled counts as well. compact:
    agreement of GrabCut's own result with its cleaned form; noise is speckle. single: share of the MOST_PIECES largest
    pieces: a product may have several, and noise has dozens.
    """
    gradient_HW = colour_gradient(rgb_HWC)
    outline = cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    ranks = np.searchsorted(np.sort(gradient_HW, axis=None), gradient_HW[outline], side="left") / gradient_HW.size
    frame = np.concatenate([mask_HW[1], mask_HW[-2], mask_HW[:, 1], mask_HW[:, -2]])
    first_HW, _ = first_guess(saliency_HW)
    pieces = piece_areas(mask_HW)
    return {
        "area": plausible_area(float(mask_HW.mean())),
        "border": 1 - ramp(float(frame.mean()), 0.15, 0.6),
        "edges": ramp(float(ranks.mean()), 0.55, 0.85),
        "contrast": ramp(float(saliency_HW[mask_HW].mean() - saliency_HW[~mask_HW].mean()), 0.2, 0.45),
        "start": ramp(max(iou(first_HW, mask_HW), iou(first_HW, filled(mask_HW))), 0.25, 0.75),
        "compact": ramp(iou(raw_HW, mask_HW), 0.4, 0.9),
        "single": ramp(float(pieces[:MOST_PIECES].sum() / pieces.sum()), 0.4, 0.8),
    }


def filled(mask_HW: np.ndarray) -> np.ndarray:
    """A bool mask without its holes."""
    contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    solid_HW = np.zeros(mask_HW.shape, np.uint8)
    cv2.drawContours(solid_HW, contours, -1, 1, cv2.FILLED)
    return solid_HW > 0


def piece_areas(mask_HW: np.ndarray) -> np.ndarray:
    """The areas of a bool mask's pieces in pixels, the largest first."""
    return np.sort(cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8))[2][1:, cv2.CC_STAT_AREA])[::-1]


def in_pieces(mask_HW: np.ndarray) -> bool:
    """Whether a mask has a second piece that is not a speck."""
    pieces = piece_areas(mask_HW)
    return len(pieces) > 1 and bool(pieces[1] > SPECK * pieces[0])


def iou(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Intersection over union of two masks, 0 if both are empty."""
    return float((a_HW & b_HW).sum() / max(1, (a_HW | b_HW).sum()))


@dataclass(frozen=True)
class Finding:
    """A mask and the independent ways to it, all (H, W) at one size.

    rgb_HWC: uint8. mask_HW: the mask that was chosen, bool. network_HW: the network's alpha in [0, 1]; None without a
    network. salient_HW: the mask that GrabCut finds from the saliency alone, bool. frame_spread: see ``saliency``.
    lost_HW: thin parts that the cleaning of the mask took away, bool. spread_HW: standard deviation of the network's
    alpha over several views of the picture; None where it looked once. ground: the plain ground before which the
    product stands, or one that goes on from row to row; None where there is none such. right_before: probability that
    the mask was right before the judge of masks corrected it.
    """

    rgb_HWC: np.ndarray
    mask_HW: np.ndarray
    network_HW: np.ndarray | None
    salient_HW: np.ndarray
    frame_spread: float
    lost_HW: np.ndarray
    spread_HW: np.ndarray | None = None
    ground: Ground | None = None
    right_before: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the picture was taken before a studio's ground."""
        return self.frame_spread < PLAIN_FRAME

    @property
    def large(self) -> bool:
        """Whether colours tell the outline better than a network that looks at few pixels."""
        return max(self.mask_HW.shape) >= LARGE


def edges_left(found: Finding) -> float:
    """Length of the sharp edges outside of the mask, in perimeters of the mask.

    Before a plain ground there should be none: shadows are soft. A cap that was kept without its bottle leaves the
    bottle's outline. Only lines count, as a camera's noise makes specks.
    """
    slope_HW = colour_gradient(found.rgb_HWC) / 4
    mask = found.mask_HW.astype(np.uint8)
    reach = max(3, round(0.025 * max(mask.shape))) | 1
    outside = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))) == 0
    if not outside.any():
        return 0.0
    steep = slope_HW > max(1.0, 6 * float(np.median(slope_HW[outside])))
    steep &= slope_HW > SHARPER * colour_gradient(found.rgb_HWC, 3.0) / 4
    crest = (slope_HW >= 0.999 * cv2.dilate(slope_HW, np.ones((1, 3)))) | (
        slope_HW >= 0.999 * cv2.dilate(slope_HW, np.ones((3, 1)))
    )
    perimeter = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, _SQUARE).sum() / 2
    _, _, stats, _ = cv2.connectedComponentsWithStats((steep & crest & outside).astype(np.uint8), connectivity=8)
    lengths = stats[1:, cv2.CC_STAT_AREA]
    return float(lengths[lengths >= LINE * max(mask.shape)].sum() / max(1, perimeter))


def network_left(found: Finding) -> float:
    """What the network sees of the product outside of the mask, as a share of the mask's area."""
    if found.network_HW is None:
        return 0.0
    outside = cv2.dilate(found.mask_HW.astype(np.uint8), _SQUARE, iterations=2) == 0
    return float(found.network_HW[outside].sum() / max(1, found.mask_HW.sum()))


def network_agreement(found: Finding) -> float | None:
    """IoU of the mask with the network's own; None without a network."""
    return None if found.network_HW is None else iou(found.network_HW >= 0.5, found.mask_HW)


def saliency_agreement(found: Finding) -> float | None:
    """IoU of the mask with the one from saliency alone; None where a network is the second way."""
    return iou(found.salient_HW, found.mask_HW) if found.network_HW is None else None


def studio_edges(found: Finding) -> float | None:
    """:func:`edges_left` before a studio's ground; None elsewhere, where a scene has edges of its own."""
    return edges_left(found) if found.plain else None


def network_share_left(found: Finding) -> float | None:
    """:func:`network_left`; None without a network."""
    return None if found.network_HW is None else network_left(found)


def most_left(found: Finding) -> float:
    """The limit of :func:`network_share_left`.

    Pieces before a studio's ground may be cap and label of a bottle that has the ground's colour.
    """
    if not found.plain:
        return MOST_LEFT_LARGE if found.large else MOST_LEFT
    return MOST_LEFT_PLAIN_LARGE if found.large and not in_pieces(found.mask_HW) else MOST_LEFT_PLAIN


def frame_share(found: Finding) -> float:
    """The largest share of a side of the frame that the mask takes."""
    mask = found.mask_HW
    return max(float(side.mean()) for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))


def thin_share_lost(found: Finding) -> float:
    """Thin parts that cleaning took away, in perimeters of the mask."""
    perimeter = cv2.morphologyEx(found.mask_HW.astype(np.uint8), cv2.MORPH_GRADIENT, _SQUARE).sum() / 2
    return float(found.lost_HW.sum() / max(1, perimeter))


def share_seen_through(found: Finding) -> float | None:
    """:func:`clear_share`; None without a plain ground."""
    if found.ground is None or not found.mask_HW.any():
        return None
    return clear_share(found.rgb_HWC, found.mask_HW, found.ground)


def ground_repeated(found: Finding) -> float | None:
    """:func:`ground_inside`; None in small pictures, where inside and outside are only a few pixels apart."""
    if not found.large or not found.mask_HW.any():
        return None
    return ground_inside(found.rgb_HWC, found.mask_HW)


def traits(found: Finding) -> np.ndarray | None:
    """What tells right masks from wrong ones, float (7,); None unless a network looked at several views.

    Agreement of the mask with the network and with what stands out; how undecided the network is, and how much its
    views differ, as shares of the mask; its alpha within the mask; whether the ground is plain; edges outside, if so.
    """
    if found.network_HW is None or found.spread_HW is None or not found.mask_HW.any():
        return None
    area = float(found.mask_HW.sum())
    undecided_HW = found.network_HW * (1 - found.network_HW)
    return np.array(
        [
            iou(found.network_HW >= 0.5, found.mask_HW),
            iou(found.salient_HW, found.mask_HW),
            float(undecided_HW.sum()) / area,
            float(found.spread_HW.sum()) / area,
            float(found.network_HW[found.mask_HW].mean()),
            float(found.plain),
            edges_left(found) if found.plain else 0.0,
        ]
    )


def probability_right(found: Finding) -> float | None:
    """Probability that a mask has an IoU of .9 with the truth; None unless a network looked at several views.

    In large pictures another network judges the mask; in small ones the probability follows from its :func:`traits`.
    The network believes what it corrected itself too easily, so what it said before counts as well.
    """
    if found.large:
        from packshot.imaging.mask_judge import judge  # with torch, which mask files do not need

        right = judge(found)
        return None if right is None else min(right, found.right_before)
    measured = traits(found)
    if measured is None:
        return None
    return float(expit(measured @ np.array(WEIGHTS) + OFFSET))


@dataclass(frozen=True)
class Sign:
    """Something that is measured of a mask. code: the doubt that it may raise. about: what the number is.

    measure: a number, or None where it does not apply. limit: of that number, for this finding. at_least: the number
    should not be below its limit, instead of not above it.
    """

    code: str
    about: str
    measure: Callable[[Finding], float | None]
    limit: Callable[[Finding], float]
    at_least: bool = False


SIGNS = {
    "probability_right": Sign(
        "mask_ways_disagree",
        "probability that the mask is right, by a network that judges masks or by how the ways to it agree",
        probability_right,
        lambda found: LIKELY_LARGE if found.large else MOST_LIKELY,
        at_least=True,
    ),
    "network_agreement": Sign(
        "mask_ways_disagree",
        "IoU of the mask with the network's own",
        network_agreement,
        lambda found: NETWORK_AGREES_LARGE if found.large else NETWORK_AGREES,
        at_least=True,
    ),
    "saliency_agreement": Sign(
        "mask_ways_disagree",
        "IoU of the mask with what stands out; in a scene, above 1, nothing else confirms it",
        saliency_agreement,
        lambda found: 0.95 if found.plain else 1.01,
        at_least=True,
    ),
    "edges_outside": Sign(
        "mask_incomplete",
        "length of sharp edges outside of the mask, in its perimeters",
        studio_edges,
        lambda found: MOST_EDGES_LARGE if found.large else MOST_EDGES,
    ),
    "network_outside": Sign(
        "mask_incomplete",
        "what the network sees of the product outside of the mask, as a share of its area",
        network_share_left,
        most_left,
    ),
    "frame_share": Sign(
        "mask_touches_frame", "largest share of a side of the frame in the mask", frame_share, lambda found: 0.05
    ),
    "thin_share_lost": Sign(
        "thin_parts_lost",
        "length of thin parts that were not kept, in perimeters",
        thin_share_lost,
        lambda found: MOST_LOST_LARGE if found.large else MOST_LOST,
    ),
    "clear_share": Sign(
        "product_see_through_in_photo",
        "share of the product, inside of a rim that stands out, that has the ground's colour",
        share_seen_through,
        lambda found: 0.5,
    ),
    "ground_inside": Sign(
        "product_see_through_in_photo",
        "how much of the ground's changes along the outline goes on inside of it; 0 is opaque",
        ground_repeated,
        lambda found: 0.35,
    ),
}


@dataclass(frozen=True)
class Measured:
    """A number behind a doubt. passed: whether it is on the right side of its limit."""

    about: str
    measured: float
    limit: float
    passed: bool


def measure_signs(found: Finding) -> dict[str, Measured]:
    """What is known of a mask, by the sign's name; signs that do not apply are left out."""
    signs: dict[str, Measured] = {}
    for name, sign in SIGNS.items():
        value = sign.measure(found)
        if value is None:
            continue
        limit = sign.limit(found)
        passed = value >= limit if sign.at_least else value <= limit
        signs[name] = Measured(sign.about, round(value, 4), limit, passed)
    return signs


# What each code means to the person who looks at the mask.
REMEDIES = {
    "mask_ways_disagree": "two independent ways to the mask lead to different outlines",
    "mask_incomplete": "something that looks like a part of the product is outside of the mask",
    "mask_touches_frame": "the mask runs along the frame; the product may be cut, or the ground was taken for it",
    "thin_parts_lost": "thin parts, such as a wire or a handle, were not kept",
    "product_see_through_in_photo": "the old ground shows through the product or fills a hole of it; "
    "glass needs a cut-out with its own alpha",
    "mask_inverted": "the mask is full along the frame; matte.invert=true swaps black and white",
}


def codes_of(signs: Mapping[str, Measured]) -> tuple[str, ...]:
    """The codes of the signs that speak against a mask, each once; none: it is accepted."""
    codes: list[str] = []
    for name, sign in signs.items():
        if not sign.passed and SIGNS[name].code not in codes:
            codes.append(SIGNS[name].code)
    return tuple(codes)


def doubts(found: Finding) -> tuple[str, ...]:
    """The codes of what speaks against a mask; none: it is accepted."""
    return codes_of(measure_signs(found))


def full_frame(alpha_HW: np.ndarray) -> Measured:
    """How much of the frame a mask that a person gave takes: nearly all of it, and it is probably inverted."""
    solid = alpha_HW >= 0.5
    frame = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    share = round(float(frame.mean()), 4)
    return Measured("share of the frame in the mask", share, 0.9, share <= 0.9)


def mask_file_doubts(alpha_HW: np.ndarray) -> tuple[str, ...]:
    """The codes of what speaks against a mask that a person gave."""
    return () if full_frame(alpha_HW).passed else ("mask_inverted",)

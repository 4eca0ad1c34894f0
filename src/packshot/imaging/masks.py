"""Where the product is: from a mask file, the picture's own alpha, or what ``matte.model`` names, in that order.

A network finds roughly where the product is, and GrabCut finds its outline by the colours. On a studio's plain ground
the product also stands out from the frame, so there both ways are used. ``mask_doubt`` compares them and names doubts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from PIL import Image

from packshot.config.mask_models import reads_onnx
from packshot.config.schema import MatteConfig
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.decode import flatten
from packshot.imaging.grabcut import grabcut
from packshot.imaging.mask_doubt import (
    LARGE,
    PLAIN_FRAME,
    Finding,
    Measured,
    codes_of,
    evidence,
    first_guess,
    full_frame,
    iou,
    mask_file_doubts,
    measure_signs,
    plausible_area,
    ramp,
    traits,
)
from packshot.imaging.mask_edge import refine, shrink, stretched, widened
from packshot.imaging.mask_networks import Views, seen_by_family, seen_by_onnx, uses_family
from packshot.imaging.mask_repair import repair, united
from packshot.imaging.pixels import to_bytes, to_unit
from packshot.imaging.saliency import Ground, fit_ground, fit_rows, saliency

VERSION = 4  # raise it when the same picture gives another mask: finished masks of datasets are found again then
UNDECIDED = (0.2, 0.8)  # the network's alpha between which the colours decide
UNDECIDED_JUDGE = (0.05, 0.95)  # the same of a mask that the judge of masks corrected; docs/log.md
WORK_SIDE = 400  # px, longer side at which GrabCut works: seconds at 12 megapixels, and its result is no better
CONFIRMED = 0.5  # IoU with what stands out, from which the colours are believed in a scene
CLEAR_SHARE = 0.05  # of a cut-out's pixels are fully transparent, at least
FAINT = 0.02  # alpha that a cut-out exceeds somewhere; less is a forgotten channel
OPAQUE_PEAK = 0.9  # matting tools stop a little short of full; such a peak means opaque


class NoProductError(PackshotError):
    """No product was found; ``confidence`` is that of the best guess."""

    def __init__(self, name: str, confidence: float, wanted: float) -> None:
        super().__init__(
            f"no product found in {name} (confidence {confidence:.2f} < {wanted:g}).",
            "Give a mask file (white = product), or name another network by matte.model.",
        )
        self.confidence = confidence


class DoubtfulMaskError(PackshotError):
    """A mask is in doubt and ``matte.strict`` asks to refuse such masks; ``reasons`` are the codes."""

    def __init__(self, name: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"the mask of {name} is in doubt: {', '.join(reasons)}.",
            "Give a mask file (white = product), or set matte.strict=false to go on and look at it in the report.",
        )
        self.reasons = reasons


class MaskFileError(ConfigError):
    """A given mask does not fit its image, or marks nothing or everything."""


@dataclass(frozen=True)
class Mask:
    """A product's mask.

    alpha_HW: float32 in [0, 1], 1 = product. method: file, alpha, onnx, network or grabcut. confidence: in [0, 1].
    reasons: codes of what speaks against it (``mask_doubt``); none: it is accepted. signs: the numbers behind them.
    ways: other masks of the same picture, bool and small, by what found them; empty where there was one way only.
    traits: see ``mask_doubt.traits``.
    """

    alpha_HW: np.ndarray
    method: str
    confidence: float
    reasons: tuple[str, ...] = ()
    signs: Mapping[str, Measured] = field(default_factory=dict)
    ways: Mapping[str, np.ndarray] = field(default_factory=dict)
    traits: np.ndarray | None = None

    def to_image(self) -> Image.Image:
        """8-bit grey picture, white = product."""
        return Image.fromarray(to_bytes(self.alpha_HW))


def find_mask(image: Image.Image, matte: MatteConfig, mask: Image.Image | None = None, name: str = "the image") -> Mask:
    """The product's alpha, and what speaks against it.

    image: RGB or RGBA, as ``decode_image`` gives it.
    mask: a mask of the same size (white = product; a cut-out counts by its alpha). It is taken as it is, or inverted by
        ``matte.invert``.
    name: how messages call the image.

    Raises:
        NoProductError: nothing found, or the confidence is below ``matte.min_confidence``.
        DoubtfulMaskError: ``matte.strict`` is set and the mask is in doubt.
        MaskFileError: the mask has another size than the image, or marks nothing or everything.
        ConfigError: ``matte.model`` is not a usable network.
    """
    cutout_HW = None if mask is not None else _cutout_alpha(image)
    if mask is not None:
        found = _from_file(image, mask, name, matte.invert)
    elif cutout_HW is not None:
        found = Mask(cutout_HW, "alpha", 1.0)
    else:
        find = _from_onnx if reads_onnx(matte.model) else _from_grabcut
        found = find(flatten(image), matte.model)
    if found.confidence < matte.min_confidence or not (found.alpha_HW > FAINT).any():
        raise NoProductError(name, found.confidence, matte.min_confidence)
    if matte.strict and found.reasons:
        raise DoubtfulMaskError(name, found.reasons)
    return found


def judged(alpha_HW: np.ndarray, method: str, confidence: float, finding: Finding) -> Mask:
    """A mask that was found, with what speaks for and against it."""
    signs = measure_signs(finding)
    ways = {"what stands out": finding.salient_HW}
    if finding.network_HW is not None:
        ways["the colours" if method == "onnx" else "the network"] = finding.network_HW >= 0.5
    return Mask(alpha_HW, method, confidence, codes_of(signs), signs, ways, traits(finding))


def _from_file(image: Image.Image, mask: Image.Image, name: str, invert: bool) -> Mask:
    if mask.size != image.size:
        raise MaskFileError(
            f"the mask of {name} is {mask.width}x{mask.height}, the image {image.width}x{image.height}.",
            "Export the mask at the image's size; it would not fit its pixels otherwise.",
        )
    alpha_HW = _cutout_alpha(mask)
    if alpha_HW is None:
        alpha_HW = to_unit(np.asarray(mask.convert("L")))
    if invert:
        alpha_HW = 1 - alpha_HW
    if alpha_HW.max() < 0.5:
        raise MaskFileError(
            f"the mask of {name} is empty: its brightest value is {round(float(alpha_HW.max()) * 255)} of 255.",
            "White (255) marks the product.",
        )
    if alpha_HW.min() >= 0.5:
        raise MaskFileError(
            f"the mask of {name} marks the whole picture as product.", "Black (0) marks the background."
        )
    return Mask(alpha_HW, "file", 1.0, mask_file_doubts(alpha_HW), {"frame_full": full_frame(alpha_HW)})


def _cutout_alpha(image: Image.Image) -> np.ndarray | None:
    """The alpha of a real cut-out; None for opaque pictures and for alpha that only fades a whole picture.

    Large clear areas make a cut-out, also where the alpha is never full, as in glass. Where a part of it is nearly
    full, that part counts as opaque.
    """
    if image.mode != "RGBA":
        return None
    alpha_HW = to_unit(np.asarray(image.getchannel("A")))
    peak = float(alpha_HW.max())
    if peak <= FAINT or np.mean(alpha_HW == 0) < CLEAR_SHARE:
        return None
    return alpha_HW / peak if peak >= OPAQUE_PEAK else alpha_HW


# --- a salient-object network -----------------------------------------------------------------------------------------

# Alpha that becomes 0 and 1. Their last layer is a sigmoid, which ends at .94 to .99 inside a product: taken as it is,
# a part of the new background would shine through, and no pixel would count as the product's core.
ONNX_LEVELS = (0.05, 0.95)


def _from_onnx(image: Image.Image, model: str) -> Mask:
    """The mask of a public network or an ONNX file.

    GrabCut, started from it, is the second way, which uses the colours: where the two differ, the mask is in doubt.
    """
    guess_HW = seen_by_onnx(image, model)
    likely = guess_HW > 0.1
    # A confident network gives 0 or 1; on noise and empty pictures it hedges.
    certainty = float(np.abs(2 * guess_HW[likely] - 1).mean()) if likely.any() else 0.0
    confidence = min(ramp(certainty, 0.5, 0.9), plausible_area(float((guess_HW >= 0.5).mean())))
    alpha_HW = cv2.resize(guess_HW, image.size, interpolation=cv2.INTER_LINEAR)
    studied = _study(np.asarray(image))
    small_HWC = studied.rgb_HWC
    seen_HW = cv2.resize(guess_HW, small_HWC.shape[1::-1], interpolation=cv2.INTER_AREA)
    by_colour = _candidate(small_HWC, seen_HW)
    finding = Finding(
        rgb_HWC=small_HWC,
        mask_HW=seen_HW >= 0.5,
        network_HW=by_colour.clean_HW.astype(np.float32),
        salient_HW=studied.salient.clean_HW,
        frame_spread=studied.ground.spread,
        lost_HW=np.zeros(seen_HW.shape, bool),  # the network's own outline is kept
        ground=studied.even_ground,
    )
    return judged(stretched(alpha_HW, *ONNX_LEVELS), "onnx", confidence, finding)


# --- a network that guides GrabCut, and GrabCut alone -----------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A mask that GrabCut finds from one guess, bool (H, W): as found, and cleaned. evidence: of the cleaned mask."""

    raw_HW: np.ndarray
    clean_HW: np.ndarray
    evidence: float


@dataclass(frozen=True)
class Studied:
    """A picture at the size that GrabCut works at, and what is known of it without a network.

    rgb_HWC: uint8. salient_HW: what stands out, in [0, 1]. salient: the mask from it. ground: as one smooth colour.
    rows: as one that goes on from row to row.
    """

    rgb_HWC: np.ndarray
    salient_HW: np.ndarray
    salient: Candidate
    ground: Ground
    rows: Ground

    @property
    def plain(self) -> bool:
        """Whether it was taken before a studio's ground."""
        return self.ground.spread < PLAIN_FRAME

    @property
    def even_ground(self) -> Ground | None:
        """The better of the two grounds; None in scenes, which neither describes."""
        best = min(self.ground, self.rows, key=lambda ground: ground.spread)
        return best if best.spread < PLAIN_FRAME else None


def _candidate(rgb_HWC: np.ndarray, guess_HW: np.ndarray) -> Candidate:
    """GrabCut from a guess (H, W) in [0, 1]; nothing found has no evidence."""
    if guess_HW.max() == 0:
        nothing = np.zeros(guess_HW.shape, bool)
        return Candidate(nothing, nothing, 0.0)
    return _weighed(rgb_HWC, guess_HW, _object_from(rgb_HWC, guess_HW))


def _seen_candidate(rgb_HWC: np.ndarray, alpha_HW: np.ndarray, undecided: tuple[float, float] = UNDECIDED) -> Candidate:
    """The mask of a network's alpha (H, W): the colours decide, by GrabCut, where the network is undecided."""
    labels_HW = np.where(alpha_HW >= 0.5, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels_HW[alpha_HW < undecided[0]] = cv2.GC_BGD
    labels_HW[alpha_HW > undecided[1]] = cv2.GC_FGD
    likely_share = float((alpha_HW >= 0.5).mean())
    if likely_share in (0.0, 1.0):  # GrabCut learns the colours of both
        return _weighed(rgb_HWC, alpha_HW, alpha_HW >= 0.5)
    return _weighed(rgb_HWC, alpha_HW, grabcut(rgb_HWC, labels_HW, iterations=3))


def _weighed(rgb_HWC: np.ndarray, guess_HW: np.ndarray, raw_HW: np.ndarray) -> Candidate:
    """A raw mask, cleaned, with its evidence."""
    clean_HW = _clean(raw_HW)
    if not clean_HW.any() or clean_HW.all():
        return Candidate(raw_HW, np.zeros_like(raw_HW), 0.0)
    # A mask is as good as the weakest thing that speaks for it.
    return Candidate(raw_HW, clean_HW, min(evidence(rgb_HWC, guess_HW, raw_HW, clean_HW).values()))


def _is_part_of(seen: Candidate, salient: Candidate) -> bool:
    """Whether the network seems to have seen a part of the product only, such as a cup without its saucer.

    What stands out then contains it, is much larger and has strong evidence. Small pictures have too few pixels to
    tell: at 128 px the larger mask was the wrong one more often than not, at 512 px it was not (docs/log.md).
    """
    area = seen.clean_HW.sum()
    outside = (seen.clean_HW & ~salient.clean_HW).sum()
    contained = 0 < area < 0.7 * salient.clean_HW.sum() and outside < 0.1 * area
    return bool(contained) and salient.evidence >= 0.85 and min(seen.clean_HW.shape) >= 256


def _study(rgb_HWC: np.ndarray) -> Studied:
    """What is known of a picture of any size, uint8 RGB, without a network."""
    small_HWC = shrink(rgb_HWC, WORK_SIDE)
    salient_HW = saliency(small_HWC)
    salient = _candidate(small_HWC, salient_HW)
    return Studied(small_HWC, salient_HW, salient, fit_ground(small_HWC), fit_rows(small_HWC))


def _by_network(studied: Studied, views: Views) -> tuple[Candidate, Views]:
    """The mask by the network and by the colours, and what the network sees, without the holes that it fills.

    The colours know outlines better than the network does, which looks at few pixels, and run away in scenes. So they
    decide in large pictures, before a ground that is plain or goes on from row to row and where what stands out
    confirms them. In small pictures the network's own outline is as fine.
    """
    large = max(views.alpha_HW.shape) >= LARGE
    if not studied.plain:
        if large:
            by_colour = _candidate(studied.rgb_HWC, (views.alpha_HW + studied.salient_HW) / 2)
            confirmed = iou(by_colour.clean_HW, studied.salient.clean_HW) > CONFIRMED
            if confirmed or studied.rows.spread < PLAIN_FRAME:
                return by_colour, views
        return _seen_candidate(studied.rgb_HWC, views.alpha_HW), views
    seen = _seen_candidate(studied.rgb_HWC, views.alpha_HW)
    guess_HW = (views.alpha_HW + studied.salient_HW) / 2
    by_colour = _candidate(studied.rgb_HWC, guess_HW)
    mask_HW, holes_HW = united(studied.rgb_HWC, seen.clean_HW, by_colour.clean_HW, studied.ground)
    views = replace(views, alpha_HW=np.where(holes_HW, np.float32(0), views.alpha_HW))
    if not large:
        return replace(seen, raw_HW=seen.raw_HW & ~holes_HW, clean_HW=seen.clean_HW & ~holes_HW), views
    chosen = _weighed(studied.rgb_HWC, guess_HW, mask_HW)
    return replace(chosen, raw_HW=by_colour.raw_HW | mask_HW), views


def _stands_out_more(salient: Candidate, chosen: Candidate) -> bool:
    """Whether more speaks for what stands out than for the chosen mask, and it is not only a label or a cap of it."""
    whole = salient.clean_HW.sum() > 0.7 * chosen.clean_HW.sum()
    return bool(whole) and salient.evidence > chosen.evidence


def _repaired(studied: Studied, chosen: Candidate, views: Views | None) -> Finding:
    """A mask with the parts that it lacks and without shadows, and the other ways to it."""
    mask_HW = repair(studied.rgb_HWC, chosen.clean_HW, studied.ground)
    lost_HW = chosen.raw_HW & ~chosen.clean_HW & ~widened(mask_HW)
    if views is not None and not studied.plain:  # in a scene, colours alone find specks everywhere
        lost_HW &= views.alpha_HW >= UNDECIDED[0]
    return Finding(
        rgb_HWC=studied.rgb_HWC,
        mask_HW=mask_HW,
        network_HW=None if views is None else views.alpha_HW,
        salient_HW=studied.salient.clean_HW,
        frame_spread=studied.ground.spread,
        lost_HW=lost_HW,
        spread_HW=None if views is None else views.spread_HW,
        ground=studied.even_ground,
    )


def _corrected(studied: Studied, found: Finding, views: Views | None) -> Finding:
    """The mask that GrabCut finds from what the judge of masks says of each pixel, if the judge believes it more."""
    from packshot.imaging.mask_judge import judge, opinion_of  # with torch, which mask files do not need

    opinion = opinion_of(found)
    if opinion is None:
        return found
    product_HW = np.where(found.mask_HW, 1 - opinion.wrong_HW, opinion.wrong_HW)
    again = _seen_candidate(studied.rgb_HWC, product_HW, UNDECIDED_JUDGE)
    if not again.clean_HW.any():
        return found
    corrected = replace(_repaired(studied, again, views), right_before=opinion.right)
    return corrected if (judge(corrected) or 0) > opinion.right else found


@dataclass(frozen=True)
class Sought:
    """What was found without an ONNX network.

    evidence: of the mask before the judge corrected it. finding: None where nothing was found.
    """

    method: str
    evidence: float
    finding: Finding | None


def seek(rgb_HWC: np.ndarray, model: str) -> Sought:
    """The network's mask, with an outline by GrabCut, of a picture of any size, uint8 RGB.

    Before a studio's ground it is GrabCut from what stands out where more speaks for that: networks overlook rings and
    wires.
    """
    studied = _study(rgb_HWC)
    method = "grabcut"
    views = None
    chosen = studied.salient
    if uses_family(model):
        method = "network"
        chosen, views = _by_network(studied, seen_by_family(rgb_HWC, studied.rgb_HWC.shape[:2]))
        stronger = studied.plain and _stands_out_more(studied.salient, chosen)
        if stronger or _is_part_of(chosen, studied.salient):
            chosen = studied.salient
    if not chosen.clean_HW.any():
        return Sought(method, 0.0, None)
    finding = _repaired(studied, chosen, views)
    return Sought(method, chosen.evidence, _corrected(studied, finding, views) if finding.large else finding)


def _from_grabcut(image: Image.Image, model: str) -> Mask:
    """The mask that :func:`seek` finds, at full size."""
    rgb_HWC = np.asarray(image)
    sought = seek(rgb_HWC, model)
    if sought.finding is None:
        return Mask(np.zeros(rgb_HWC.shape[:2], np.float32), sought.method, 0.0)
    return judged(refine(rgb_HWC, sought.finding.mask_HW), sought.method, sought.evidence, sought.finding)


def _object_from(rgb_HWC: np.ndarray, saliency_HW: np.ndarray, iterations: int = 6) -> np.ndarray:
    """(H, W) bool from GrabCut, started at Otsu's threshold of the saliency."""
    likely_HW, threshold = first_guess(saliency_HW)
    labels_HW = np.where(likely_HW, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels_HW[saliency_HW < 0.3 * threshold] = cv2.GC_BGD
    likely_share = float(likely_HW.mean())
    if likely_share in (0.0, 1.0):  # GrabCut learns the colours of both
        return np.zeros_like(likely_HW)
    return grabcut(rgb_HWC, labels_HW, iterations)


def _is_wire(mask_HW: np.ndarray) -> bool:
    """Whether a mask is mostly one thin piece, such as the frame of glasses, and not speckle."""
    areas = cv2.connectedComponentsWithStats(mask_HW.astype(np.uint8), connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    return len(areas) > 0 and float(areas.max() / areas.sum()) > 0.8


def _clean(mask_HW: np.ndarray) -> np.ndarray:
    """The largest component and those at least a tenth of it; holes below 2 % of it (reflections) are filled.

    What is thinner than 3 px goes, unless the whole product is a wire.
    """
    opened = cv2.morphologyEx(mask_HW.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    if opened.sum() < 0.5 * mask_HW.sum() and _is_wire(mask_HW):
        opened = mask_HW.astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    if count < 2:
        return np.zeros_like(mask_HW)
    areas = stats[1:, cv2.CC_STAT_AREA]
    keep = np.isin(labels, 1 + np.flatnonzero(areas >= 0.1 * areas.max()))
    _, holes, hole_stats, _ = cv2.connectedComponentsWithStats((~keep).astype(np.uint8), connectivity=4)
    small = np.flatnonzero(hole_stats[:, cv2.CC_STAT_AREA] < 0.02 * keep.sum())
    touching = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    return keep | np.isin(holes, np.setdiff1d(small, np.append(touching, 0)))

"""Did the product stay what it is: its core, its edge, and its outline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import MatteConfig
from packshot.core.errors import PackshotError
from packshot.data.masks import find_mask
from packshot.evaluate.samples import Sample
from packshot.infer.colour import delta_e
from packshot.infer.composite import blend
from packshot.infer.product import unmix

SEGMENT_SIDE = 512  # px, longer side at which outlines are compared
EXTENSION_TOLERANCE = 0.05  # E_obj above the noise floor by more than this counts as an extended product

Segment = Callable[[np.ndarray, np.ndarray], np.ndarray]


def hard_mask(matte_HW: np.ndarray, working_size: tuple[int, int]) -> np.ndarray:
    """Bool (H, W): the mask binarised, taken to the working size (width, height) and back by nearest neighbour."""
    binary = np.where(matte_HW >= 128, np.uint8(255), np.uint8(0))
    small = cv2.resize(binary, working_size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(small, binary.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0


def hard_paste(
    photo_HW3: np.ndarray, matte_HW: np.ndarray, background_HW3: np.ndarray, raw_HW3: np.ndarray
) -> np.ndarray:
    """What pasting through a binarised, nearest-resized mask makes of the same layers: no matting, no un-mixing."""
    mask = hard_mask(matte_HW, (raw_HW3.shape[1], raw_HW3.shape[0]))
    return np.where(mask[..., None], photo_HW3, background_HW3)


def core_identity(picture_HW3: np.ndarray, sample: Sample) -> dict[str, float]:
    """Largest difference (0-255) to the photo on the core, and the share of its pixels that are identical."""
    if not sample.core_HW.any():
        return {"core_max_abs_diff": float("nan"), "core_identical_share": float("nan")}
    difference = np.abs(picture_HW3[sample.core_HW].astype(np.int16) - sample.photo_HW3[sample.core_HW]).max(axis=-1)
    return {"core_max_abs_diff": float(difference.max()), "core_identical_share": float((difference == 0).mean())}


def edge_halo(sample: Sample) -> dict[str, dict[str, float]]:
    """CIEDE2000 on the soft edge against a composite whose truth is known: {"matted": ..., "hard_paste": ...}.

    The run's own layers give the truth: cut-out over new background. A photo of the same cut-out before a plain wall
    of the opposite colour is made up, and both ways of compositing must get rid of that wall given the right alpha.
    It measures un-mixing and pasting, not whether the mask itself is right.
    """
    band = (sample.matte_HW > 0) & (sample.matte_HW < 255)
    if not band.any():
        return {}
    wall = np.empty_like(sample.foreground_HW3)
    wall[:] = 255 - sample.foreground_HW3[band].mean(axis=0)
    truth = blend(sample.foreground_HW3, sample.matte_HW, sample.background_HW3)
    photo = blend(sample.foreground_HW3, sample.matte_HW, wall)
    ways = {
        "matted": blend(unmix(photo, sample.matte_HW), sample.matte_HW, sample.background_HW3),
        "hard_paste": hard_paste(photo, sample.matte_HW, sample.background_HW3, sample.raw_HW3),
    }
    return {name: _percentiles(delta_e(made[band], truth[band])) for name, made in ways.items()}


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {"edge_halo_p50": float(np.percentile(values, 50)), "edge_halo_p95": float(np.percentile(values, 95))}


def segmenter(matte: MatteConfig) -> Segment:
    """The object in a picture, near where it should be: the matting network if one is configured, else GrabCut."""
    if not matte.onnx:
        return grabcut
    certain = replace(matte, min_confidence=0.0)

    def network(image_HW3: np.ndarray, keep_HW: np.ndarray) -> np.ndarray:
        try:
            return find_mask(Image.fromarray(image_HW3), certain).alpha_HW >= 0.5
        except PackshotError:
            return np.zeros_like(keep_HW)  # an object that no network finds is a lost one: L_obj says 1

    return network


def grabcut(image_HW3: np.ndarray, keep_HW: np.ndarray, iterations: int = 4) -> np.ndarray:
    """GrabCut seeded by the keep mask: its inner part is surely object, what is far from it surely is not.

    The object may grow by up to a quarter of the mask's longer side; image_HW3 uint8, keep_HW bool; returns bool.
    """
    rows, columns = np.nonzero(keep_HW)
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    keep = keep_HW.astype(np.uint8)
    outside = cv2.distanceTransform(1 - keep, cv2.DIST_L2, 5)
    inside = cv2.distanceTransform(np.pad(keep, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    labels = np.where(keep_HW, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[outside > side / 4] = cv2.GC_BGD
    labels[inside > min(max(1.0, 0.05 * side), inside.max() / 2)] = cv2.GC_FGD
    if not (labels == cv2.GC_BGD).any() and keep_HW.all():
        return keep_HW
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(image_HW3[..., ::-1])
    whole = (0, 0, bgr.shape[1], bgr.shape[0])  # not read in this mode
    cv2.grabCut(bgr, labels, whole, *models, iterations, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def _touching(object_HW: np.ndarray, keep_HW: np.ndarray) -> np.ndarray:
    _, components = cv2.connectedComponents(object_HW.astype(np.uint8), connectivity=8)
    return object_HW & np.isin(components, np.unique(components[object_HW & keep_HW]))


def extension_of(object_HW: np.ndarray, keep_HW: np.ndarray) -> dict[str, float]:
    """How far the object found (m_o) leaves the keep mask (k), both bool (H, W).

    ``extension`` E_obj = |m_o \\ dilate(k, s)| / |k|; ``loss`` L_obj = |erode(k, s) \\ m_o| / |k|, with a tolerance
    s of 2 px per 1024. ``expansion`` is the published formula, area(m_o ∪ k) - area(k), as a share of the picture.
    Only parts of m_o that touch k count: other things in the scene are no extension.
    """
    found = _touching(object_HW, keep_HW)
    tolerance = max(1, round(2 * max(keep_HW.shape) / 1024))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * tolerance + 1,) * 2)
    keep = keep_HW.astype(np.uint8)
    wide, narrow = cv2.dilate(keep, kernel) > 0, cv2.erode(keep, kernel) > 0
    area = keep_HW.sum()
    return {
        "extension": float((found & ~wide).sum() / area),
        "loss": float((narrow & ~found).sum() / area),
        "expansion": float((found & ~keep_HW).sum() / keep_HW.size),
    }


def compare_size(sample: Sample) -> tuple[int, int]:
    """(width, height) at which outlines are compared: the model's, at most SEGMENT_SIDE, for all pictures alike."""
    scale = min(1.0, SEGMENT_SIDE / max(sample.raw_HW3.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in sample.raw_HW3.shape[:2])
    return width, height


def measure_extension(
    image_HW3: np.ndarray, matte_HW: np.ndarray, segment: Segment, size: tuple[int, int]
) -> dict[str, float]:
    """:func:`extension_of` the object that ``segment`` finds in a picture, both brought to ``size`` (width, height)."""
    keep = cv2.resize(matte_HW, size, interpolation=cv2.INTER_AREA) >= 128
    if not keep.any():
        return {name: float("nan") for name in ("extension", "loss", "expansion")}
    small = cv2.resize(image_HW3, size, interpolation=cv2.INTER_AREA)
    return extension_of(segment(small, keep), keep)


def noise_floor(sample: Sample, segment: Segment) -> dict[str, float]:
    """The same measure where the truth is 0: the unedited photo, or, for a moved product, the product on plain grey."""
    if sample.certificate["transform"]["resampling"] == "none":
        return measure_extension(sample.photo_HW3, sample.matte_HW, segment, compare_size(sample))
    grey = np.full_like(sample.foreground_HW3, 127)
    plain = blend(sample.foreground_HW3, sample.matte_HW, grey)
    return measure_extension(plain, sample.matte_HW, segment, compare_size(sample))


def preservation(sample: Sample, segment: Segment) -> dict[str, Any]:
    """All measures of one picture: for the system (``ours``), its raw decode, and the hard paste of its layers."""
    pasted = hard_paste(sample.photo_HW3, sample.matte_HW, sample.background_HW3, sample.raw_HW3)
    halo, size = edge_halo(sample), compare_size(sample)
    floor = noise_floor(sample, segment)
    raw = measure_extension(sample.raw_HW3, sample.matte_HW, segment, size)
    rows = {}
    for name, picture, way in (("ours", sample.picture_HW3, "matted"), ("hard_paste", pasted, "hard_paste")):
        final = measure_extension(picture, sample.matte_HW, segment, size)
        rows[name] = {**core_identity(picture, sample), **halo.get(way, {}), **final}
        rows[name]["extended"] = float(final["extension"] > floor["extension"] + EXTENSION_TOLERANCE)
    raw["extended"] = float(raw["extension"] > floor["extension"] + EXTENSION_TOLERANCE)
    return {**rows, "raw": raw, "noise_floor": floor, "hard_paste_picture": pasted}

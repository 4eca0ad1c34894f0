"""Did the product stay what it is: its core, its edge, and its outline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import MatteConfig
from packshot.errors import PackshotError
from packshot.evaluate.samples import Sample
from packshot.generate.color import delta_e
from packshot.generate.composite import blend
from packshot.imaging.masks import find_mask
from packshot.imaging.matte import unmix
from packshot.imaging.outline import Segment, compare_size, grabcut, is_extended, measure_extension


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
    """The object in a picture, near where it should be: by ``matte.onnx`` if it is set, else GrabCut, which the keep
    mask guides better than ``matte.network`` could."""
    if not matte.onnx:
        return grabcut
    certain = replace(matte, min_confidence=0.0)

    def network(image_HW3: np.ndarray, keep_HW: np.ndarray) -> np.ndarray:
        try:
            return find_mask(Image.fromarray(image_HW3), certain).alpha_HW >= 0.5
        except PackshotError:
            return np.zeros_like(keep_HW)  # an object that no network finds is a lost one: L_obj says 1

    return network


def noise_floor(sample: Sample, segment: Segment) -> dict[str, float]:
    """The same measure where the truth is 0: the unedited photo, or, for a moved product, the product on plain grey."""
    if sample.certificate["transform"]["resampling"] == "none":
        return measure_extension(sample.photo_HW3, sample.matte_HW, segment, compare_size(*sample.raw_HW3.shape[:2]))
    grey = np.full_like(sample.foreground_HW3, 127)
    plain = blend(sample.foreground_HW3, sample.matte_HW, grey)
    return measure_extension(plain, sample.matte_HW, segment, compare_size(*sample.raw_HW3.shape[:2]))


def preservation(sample: Sample, segment: Segment) -> dict[str, Any]:
    """All measures of one picture: for the system (``ours``), its raw decode, and the hard paste of its layers."""
    pasted = hard_paste(sample.photo_HW3, sample.matte_HW, sample.background_HW3, sample.raw_HW3)
    halo, size = edge_halo(sample), compare_size(*sample.raw_HW3.shape[:2])
    floor = noise_floor(sample, segment)
    raw = measure_extension(sample.raw_HW3, sample.matte_HW, segment, size)
    rows = {}
    for name, picture, way in (("ours", sample.picture_HW3, "matted"), ("hard_paste", pasted, "hard_paste")):
        final = measure_extension(picture, sample.matte_HW, segment, size)
        rows[name] = {**core_identity(picture, sample), **halo.get(way, {}), **final}
        rows[name]["extended"] = is_extended(final["extension"], floor["extension"])
    raw["extended"] = is_extended(raw["extension"], floor["extension"])
    return {**rows, "raw": raw, "noise_floor": floor, "hard_paste_picture": pasted}

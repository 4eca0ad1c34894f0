"""Is the product unchanged: its core, its edge, and its outline."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

from packshot.config.mask_models import reads_onnx
from packshot.config.schema import MatteConfig
from packshot.errors import PackshotError
from packshot.evaluate.samples import Sample
from packshot.generate.color import delta_e
from packshot.generate.composite import blend
from packshot.imaging.masks import find_mask
from packshot.imaging.matte import unmix
from packshot.imaging.outline import Segment, compare_size, is_extended, measure_extension, segment_near


def hard_mask(matte_HW: np.ndarray, working_size: tuple[int, int]) -> np.ndarray:
    """The mask binarised, resized to the working size (width, height) and back by nearest neighbour; bool (H, W)."""
    binary = np.where(matte_HW >= 128, np.uint8(255), np.uint8(0))
    small = cv2.resize(binary, working_size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(small, binary.shape[::-1], interpolation=cv2.INTER_NEAREST) > 0


def hard_paste(
    photo_HW3: np.ndarray, matte_HW: np.ndarray, background_HW3: np.ndarray, raw_HW3: np.ndarray
) -> np.ndarray:
    """The same layers pasted through a binarised, nearest-resized mask, without matting and un-mixing."""
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

    The run's own layers give the truth: the cut-out over the new background. A synthetic photo shows the same cut-out
    in front of a plain wall of the opposite colour. Both ways of compositing get this photo and the right alpha, and
    have to remove the wall. This measures un-mixing and pasting, and not whether the mask itself is right.
    """
    band = (sample.matte_HW > 0) & (sample.matte_HW < 255)
    if not band.any():
        return {}
    wall = np.empty_like(sample.foreground_HW3)
    wall[:] = 255 - sample.foreground_HW3[band].mean(axis=0)
    truth = blend(sample.foreground_HW3, sample.matte_HW, sample.background_HW3)
    photo = blend(sample.foreground_HW3, sample.matte_HW, wall)
    matted = blend(unmix(photo, sample.matte_HW), sample.matte_HW, sample.background_HW3)
    pasted = hard_paste(photo, sample.matte_HW, sample.background_HW3, sample.raw_HW3)
    return {
        "matted": halo_percentiles(delta_e(matted[band], truth[band])),
        "hard_paste": halo_percentiles(delta_e(pasted[band], truth[band])),
    }


def halo_percentiles(values: np.ndarray) -> dict[str, float]:
    """Median and 95th percentile of colour differences."""
    return {"edge_halo_p50": float(np.percentile(values, 50)), "edge_halo_p95": float(np.percentile(values, 95))}


def segmenter(matte: MatteConfig) -> Segment:
    """What finds the object in a picture near its known place: the network of ``matte.model``, else GrabCut.

    GrabCut can be seeded with the keep mask, which makes it better here than the family's network.
    """
    if not reads_onnx(matte.model):
        return segment_near
    certain = replace(matte, min_confidence=0.0)

    def network(image_HW3: np.ndarray, keep_HW: np.ndarray) -> np.ndarray:
        try:
            return find_mask(Image.fromarray(image_HW3), certain).alpha_HW >= 0.5
        except PackshotError:
            return np.zeros_like(keep_HW)  # an object that the network does not find is lost: L_obj is 1

    return network


def noise_floor(sample: Sample, segment: Segment) -> dict[str, float]:
    """The same measure where the truth is 0: the unedited photo, or, for a moved product, the product on plain grey."""
    if sample.certificate["transform"]["resampling"] == "none":
        plain = sample.photo_HW3
    else:
        grey = np.full_like(sample.foreground_HW3, 127)
        plain = blend(sample.foreground_HW3, sample.matte_HW, grey)
    return measure_extension(plain, sample.matte_HW, segment, compare_size(*sample.raw_HW3.shape[:2]))


@dataclass(frozen=True)
class Preservation:
    """All measures of one picture by name, for each system, and the picture that the hard paste made."""

    ours: dict[str, float]
    raw: dict[str, float]
    hard_paste: dict[str, float]
    noise_floor: dict[str, float]
    hard_paste_HW3: np.ndarray


def preservation(sample: Sample, segment: Segment) -> Preservation:
    """Measure one picture for the system (``ours``), its raw decode, and the hard paste of its layers."""
    size = compare_size(*sample.raw_HW3.shape[:2])
    floor = noise_floor(sample, segment)

    def outline(picture_HW3: np.ndarray) -> dict[str, float]:
        measured = measure_extension(picture_HW3, sample.matte_HW, segment, size)
        return {**measured, "extended": is_extended(measured["extension"], floor["extension"])}

    pasted = hard_paste(sample.photo_HW3, sample.matte_HW, sample.background_HW3, sample.raw_HW3)
    halo = edge_halo(sample)
    return Preservation(
        ours=core_identity(sample.picture_HW3, sample) | halo.get("matted", {}) | outline(sample.picture_HW3),
        raw=outline(sample.raw_HW3),
        hard_paste=core_identity(pasted, sample) | halo.get("hard_paste", {}) | outline(pasted),
        noise_floor=floor,
        hard_paste_HW3=pasted,
    )

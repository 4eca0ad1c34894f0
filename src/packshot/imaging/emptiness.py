"""How sure it is that a picture shows a product: judged by what the family's segmentation network takes for one.

The network was trained on pictures with a product, and finds something in empty ones too: plants, stones, a podium.
What it finds there is often paler, ragged or at the side. ``tools/fit_emptiness.py`` weighs these signs on renders.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib.resources import files

import cv2
import numpy as np
from PIL import Image

from packshot.config.mask_models import MINI
from packshot.imaging.color import to_lab

RASTER = 128  # px, the square on which shapes are measured
SIGNS = (
    "sure_share", "faint_share", "high_alpha", "main_share", "off_centre", "height_of_centre", "width", "height",
    "box_filled", "ragged", "cut_by_frame", "contrast", "inner_contrast", "edge", "mean_alpha", "top", "bottom",
    "symmetry",
)  # fmt: skip


def product_confidence(image: Image.Image) -> float:
    """In [0, 1]. image: RGB of any size."""
    from packshot.imaging.matting_network import load_matting, predict_alpha

    pixels_HWC = np.asarray(image)
    signs = signs_of(predict_alpha(load_matting(MINI), pixels_HWC), pixels_HWC)
    return 1 / (1 + math.exp(-score(signs)))


def score(signs: np.ndarray) -> float:
    """The logarithm of the odds of a product. signs: by :func:`signs_of`."""
    fitted = weights()
    scaled = (np.concatenate([signs, signs**2]) - fitted["mean"]) / fitted["scale"]
    return float(scaled @ fitted["weight"] + fitted["bias"][0])


@lru_cache(maxsize=1)
def weights() -> dict[str, np.ndarray]:
    """``emptiness.json``: mean, scale and weight of each sign and of its square, and the bias."""
    text = files("packshot.imaging").joinpath("emptiness.json").read_text()
    return {name: np.array(values) for name, values in json.loads(text).items()}


def signs_of(alpha_HW: np.ndarray, pixels_HWC: np.ndarray) -> np.ndarray:
    """(len(SIGNS),) figures of what a network sees. alpha: in [0, 1], of a square. pixels: uint8 RGB of any shape."""
    alpha_HW = cv2.resize(alpha_HW.astype(np.float32), (RASTER, RASTER), interpolation=cv2.INTER_AREA)
    way = cv2.INTER_AREA if pixels_HWC.shape[0] >= RASTER else cv2.INTER_LINEAR
    small_HWC = cv2.resize(pixels_HWC, (RASTER, RASTER), interpolation=way)
    whole = [
        math.log(float((alpha_HW > 0.9).mean()) + 1e-3),
        math.log(float((alpha_HW > 0.1).mean()) + 1e-3),
        float(np.quantile(alpha_HW, 0.95)),
    ]
    seen_HW = (alpha_HW > 0.5).astype(np.uint8)
    count, labels_HW, boxes, centres = cv2.connectedComponentsWithStats(seen_HW, connectivity=8)
    if count == 1:
        return np.array([*whole, *[0.0] * (len(SIGNS) - len(whole))])
    main = 1 + int(boxes[1:, cv2.CC_STAT_AREA].argmax())
    left, top, width, height, area = map(int, boxes[main])
    shape_HW = labels_HW == main
    place = [
        area / (int(seen_HW.sum()) + 1),
        abs(centres[main][0] - RASTER / 2) / (RASTER / 2),
        centres[main][1] / RASTER,
        width / RASTER,
        height / RASTER,
        area / (width * height),
    ]
    looks = looks_of(shape_HW, area, to_lab(small_HWC))
    columns_HW = shape_HW[:, left : left + width]
    symmetry = float((columns_HW & columns_HW[:, ::-1]).sum()) / area
    ends = [float(alpha_HW[shape_HW].mean()), top / RASTER, (top + height) / RASTER, symmetry]
    return np.array([*whole, *place, *looks, *ends])


def looks_of(shape_HW: np.ndarray, area: int, lab_HWC: np.ndarray) -> list[float]:
    """Outline and colours of a shape: ragged, cut_by_frame, contrast, inner_contrast, edge."""
    filled_HW = shape_HW.astype(np.uint8)
    outline_HW = cv2.morphologyEx(filled_HW, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    around_HW = cv2.dilate(filled_HW, np.ones((13, 13))) > cv2.dilate(filled_HW, np.ones((5, 5)))
    core_HW = cv2.erode(filled_HW, np.ones((3, 3))) > 0
    inside_NC = lab_HWC[core_HW if core_HW.any() else shape_HW]
    contrast = 0.0
    if around_HW.any():
        contrast = float(np.linalg.norm(inside_NC.mean(0) - lab_HWC[around_HW].mean(0)))
    light_HW = lab_HWC[..., 0]
    slope_HW = np.abs(cv2.Sobel(light_HW, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(light_HW, cv2.CV_32F, 0, 1))
    frame = [shape_HW[0], shape_HW[-1], shape_HW[:, 0], shape_HW[:, -1]]
    return [
        float(outline_HW.sum()) ** 2 / area / 100,
        float(np.sum([side.mean() for side in frame])),
        contrast / 50,
        float(inside_NC.std(0).mean()) / 20,
        float(slope_HW[outline_HW].mean()) / 50,
    ]

"""The shadow that a product throws: a layer to multiply a picture with, from the product's outline and the light alone.

A network of two small hidden layers looks at each pixel: where it lies to the product, and to the outline laid on the
ground by lights of several heights. ``tools/fit_shadows.py`` fits it on rendered shadows.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import cv2
import numpy as np

DARKEST = 0.05  # of the light that is left; logarithms of layers end there
AURA = 0.03  # logarithm that the fit takes away all around, being unsure; it is given back, no shadow looks like it
NEAR = 0.1  # of the product's size around its foot, within which less is given back: there the fit is sure
RASTER = 96  # px of the product's longer side in the raster on which a layer is computed; it has no finer detail
REACH = 0.6  # of the product's longer side: farther away there is no shadow
LENGTHS = (0.6, 1.2, 2.2)  # of a thrown shadow, in heights of what throws it: the sun stands at 59, 40 and 24 degrees
FORESHORTENING = 0.45  # of the ground: shadows to the front and to the back look this much shorter
FOOT = 0.12  # of the product's height: the part that stands on the ground
BASE = 0.06  # of the product's height: its width is that of what touches the ground
DEPTHS = (0.2, 0.4)  # of a base in the picture, in its widths: seen from low and from high, or a flat and a round thing
# Strength of a shadow that comes from no side. Where the fit knows no side, it leaves too much light near the foot, 4 %
# of all; at this power it leaves as much as the renders do (docs/log.md).
FROM_NO_SIDE = 1.5
TURNS = (20.0, 35.0)  # degrees by which a light "from the left" stands nearer to the camera than that
_HARSH = re.compile(r"\b(harsh|hard|strong|bright|direct|sun\w*|golden hour|spotlight)\b")


@dataclass(frozen=True)
class Light:
    """angle: degrees in the picture, 0 from the right, 90 from behind; None: from no side. harsh: a small source."""

    angle: float | None = None
    harsh: bool = False


@dataclass(frozen=True)
class Outline:
    """The box of a product's mask, px."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def size(self) -> float:
        """Geometric mean of height and width."""
        return math.sqrt(self.height * self.width)


def is_harsh(lighting: str | None) -> bool:
    """Whether a lighting phrase names a small source, whose shadows have edges."""
    return bool(_HARSH.search((lighting or "").lower()))


def outline_of(mask_HW: np.ndarray) -> Outline:
    """The box of a bool mask that is not empty."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    columns = np.flatnonzero(mask_HW.any(axis=0))
    return Outline(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def thrown(mask_HW: np.ndarray, outline: Outline, angle: float, length: float, lifted: float = 0.0) -> np.ndarray:
    """The outline as a light lays it on the ground, float32 (H, W) in [0, 1]. length: in heights of what throws it.

    lifted: px by which the ground that it stands on lies above its lowest row.
    """
    right = -math.cos(math.radians(angle)) * length
    up = -math.sin(math.radians(angle)) * length * FORESHORTENING
    # a light that stands exactly at the side would lay the outline on a line
    up = math.copysign(max(abs(up), 0.04), up)
    # what stands h above the foot goes to h * right beside it, and to h * up above it
    ground = outline.bottom - lifted
    matrix = np.array([[1, -right, right * ground], [0, up, ground * (1 - up)]], np.float32)
    size = (mask_HW.shape[1], mask_HW.shape[0])
    laid = cv2.warpAffine(mask_HW.astype(np.float32), matrix, size)
    return cv2.GaussianBlur(laid, (0, 0), max(0.5, 0.02 * outline.size))


def towards_camera(angle: float, turn: float) -> float:
    """A light's angle, turned nearer to the camera if it stands at a side."""
    side = math.cos(math.radians(angle))
    return angle if abs(side) < 0.5 else angle - math.copysign(turn, side)


def base_planes(mask_HW: np.ndarray, outline: Outline, light: Light) -> list[np.ndarray]:
    """What a base of some depth adds to :func:`features`: its ellipse on the ground, shadows thrown from its middle.

    A cup's lowest row is the front of its base, and its shadow begins behind that.
    """
    rows, columns = np.indices(mask_HW.shape, np.float32)
    lowest = mask_HW[outline.bottom - max(1, round(BASE * outline.height)) : outline.bottom]
    touching = np.flatnonzero(lowest.any(axis=0))
    width = int(touching[-1]) + 1 - int(touching[0])
    middle = int(touching[0]) + width / 2
    known = light.angle is not None
    angle = towards_camera(light.angle if light.angle is not None else 270.0, TURNS[0])
    planes = [np.full_like(rows, width / max(1, outline.width))]
    for depth in DEPTHS:
        radius = max(1.0, depth * width / 2)
        across = (columns + 0.5 - middle) / max(1.0, width / 2)
        away = (rows + 0.5 - outline.bottom + radius) / radius
        distance = np.maximum(np.sqrt(across**2 + away**2) - 1, 0) * radius / outline.size
        planes += [np.exp(-distance / 0.03), np.exp(-distance / 0.1)]
        for length in LENGTHS:
            laid = thrown(mask_HW, outline, angle, length, round(depth * width / 2)) * known
            planes += [laid, laid * light.harsh]
    return planes


def foot_of(mask_HW: np.ndarray, outline: Outline) -> np.ndarray:
    """The lowest part of a bool mask."""
    foot_HW = mask_HW.copy()
    foot_HW[: outline.bottom - max(1, round(FOOT * outline.height))] = False
    return foot_HW


def distance_to(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels from a bool mask, 0 inside; float32 (H, W)."""
    return cv2.distanceTransform((~mask_HW).astype(np.uint8), cv2.DIST_L2, 5)


def features(mask_HW: np.ndarray, light: Light) -> np.ndarray:
    """What the network sees of each pixel: float32 (H, W, F). mask_HW: bool."""
    outline = outline_of(mask_HW)
    rows, columns = np.indices(mask_HW.shape, np.float32)
    x = (columns + 0.5 - (outline.left + outline.right) / 2) / outline.size
    y = (rows + 0.5 - outline.bottom) / outline.size
    foot_HW = foot_of(mask_HW, outline)
    planes = [x, np.abs(x), y, np.full_like(x, outline.width / outline.height)]
    for part in (mask_HW, foot_HW):
        distance = distance_to(part) / outline.size
        planes += [distance, np.exp(-distance / 0.04), np.exp(-distance / 0.15)]
    for blur in (0.05, 0.15, 0.4):
        planes.append(cv2.GaussianBlur(foot_HW.astype(np.float32), (0, 0), max(0.5, blur * outline.size)))
    known = light.angle is not None
    angle = light.angle if light.angle is not None else 270.0
    for turn in TURNS:
        for length in LENGTHS:
            laid = thrown(mask_HW, outline, towards_camera(angle, turn), length) * known
            planes += [laid, laid * light.harsh]
    side = math.cos(math.radians(angle)) * known
    depth = math.sin(math.radians(angle)) * known
    for value in (known, light.harsh, side, depth):
        planes.append(np.full_like(x, float(value)))
    planes.append(x * side)
    planes += base_planes(mask_HW, outline, light)
    return np.stack(planes, axis=-1).astype(np.float32)


@lru_cache
def weights() -> list[np.ndarray]:
    """The fitted network: mean and spread of the features, then a matrix and an offset for each layer."""
    text = (files("packshot.imaging") / "shadows.json").read_text(encoding="utf-8")
    return [np.array(values, np.float32) for values in json.loads(text)["weights"]]


def predict(features_NF: np.ndarray) -> np.ndarray:
    """Logarithm of the light that is left, float32 (N,), at most 0."""
    mean, spread, *layers = weights()
    x = (features_NF - mean) / spread
    for matrix, offset in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        x = np.maximum(x @ matrix + offset, 0)
    out = (x @ layers[-2] + layers[-1])[:, 0]
    return -np.logaddexp(0, out)  # softplus: a shadow takes light away


def log_layer(mask_HW: np.ndarray, light: Light) -> np.ndarray:
    """Logarithm of the layer around a mask, float32 (H, W); 0 beyond its reach. mask_HW: bool."""
    outline = outline_of(mask_HW)
    distance = distance_to(mask_HW)
    share = np.clip(distance / (REACH * max(outline.height, outline.width)), 0, 1)
    fade = np.clip(1 - share**3 * (10 - 15 * share + 6 * share**2), 0, 1)
    seen = features(mask_HW, light)
    values = predict(seen.reshape(-1, seen.shape[-1])).reshape(mask_HW.shape)
    unsure = np.clip(distance_to(foot_of(mask_HW, outline)) / (NEAR * outline.size), 0, 1)
    return np.clip(values + AURA * unsure, math.log(DARKEST), 0) * fade


def reach_of(outline: Outline) -> int:
    """Pixels around a product's box that its shadow may darken."""
    return round(REACH * max(outline.height, outline.width)) + 1


def shadow_layer(matte_HW: np.ndarray, light: Light, strength: float = 1.0) -> np.ndarray:
    """The light that a product leaves, uint8 (H, W), 255 where it takes none away; a picture is multiplied by it.

    matte_HW: the product's alpha, uint8. strength: power of the layer. Beneath the product the layer goes on, so that
    no bright line shows at its edge. All 255 where the mask is empty.
    """
    mask = matte_HW >= 128
    if not mask.any():
        return np.full_like(matte_HW, 255)
    outline = outline_of(mask)
    height, width = mask.shape
    scale = min(1.0, RASTER / max(outline.height, outline.width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(matte_HW, size, interpolation=cv2.INTER_AREA) >= 128
    if not small.any():
        return np.full_like(matte_HW, 255)
    logarithm = cv2.resize(log_layer(small, light), (width, height), interpolation=cv2.INTER_CUBIC)
    power = strength * (FROM_NO_SIDE if light.angle is None else 1.0)
    return np.rint(np.exp(np.clip(power * logarithm, math.log(DARKEST), 0)) * 255).astype(np.uint8)


def ground_darkening(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> float | None:
    """Share of its light that the ground around a product's foot has lost just at the foot; below 0 if it is brighter.

    picture_HW3: uint8; what it shows where the matte is not 0 does not count. None where the product or the frame
    leaves no ground to compare.
    """
    mask = matte_HW >= 128
    if not mask.any():
        return None
    outline = outline_of(mask)
    scale = min(1.0, RASTER / max(outline.height, outline.width))
    size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
    small = cv2.resize(matte_HW, size, interpolation=cv2.INTER_AREA)
    light = cv2.cvtColor(cv2.resize(picture_HW3, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    foot = small >= 128
    if not foot.any():
        return None
    outline = outline_of(foot)
    foot[: outline.bottom - max(1, round(FOOT * outline.height))] = False
    distance = cv2.distanceTransform((~foot).astype(np.uint8), cv2.DIST_L2, 5) / outline.size
    floor = small == 0
    floor[: outline.bottom - max(1, round(FOOT * outline.height))] = False
    near = light[floor & (distance <= 0.08)]
    around = light[floor & (distance >= 0.25) & (distance <= 0.5)]
    if min(near.size, around.size) < 8:
        return None
    return 1 - (float(np.median(near)) + 4) / (float(np.median(around)) + 4)

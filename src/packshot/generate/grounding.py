"""The product's shadow on its new ground: whether the drawn picture has one, and the layer that adds it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

from packshot.config.schema import GenerateSettings, Shadow
from packshot.generate.canvas import Canvas
from packshot.generate.json_types import Json
from packshot.imaging.matte import covered_box
from packshot.imaging.shadows import Light, ground_darkening, is_harsh, outline_of, reach_of, shadow_layer
from packshot.scene.light import light_angle

# Share of the light around that a shadow takes away just below the product. Of the rendered training scenes this value
# tells most plates from the pictures with the product in them (tools/fit_shadows.py).
DARKENED = 0.03
SPECK = 0.01  # of the largest thing's pixels: what is smaller does not count as a thing of its own


@dataclass(frozen=True)
class Grounding:
    """layer_HW: uint8, what the background is multiplied by, 255 where it stays; None: nothing was added.

    report: for the certificate.
    """

    layer_HW: np.ndarray | None
    report: Json


NO_SHADOW = Grounding(None, {"asked": "none", "applied": False})


def light_of(asked: Json, settings: GenerateSettings) -> Light:
    """The light that a request names. asked: as certificates state it."""
    lighting = asked["scene"].get("lighting")
    given = getattr(settings, "light_angle", None)
    return Light(light_angle(lighting) if given is None else given, is_harsh(lighting))


def ground(canvas: Canvas, background_HW3: np.ndarray, settings: GenerateSettings, light: Light) -> Grounding:
    """What ``shadow`` asks for. background_HW3: uint8, as it was drawn."""
    if settings.shadow is Shadow.none:
        return NO_SHADOW
    darkening = ground_darkening(background_HW3, canvas.matte_HW)
    report: Json = {
        "asked": settings.shadow.name,
        "applied": True,
        "darkening": None if darkening is None else round(darkening, 4),
        "threshold": DARKENED,
        "light_angle": light.angle,
        "harsh": light.harsh,
        "strength": settings.shadow_strength,
    }
    if settings.shadow is Shadow.auto and (darkening is None or darkening >= DARKENED):
        report["applied"] = False
        report["reason"] = "no ground in sight" if darkening is None else "the drawn ground is dark below the product"
        return Grounding(None, report)
    return Grounding(layer_around(canvas.matte_HW, light, settings.shadow_strength), report)


def standing_things(matte_HW: np.ndarray) -> list[np.ndarray]:
    """The matte of each thing that stands apart: of the products of a group, between which columns are empty.

    What is smaller than ``SPECK`` of the largest is left out.
    """
    covered = np.concatenate([[False], (matte_HW >= 128).any(axis=0), [False]])
    edges = np.flatnonzero(np.diff(covered))
    middles = (edges[1:-1:2] + edges[2:-1:2]) // 2  # of the gaps
    things = []
    for start, stop in itertools.pairwise([0, *middles.tolist(), matte_HW.shape[1]]):
        alone = np.zeros_like(matte_HW)
        alone[:, start:stop] = matte_HW[:, start:stop]
        things.append(alone)
    sizes = [cv2.countNonZero(thing) for thing in things]
    return [thing for thing, size in zip(things, sizes, strict=True) if size and size >= SPECK * max(sizes)]


def layer_around(matte_HW: np.ndarray, light: Light, strength: float = 1.0) -> np.ndarray:
    """:func:`shadow_layer` of each thing, only as far as its shadow reaches: most of a large picture has none."""
    layer = np.full_like(matte_HW, 255)
    for thing in standing_things(matte_HW):
        solid = thing >= 128
        if not solid.any():
            continue
        outline = outline_of(solid)
        reach = reach_of(outline)
        rows = slice(max(0, outline.top - reach), outline.bottom + reach)
        columns = slice(max(0, outline.left - reach), outline.right + reach)
        layer[rows, columns] = times(layer[rows, columns], shadow_layer(thing[rows, columns], light, strength))
    return layer


def times(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``round(first * second / 255)``; all uint8."""
    return ((first.astype(np.uint16) * second + 127) // 255).astype(np.uint8)


def shaded(background_HW3: np.ndarray, layer_HW: np.ndarray | None) -> np.ndarray:
    """``round(background * layer / 255)``, uint8; the background itself without a layer."""
    if layer_HW is None:
        return background_HW3
    box = covered_box(~layer_HW)  # elsewhere the layer is 255
    result = background_HW3.copy()
    result[box] = times(background_HW3[box], layer_HW[box][..., None])
    return result

"""What is behind the product: one builder for each phrase of the vocabulary's BACKGROUNDS."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import partial

import bpy
import numpy as np

from packshot.render import materials
from packshot.render.frame import BACKDROP_Y, WALL_Y, Job
from packshot.render.materials import Color
from packshot.render.mesh import add_mesh, cuboid, grid_faces, loft, plane
from packshot.scene.vocabulary import BACKDROPS, SWEEPS

_PAINTS: dict[str, Color] = {
    "a white wall": (0.85, 0.85, 0.84),
    "a beige wall": (0.72, 0.57, 0.41),
    "a pink wall": (0.86, 0.36, 0.42),
    "a blue wall": (0.1, 0.27, 0.58),
    "a green wall": (0.17, 0.34, 0.19),
    "a grey wall": (0.3, 0.3, 0.3),
    "a yellow wall": (0.92, 0.55, 0.06),
    "a dark wall": (0.009, 0.009, 0.011),
}
STUDIO_PAINTS: tuple[Color, ...] = (  # of the vocabulary's STUDIO_COLORS
    (0.92, 0.92, 0.91),
    (0.34, 0.34, 0.34),
    (0.012, 0.012, 0.013),
    (0.74, 0.6, 0.45),
    (0.86, 0.44, 0.5),
    (0.16, 0.36, 0.66),
    (0.24, 0.42, 0.27),
    (0.92, 0.6, 0.1),
)
_PAINTS |= dict(zip(BACKDROPS, STUDIO_PAINTS, strict=True))
_GRADIENTS: dict[str, tuple[Color, Color]] = {  # at the table, at the top of the frame
    "a pink and orange gradient": ((0.95, 0.42, 0.12), (0.85, 0.2, 0.42)),
    "a blue and white gradient": ((0.86, 0.9, 0.93), (0.08, 0.3, 0.72)),
}
_WALL_MATERIALS: dict[str, Callable[[], bpy.types.Material]] = {
    "a concrete wall": materials.concrete,
    "a brick wall": materials.bricks,
    "a wooden panel wall": lambda: materials.wood((0.36, 0.17, 0.075), (0.26, 0.11, 0.045), vertical=True, plank=0.4),
    "a white tiled wall": lambda: materials.tiles((0.82, 0.83, 0.82), (0.3, 0.3, 0.3), 0.42),
    "a white panelled wall": lambda: materials.painted("panelling", (0.84, 0.83, 0.81), 0.02, 0.6),
    "a window": lambda: materials.painted("paint", (0.8, 0.75, 0.68), 0.03),
}
for _phrase, _color in _PAINTS.items():
    _WALL_MATERIALS[_phrase] = partial(materials.painted, "paint", _color, 0.04)
for _phrase, _pair in _GRADIENTS.items():  # the wall's own height axis starts at its middle, 4 above the table
    _WALL_MATERIALS[_phrase] = partial(materials.gradient, *_pair, -4.0, -1.2)


def has_wall(background: str | None) -> bool:
    """Whether the surface can run up to a wall; else it ends in an edge before a far backdrop."""
    return background in _WALL_MATERIALS


def floor_below(background: str | None) -> bpy.types.Material:
    """The floor of a podium that stands on no named table: what goes with the background."""
    if background is None:
        return materials.painted("floor", (0.66, 0.62, 0.56), 0.03)
    if background in _PAINTS:
        return _WALL_MATERIALS[background]()
    if background in _GRADIENTS:
        return materials.painted("floor", _GRADIENTS[background][0], 0.03)
    return _FLOORS[background]()


_FLOORS: dict[str, Callable[[], bpy.types.Material]] = {
    "a concrete wall": materials.concrete,
    "a brick wall": materials.concrete,
    "a wooden panel wall": lambda: materials.painted("floor", (0.62, 0.52, 0.4)),
    "a white tiled wall": lambda: materials.painted("floor", (0.66, 0.67, 0.66)),
    "a white panelled wall": lambda: materials.wood((0.5, 0.33, 0.18), (0.42, 0.26, 0.13)),
    "a window": lambda: materials.wood((0.6, 0.42, 0.25), (0.5, 0.33, 0.18)),
    "a blue sky": lambda: materials.painted("floor", (0.72, 0.68, 0.6)),
    "mountains": lambda: materials.stone((0.36, 0.34, 0.31)),
    "a forest": lambda: materials.stone((0.3, 0.25, 0.18)),
    "bokeh lights": lambda: materials.plain("floor", (0.03, 0.028, 0.03), 0.25),
}


def _flat_wall(job: Job) -> None:
    material = _WALL_MATERIALS[job["scene"]["background"]]()
    plane("wall", 9, 6, material, (0, WALL_Y, 4), (math.pi / 2, 0, 0))


def _strip(size: tuple[float, float], center: tuple[float, float], material, thick=0.05) -> None:
    """A moulding on the wall: (width, height) around (x, z)."""
    part = cuboid("strip", (size[0], thick, size[1]), material, 0.012)
    part.location = (center[0], WALL_Y - thick / 2, center[1] - size[1] / 2)


def _frame(left: float, right: float, low: float, high: float, width: float, material) -> None:
    middle = (left + right) / 2
    for z in (low, high):
        _strip((right - left + width, width), (middle, z), material)
    for x in (left, right):
        _strip((width, high - low), (x, (low + high) / 2), material)


def _panelling(job: Job) -> None:
    _flat_wall(job)
    material = _WALL_MATERIALS["a white panelled wall"]()
    shift = random.Random(f"packshot-panels-{job['seed']}").uniform(0, 1.5)
    _strip((16, 0.09), (0, 0.95), material, 0.07)
    for k in range(-4, 4):
        left = 1.5 * k + shift + 0.15
        _frame(left, left + 1.2, 0.22, 0.72, 0.045, material)
        _frame(left, left + 1.2, 1.25, 4.2, 0.045, material)


def _window(job: Job) -> None:
    """A wall with an opening, mullions in it, and a garden out of focus behind."""
    rng = random.Random(f"packshot-window-{job['seed']}")
    wall = _WALL_MATERIALS["a window"]()
    white = materials.plain("sash", (0.85, 0.85, 0.83), 0.4)
    middle = rng.uniform(-0.5, 0.5)
    half = rng.uniform(1.0, 1.35)
    low = rng.uniform(0.55, 0.85)
    high = 3.6
    left = middle - half
    right = middle + half
    for start, stop, bottom, top in (
        (-9, left, -2, 10),
        (right, 9, -2, 10),
        (left, right, -2, low),
        (left, right, high, 10),
    ):
        corners = [(start, WALL_Y, bottom), (stop, WALL_Y, bottom), (stop, WALL_Y, top), (start, WALL_Y, top)]
        add_mesh("wall", corners, [(0, 1, 2, 3)], wall, smooth=None)
    _frame(left, right, low, high, 0.12, white)
    _strip((0.08, high - low), (middle, (low + high) / 2), white)
    _strip((2 * half, 0.06), (middle, low + 1.15), white)
    sill = cuboid("sill", (2 * half + 0.3, 0.22, 0.07), white, 0.02)
    sill.location = (middle, WALL_Y - 0.08, low - 0.1)
    horizon = _tones(job["scene"]["lighting"])[0]
    garden = _backdrop(materials.garden(materials.tinted(horizon, 0.7, 0.35), 1.2))
    garden.location.x = rng.uniform(-4, 4)


def _backdrop(material: bpy.types.Material, y=BACKDROP_Y) -> bpy.types.Object:
    """Emissive plane far behind the table: seen by camera, glass and gloss, but it neither lights nor shades."""
    obj = plane("backdrop", 14, 9, material, (0, y, 0), (math.pi / 2, 0, 0))
    obj.visible_diffuse = obj.visible_shadow = False
    return obj


def _tones(lighting: str) -> tuple[Color, Color, Color]:
    """Horizon, zenith and cloud colour of the sky at this light."""
    if lighting == "golden hour light":
        return (1.0, 0.45, 0.16), (0.28, 0.32, 0.55), (1.0, 0.62, 0.38)
    return (0.55, 0.75, 0.95), (0.06, 0.22, 0.68), (0.95, 0.96, 0.98)


def _blue_sky(job: Job) -> None:
    horizon, zenith, cloud = _tones(job["scene"]["lighting"])
    if job["scene"]["lighting"] == "golden hour light":  # it stays a blue sky: only the horizon burns
        zenith = (0.07, 0.2, 0.58)
    _backdrop(materials.sky(horizon, zenith, cloud))


def _ridge(rng: random.Random, base: float, amplitude: float, steps=160) -> np.ndarray:
    x = np.linspace(0, 1, steps)
    total = np.zeros(steps)
    for octave in range(6):
        frequency = 2.2 * 1.9**octave
        total += np.abs(np.sin(x * frequency * math.pi + rng.uniform(0, 6.28))) / 1.75**octave
    return base + amplitude * (total - total.min()) / (total.max() - total.min())


def _add_layer(name: str, points, faces, tone: Color, layer: int) -> None:
    """A flat silhouette before the backdrop; higher layers stand nearer."""
    obj = add_mesh(name, points, faces, materials.glow(name, tone, 0.75), smooth=None)
    obj.location = (0, BACKDROP_Y - 0.2 - 0.3 * layer, 0)
    obj.visible_diffuse = obj.visible_shadow = False


def _mountains(job: Job) -> None:
    rng = random.Random(f"packshot-mountains-{job['seed']}")
    horizon, zenith, cloud = _tones(job["scene"]["lighting"])
    _backdrop(materials.sky(horizon, zenith, cloud))
    far = np.array(horizon) * 0.62
    near = np.array((0.035, 0.055, 0.06))
    for layer in range(4):
        t = layer / 3
        heights = _ridge(rng, 0.3 - 0.65 * t, 1.5 - 0.7 * t)
        count = len(heights)
        x = np.linspace(-8, 8, count)
        zero = np.zeros(count)
        points = np.concatenate([np.stack([x, zero, heights], 1), np.stack([x, zero, zero - 6], 1)])
        _add_layer("ridge", points, grid_faces(2, count), (far * (1 - t) + near * t).tolist(), layer)


def _conifer(x: float, foot: float, height: float, rng: random.Random) -> list[tuple[float, float, float]]:
    """Corners of the triangles of one spruce in the xz plane, overlapping tiers from the foot up."""
    tiers = 6
    width = height * rng.uniform(0.16, 0.22)
    corners = []
    for k in range(tiers):
        low = foot + height * (0.1 + 0.14 * k)
        reach = width * (1 - k / (tiers + 0.8)) * rng.uniform(0.85, 1.15)
        corners += [(x - reach, 0, low), (x + reach, 0, low), (x, 0, low + height * 0.27)]
    trunk = 0.03 * height
    corners += [(x - trunk, 0, foot - 8), (x + trunk, 0, foot - 8), (x, 0, foot + height * 0.5)]
    return corners


def _forest(job: Job) -> None:
    """Rows of spruces in fog, pale far away and dark in front."""
    rng = random.Random(f"packshot-forest-{job['seed']}")
    horizon, _, _ = _tones(job["scene"]["lighting"])
    mist = np.array(horizon) * 0.5 + np.array((0.4, 0.42, 0.38)) * 0.5
    _backdrop(materials.sky(mist.tolist(), (mist * 0.9).tolist(), None))
    near = np.array((0.012, 0.04, 0.022))
    for layer in range(4):
        t = layer / 3
        corners = []
        for k in range(34):
            x = -8.5 + 0.5 * k + rng.uniform(-0.2, 0.2)
            corners += _conifer(x, -0.9 - 0.5 * t, rng.uniform(1.9, 3.2) * (1.15 - 0.35 * t), rng)
        ground = [(-9, 0, -0.7 - 0.5 * t), (9, 0, -0.7 - 0.5 * t), (9, 0, -8), (-9, 0, -8)]
        count = len(corners)
        faces = [*np.arange(count).reshape(-1, 3), range(count, count + 4)]
        share = 0.3 + 0.7 * t
        _add_layer("spruces", corners + ground, faces, (mist * (1 - share) + near * share).tolist(), layer)


def _bokeh(job: Job) -> None:
    rng = random.Random(f"packshot-bokeh-{job['seed']}")
    _backdrop(materials.sky((0.05, 0.025, 0.02), (0.012, 0.012, 0.03), None))
    tones = ((1.0, 0.52, 0.16), (1.0, 0.72, 0.36), (1.0, 0.35, 0.18), (0.35, 0.55, 1.0), (1.0, 0.42, 0.6))
    palette = rng.sample(tones, 3)
    lit = []
    for color, strength in itertools.product(palette, (0.5, 1.1, 2.2)):
        lit.append(materials.glow("bokeh", color, strength))
    for k in range(70):
        radius = rng.uniform(0.1, 0.34)
        disc = loft("bokeh", [(radius, 0.0), (radius, 0.001)], rng.choice(lit), steps=24)
        disc.location = (rng.uniform(-4.5, 4.5), BACKDROP_Y - 0.3 - 0.01 * k, rng.uniform(-2.2, 4.2))
        disc.rotation_euler = (math.pi / 2, 0, 0)
        disc.visible_diffuse = disc.visible_shadow = False


BUILDERS: dict[str, Callable[[Job], None]] = {
    **dict.fromkeys(_WALL_MATERIALS, _flat_wall),
    "a white panelled wall": _panelling,
    "a window": _window,
    "a blue sky": _blue_sky,
    "mountains": _mountains,
    "a forest": _forest,
    "bokeh lights": _bokeh,
}


def build_background(job: Job) -> None:
    """Build what the job's scene has in the background: nothing if the camera does not see it, or the surface is it."""
    if job["scene"]["background"] is None or job["scene"]["surface"] in SWEEPS:
        return
    BUILDERS[job["scene"]["background"]](job)

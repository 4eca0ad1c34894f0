"""What the product stands on: one builder for each phrase of the vocabulary's SURFACES."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import bpy
import numpy as np

from packshot.render import materials
from packshot.render.backgrounds import STUDIO_PAINTS, floor_below, has_wall
from packshot.render.frame import WALL_Y, Job, reach_of
from packshot.render.mesh import (
    add_mesh,
    arc,
    bumps,
    cuboid,
    grid_faces,
    link_copy,
    pebble,
    pillar,
    relief,
    sphere_points,
)
from packshot.scene.vocabulary import ON, SWEEPS

OPEN_BACK = 8.0  # y where the ground ends if nothing is behind it: the camera looks down


@dataclass(frozen=True)
class Ground:
    """Where things stand: z under the product, radius kept free around it, z of the floor at (x, y)."""

    product_z: float
    clear: float
    floor_z: Callable[[float, float], float] = lambda x, y: 0.0


TABLES: dict[str, Callable[[], bpy.types.Material]] = {
    "a white marble table": materials.marble,
    "a green marble table": lambda: materials.marble((0.03, 0.11, 0.07), (0.5, 0.58, 0.5), (0.015, 0.05, 0.035)),
    "a grey concrete table": materials.concrete,
    "a light wooden table": lambda: materials.wood((0.72, 0.5, 0.29), (0.6, 0.39, 0.21)),
    "a dark wooden table": lambda: materials.wood((0.17, 0.075, 0.033), (0.11, 0.045, 0.02)),
    "a black glossy table": lambda: materials.plain("black_gloss", (0.008, 0.008, 0.01), 0.06, Coat_Weight=0.5),
    "a white tiled counter": lambda: materials.tiles((0.82, 0.83, 0.82), (0.28, 0.28, 0.28), 0.3),
}

PODIUMS: dict[str, Callable[[], bpy.types.Material]] = {
    "a beige stone podium": lambda: materials.stone((0.62, 0.47, 0.31)),
    "a white podium": lambda: materials.painted("white", (0.86, 0.86, 0.85), 0.02),
    "a pink podium": lambda: materials.painted("pink", (0.86, 0.3, 0.38), 0.03),
    "a green podium": lambda: materials.painted("green", (0.1, 0.33, 0.16), 0.03),
    "a black podium": lambda: materials.plain("black", (0.012, 0.012, 0.014), 0.35, Coat_Weight=0.3),
    "a concrete podium": materials.concrete,
    "a wooden podium": lambda: materials.mottled(
        "podium_wood", [(0.3, (0.4, 0.21, 0.09)), (0.7, (0.64, 0.4, 0.2))], 3.2, 0.5, stretch=(6, 6, 0.35)
    ),
}


def _table(material: bpy.types.Material, background: str | None) -> None:
    """Up to the wall, or ending in an edge in front of a far backdrop."""
    back = OPEN_BACK if background is None else WALL_Y if has_wall(background) else 1.7
    top = cuboid("table", (16, back + 12, 0.3), material, 0.01)
    top.location = (0, back - (back + 12) / 2, -0.3)


def _sweep(color: int, rng: random.Random, reach: float) -> Ground:
    """Paper, or a glossy board, that bends up from the floor behind the product."""
    paint = STUDIO_PAINTS[color]
    gloss = rng.random() < 0.25
    material = materials.plain("sweep", paint, 0.12) if gloss else materials.painted("sweep", paint, 0.015, 0.7)
    start = max(0.9, reach + 0.2) + rng.uniform(0, 0.8)
    bend = rng.uniform(0.4, 1.6)
    line = [(-10.0, 0.0), *arc(start, bend, bend, -90, 0, 16), (start + bend, 10.0)]
    points = [(x, y, z) for y, z in line for x in (-10.0, 10.0)]
    add_mesh("sweep", points, grid_faces(len(line), 2), material, smooth=180.0)
    return Ground(0.0, reach * 1.1)


def _podium(material: bpy.types.Material, job: Job, reach: float) -> Ground:
    """As wide as what stands on it needs: `reach` is the product's radius on the ground."""
    height = job["podium"]["height"]
    radius = max(0.62, reach * 1.12 + 0.08)
    if job["podium"]["shape"] == "square":
        pillar("podium", radius, height, material, 0.03, power=24)
    else:
        pillar("podium", radius, height, material, 0.04)
    return Ground(height, radius)


def _fade(x, y, inner, outer):
    """0 within `inner` of the origin, 1 beyond `outer`: keeps the ground flat under the product."""
    t = np.clip((np.hypot(x, y) - inner) / (outer - inner), 0, 1)
    return t * t * (3 - 2 * t)


def _ground(name: str, material, height: Callable, sink: float, reach: float, back: float, steps=200) -> Ground:
    """A relief up to the wall in which the product sinks by `sink`."""
    relief(name, (-5, 5), (-6, back), height, material, steps)
    return Ground(-sink, reach * 1.1, lambda x, y: float(height(np.array(x), np.array(y))))


def _sand(rng: random.Random, reach: float, back: float) -> Ground:
    phase = rng.uniform(0, 6)
    turn = rng.uniform(-0.5, 0.5)

    def height(x, y):
        across = x * math.sin(turn) + y * math.cos(turn) + 0.14 * np.sin(1.7 * x + phase) + 0.05 * np.sin(4.1 * x)
        dunes = 0.16 * np.sin(0.9 * x + phase) * np.sin(1.1 * y + phase)
        return (dunes * 0.5 + 0.035 * np.sin(across * 13)) * _fade(x, y, reach, reach + 0.8)

    return _ground("sand", materials.sand(), height, 0.015, reach, back)


def _snow(rng: random.Random, reach: float, back: float) -> Ground:
    waves = [(rng.gauss(0, 2.2), rng.gauss(0, 2.2), rng.uniform(0, 6.28)) for _ in range(9)]

    def height(x, y):
        drifts = sum(np.sin(a * x + b * y + c) for a, b, c in waves)
        crust = sum(np.sin(5 * a * x + 5 * b * y + 2 * c) for a, b, c in waves)
        return (0.075 * drifts + 0.006 * crust) * _fade(x, y, reach, reach + 0.5)

    return _ground("snow", materials.snow(), height, 0.03, reach, back)


def _water(rng: random.Random, reach: float, back: float) -> Ground:
    """Rings around the product over a light cross swell."""
    phase = rng.uniform(0, 6)
    turn = rng.uniform(-0.6, 0.6)

    def height(x, y):
        distance = np.hypot(x, y) - reach
        rings = 0.02 * np.sin(9 * distance + phase) * np.exp(-0.5 * np.clip(distance, 0, None))
        along = x * math.sin(turn) + y * math.cos(turn)
        return (rings + 0.01 * np.sin(6 * along + np.sin(2.2 * x + phase))) * _fade(x, y, reach * 0.8, reach + 0.2)

    return _ground("water", materials.water(), height, 0.02, reach, back, 260)


def _folds(rng: random.Random, depth: float, sharpness: float, reach: float) -> Callable:
    waves = [(rng.gauss(0, 2.6), rng.gauss(0, 1.6), rng.uniform(0, 6.28)) for _ in range(6)]

    def height(x, y):
        total = sum(np.sin(a * x + b * y + c + 0.5 * np.sin(1.3 * y + c)) for a, b, c in waves)
        return depth * (1 - np.abs(np.tanh(total * sharpness))) * _fade(x, y, reach, reach + 0.5)

    return height


def _linen(rng: random.Random, reach: float, back: float) -> Ground:
    return _ground("linen", materials.linen(), _folds(rng, 0.11, 0.5, reach), 0.0, reach, back)


def _silk(rng: random.Random, reach: float, back: float) -> Ground:
    tones = ((0.62, 0.4, 0.22), (0.55, 0.09, 0.13), (0.72, 0.62, 0.52), (0.08, 0.16, 0.34), (0.6, 0.3, 0.34))
    height = _folds(rng, 0.26, 0.32, reach)
    return _ground("silk", materials.silk(rng.choice(tones)), height, 0.0, reach, back, 260)


def _pebbles(rng: random.Random, reach: float, back: float) -> Ground:
    """A bed of copies of a few stones; those under the product lie lower, so that it stands on them."""
    tones = ((0.8, 0.79, 0.76), (0.7, 0.68, 0.64), (0.84, 0.83, 0.81))
    stones = []
    for tone in tones:
        for _ in range(2):
            stops = [(0.3, materials.tinted(tone, 0.85)), (0.7, tone)]
            material = materials.mottled("pebble", stops, 10, 0.55, bump=0.1)
            radius = rng.uniform(0.1, 0.14)
            stones.append(pebble("pebble", (radius, radius * rng.uniform(0.7, 0.9), radius * 0.55), rng, material))
    relief("gravel", (-5, 5), (-6, back), lambda x, y: 0 * x - 0.02, materials.stone((0.5, 0.48, 0.45)), 2)
    for x in np.arange(-2.3, 2.3, 0.165):
        for y in np.arange(-2.2, WALL_Y - 0.05, 0.165):
            place = (x + rng.uniform(-0.05, 0.05), y + rng.uniform(-0.05, 0.05))
            lower = 0.06 if math.hypot(*place) < reach + 0.08 else rng.uniform(0.0, 0.05)
            copy = link_copy(rng.choice(stones))
            copy.location = (*place, 0.02 - lower)
            copy.rotation_euler = (rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0, 6.28))
    for stone in stones:
        bpy.data.objects.remove(stone)
    return Ground(0.07, reach * 1.05, lambda x, y: 0.1)


def _moss(rng: random.Random, reach: float, back: float) -> Ground:
    points, faces = sphere_points(72, 108)
    radius = max(0.95, reach * 1.5)
    top = 0.36
    rough = 0.09 * bumps(points, rng, 8, 1.6) + 0.035 * bumps(points, rng, 12, 7)
    points = points * (1 + rough)[:, None] * np.array([radius * 1.2, radius, 0.52])
    # Flatten the top softly so that a product can stand on it.
    over = points[:, 2] > top
    points[over, 2] = top + 0.04 * np.tanh((points[over, 2] - top) / 0.3)
    add_mesh("moss_stone", points, faces, materials.moss(), smooth=180.0)
    return Ground(top + 0.012, radius * 1.02)


GROUNDS: dict[str, Callable[[random.Random, float, float], Ground]] = {
    "a bed of sand": _sand,
    "a bed of white pebbles": _pebbles,
    "a moss-covered stone": _moss,
    "a linen tablecloth": _linen,
    "a draped silk cloth": _silk,
    "rippled water": _water,
    "fresh snow": _snow,
}


def build_surface(job: Job) -> Ground:
    """Build what the product stands on, and the floor below it if that is a podium or a stone."""
    surface = job["scene"]["surface"]
    background = job["scene"]["background"]
    reach = reach_of(job)
    if surface in SWEEPS:
        return _sweep(SWEEPS.index(surface), random.Random(f"packshot-ground-{job['seed']}"), reach)
    top, _, below = surface.partition(ON)
    if top in TABLES:
        _table(TABLES[top](), background)
        return Ground(0.0, reach * 1.1)
    if top in PODIUMS or top == "a moss-covered stone":
        _table(TABLES[below]() if below else floor_below(background), background)
    if top in PODIUMS:
        return _podium(PODIUMS[top](), job, reach)
    back = WALL_Y if background else OPEN_BACK
    return GROUNDS[top](random.Random(f"packshot-ground-{job['seed']}"), reach, back)

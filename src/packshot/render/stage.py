"""Surface, background, light, mood and camera: one builder for each phrase of the vocabulary.

Scene units: the frame is FRAME wide and high at the product, which stands at the origin; the camera looks along +y.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix, Vector

from packshot.render import materials
from packshot.render.mesh import add_mesh, bumps, cuboid, frond, loft, pillar, plane, relief, sphere_points

FRAME = 3.0
WALL_Y = 2.0
BACKDROP_Y = 7.0

Color = tuple[float, float, float]


@dataclass(frozen=True)
class Ground:
    """Where things stand: z under the product, radius kept free around it, z of the floor at (x, y)."""

    product_z: float
    clear: float
    floor_z: Callable[[float, float], float] = lambda x, y: 0.0


# ---------------------------------------------------------------------------------------------------- surfaces

_FLOOR_UNDER_PODIUM: dict[str, Callable[[], bpy.types.Material]] = {
    "a concrete wall": materials.concrete,
    "a brick wall": materials.concrete,
    "a wooden panel wall": lambda: materials.painted("floor", (0.62, 0.52, 0.4)),
    "a blue sky": lambda: materials.painted("floor", (0.72, 0.68, 0.6)),
    "mountains": lambda: materials.stone((0.36, 0.34, 0.31)),
    "bokeh lights": lambda: materials.plain("floor", (0.03, 0.028, 0.03), 0.25),
}

TABLES: dict[str, Callable[[], bpy.types.Material]] = {
    "a white marble table": materials.marble,
    "a grey concrete table": materials.concrete,
    "a light wooden table": lambda: materials.wood((0.72, 0.5, 0.29), (0.6, 0.39, 0.21)),
    "a dark wooden table": lambda: materials.wood((0.17, 0.075, 0.033), (0.11, 0.045, 0.02)),
    "a black glossy table": lambda: materials.plain("black_gloss", (0.008, 0.008, 0.01), 0.06, Coat_Weight=0.5),
}

PODIUMS: dict[str, Callable[[], bpy.types.Material]] = {
    "a beige stone podium": lambda: materials.stone((0.62, 0.47, 0.31)),
    "a white podium": lambda: materials.painted("white", (0.86, 0.86, 0.85), 0.02),
    "a pink podium": lambda: materials.painted("pink", (0.86, 0.3, 0.38), 0.03),
    "a green podium": lambda: materials.painted("green", (0.1, 0.33, 0.16), 0.03),
}


def _table(material: bpy.types.Material, background: str) -> None:
    """Up to the wall, or ending in an edge in front of a far backdrop."""
    back = WALL_Y if background in WALLS else 1.7
    top = cuboid("table", (16, back + 12, 0.3), material, 0.01)
    top.location = (0, back - (back + 12) / 2, -0.3)


def _podium(material: bpy.types.Material, job: dict[str, Any], width: float) -> Ground:
    height, radius = job["podium"]["height"], min(0.98, max(0.62, width * 0.74))
    if job["podium"]["shape"] == "square":
        pillar("podium", radius, height, material, 0.03, power=24)
    else:
        pillar("podium", radius, height, material, 0.04)
    return Ground(height, radius)


def _fade(x, y, inner, outer):
    """0 within `inner` of the origin, 1 beyond `outer`: keeps the ground flat under the product."""
    t = np.clip((np.hypot(x, y) - inner) / (outer - inner), 0, 1)
    return t * t * (3 - 2 * t)


def _sand(job, width: float) -> Ground:
    rng = random.Random(f"packshot-sand-{job['seed']}")
    phase, turn = rng.uniform(0, 6), rng.uniform(-0.5, 0.5)

    def height(x, y):
        across = x * math.sin(turn) + y * math.cos(turn) + 0.14 * np.sin(1.7 * x + phase) + 0.05 * np.sin(4.1 * x)
        dunes = 0.16 * np.sin(0.9 * x + phase) * np.sin(1.1 * y + phase)
        return (dunes * 0.5 + 0.035 * np.sin(across * 13)) * _fade(x, y, width * 0.5, width * 0.5 + 0.8)

    relief("sand", (-5, 5), (-6, WALL_Y), height, materials.sand(), 200)
    return Ground(-0.015, width * 0.55, lambda x, y: float(height(np.array(x), np.array(y))))


def _linen(job, width: float) -> Ground:
    rng = random.Random(f"packshot-linen-{job['seed']}")
    waves = [(rng.gauss(0, 2.6), rng.gauss(0, 1.6), rng.uniform(0, 6.28)) for _ in range(6)]

    def height(x, y):
        total = sum(np.sin(a * x + b * y + c + 0.5 * np.sin(1.3 * y + c)) for a, b, c in waves)
        return 0.11 * (1 - np.abs(np.tanh(total / 2))) * _fade(x, y, width * 0.5, width * 0.5 + 0.5)

    relief("linen", (-5, 5), (-6, WALL_Y), height, materials.linen(), 200)
    return Ground(0.0, width * 0.55, lambda x, y: float(height(np.array(x), np.array(y))))


def _moss(job, width: float) -> Ground:
    rng = random.Random(f"packshot-moss-{job['seed']}")
    points, faces = sphere_points(72, 108)
    radius, top = max(0.95, width * 0.85), 0.36
    rough = 0.09 * bumps(points, rng, 8, 1.6) + 0.035 * bumps(points, rng, 12, 7)
    points = points * (1 + rough)[:, None] * np.array([radius * 1.2, radius, 0.52])
    # Flatten the top softly so that a product can stand on it.
    over = points[:, 2] > top
    points[over, 2] = top + 0.04 * np.tanh((points[over, 2] - top) / 0.3)
    add_mesh("moss_stone", points, faces, materials.moss(), smooth=180.0)
    return Ground(top + 0.012, radius * 1.02)


def build_surface(job: dict[str, Any]) -> Ground:
    """Build what the product stands on, and the floor below it if that is a podium or a stone."""
    surface, background = job["scene"]["surface"], job["scene"]["background"]
    width = job["height"] * FRAME * job["product"]["aspect"]
    natural = {"a bed of sand": _sand, "a linen tablecloth": _linen}
    if surface in natural:
        return natural[surface](job, width)
    top, _, below = surface.partition(" which is on ")
    if top in TABLES:
        _table(TABLES[top](), background)
        return Ground(0.0, width * 0.55)
    floor = TABLES[below] if below else _FLOOR_UNDER_PODIUM.get(background, lambda: _wall_paint(background))
    _table(floor(), background)
    return _moss(job, width) if top == "a moss-covered stone" else _podium(PODIUMS[top](), job, width)


# -------------------------------------------------------------------------------------------------- backgrounds

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


def _wall_paint(background: str) -> bpy.types.Material:
    return materials.painted("paint", _PAINTS[background], 0.04)


WALLS: dict[str, Callable[[], bpy.types.Material]] = {
    **{phrase: (lambda phrase=phrase: _wall_paint(phrase)) for phrase in _PAINTS},
    "a concrete wall": materials.concrete,
    "a brick wall": materials.bricks,
    "a wooden panel wall": lambda: materials.wood((0.36, 0.17, 0.075), (0.26, 0.11, 0.045), vertical=True, plank=0.4),
}


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


def _blue_sky(job) -> None:
    horizon, zenith, cloud = _tones(job["scene"]["lighting"])
    if job["scene"]["lighting"] == "golden hour light":  # it stays a blue sky: only the horizon burns
        zenith = (0.07, 0.2, 0.58)
    _backdrop(materials.sky(horizon, zenith, cloud))


def _ridge(rng, base, amplitude, steps=160) -> np.ndarray:
    x = np.linspace(0, 1, steps)
    total = np.zeros(steps)
    for octave in range(6):
        frequency = 2.2 * 1.9**octave
        total += np.abs(np.sin(x * frequency * math.pi + rng.uniform(0, 6.28))) / 1.75**octave
    return base + amplitude * (total - total.min()) / (total.max() - total.min())


def _mountains(job) -> None:
    rng = random.Random(f"packshot-mountains-{job['seed']}")
    horizon, zenith, cloud = _tones(job["scene"]["lighting"])
    _backdrop(materials.sky(horizon, zenith, cloud))
    far, near = np.array(horizon) * 0.62, np.array((0.035, 0.055, 0.06))
    for layer in range(4):
        t = layer / 3
        heights = _ridge(rng, 0.3 - 0.65 * t, 1.5 - 0.7 * t)
        x = np.linspace(-8, 8, len(heights))
        points = [(a, 0, b) for a, b in zip(x, heights, strict=True)] + [(a, 0, -6) for a in x]
        n = len(heights)
        faces = [(k, k + 1, n + k + 1, n + k) for k in range(n - 1)]
        tone = (far * (1 - t) + near * t).tolist()
        ridge = add_mesh("ridge", points, faces, materials.glow("ridge", tone, 0.75), smooth=None)
        ridge.location = (0, BACKDROP_Y - 0.2 - 0.3 * layer, 0)
        ridge.visible_diffuse = ridge.visible_shadow = False


def _bokeh(job) -> None:
    rng = random.Random(f"packshot-bokeh-{job['seed']}")
    _backdrop(materials.sky((0.05, 0.025, 0.02), (0.012, 0.012, 0.03), None))
    tones = ((1.0, 0.52, 0.16), (1.0, 0.72, 0.36), (1.0, 0.35, 0.18), (0.35, 0.55, 1.0), (1.0, 0.42, 0.6))
    palette = rng.sample(tones, 3)
    lit = [materials.glow("bokeh", color, strength) for color in palette for strength in (0.5, 1.1, 2.2)]
    for k in range(70):
        radius = rng.uniform(0.1, 0.34)
        disc = loft("bokeh", [(radius, 0.0), (radius, 0.001)], rng.choice(lit), steps=24)
        disc.location = (rng.uniform(-4.5, 4.5), BACKDROP_Y - 0.3 - 0.01 * k, rng.uniform(-2.2, 4.2))
        disc.rotation_euler = (math.pi / 2, 0, 0)
        disc.visible_diffuse = disc.visible_shadow = False


BACKDROPS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a blue sky": _blue_sky,
    "mountains": _mountains,
    "bokeh lights": _bokeh,
}


def build_background(job: dict[str, Any]) -> None:
    background = job["scene"]["background"]
    if background in WALLS:
        plane("wall", 9, 6, WALLS[background](), (0, WALL_Y, 4), (math.pi / 2, 0, 0))
    else:
        BACKDROPS[background](job)


# ----------------------------------------------------------------------------------------------------- lighting


def _add_area(position, aim, size, power, color: Color = (1, 1, 1), size_y: float | None = None) -> None:
    lamp = bpy.data.lights.new("area", "AREA")
    lamp.shape, lamp.size, lamp.size_y, lamp.energy, lamp.color = "RECTANGLE", size, size_y or size, power, color
    obj = bpy.data.objects.new("area", lamp)
    obj.location = position
    obj.rotation_euler = (Vector(aim) - Vector(position)).to_track_quat("-Z", "Y").to_euler()
    obj.visible_camera = False
    bpy.context.scene.collection.objects.link(obj)


def _add_sun(direction, power, angle, color: Color = (1, 0.96, 0.9)) -> Vector:
    """Sun travelling along `direction`; `angle` is its angular size in degrees (0.5: harsh, 20: veiled)."""
    travel = Vector(direction).normalized()
    lamp = bpy.data.lights.new("sun", "SUN")
    lamp.energy, lamp.angle, lamp.color = power, math.radians(angle), color
    obj = bpy.data.objects.new("sun", lamp)
    obj.rotation_euler = travel.to_track_quat("-Z", "Y").to_euler()
    bpy.context.scene.collection.objects.link(obj)
    return travel


def _cast_only(obj: bpy.types.Object) -> None:
    """A gobo: it stands in the sun's way and is seen by nothing else."""
    obj.visible_camera = obj.visible_glossy = obj.visible_diffuse = obj.visible_transmission = False


def _leaf_gobo(travel: Vector, rng: random.Random) -> None:
    facing = travel.to_track_quat("Z", "Y").to_matrix().to_4x4()
    dark = materials.plain("gobo", (0.02, 0.02, 0.02))
    side = 1 if travel.x > 0 else -1
    for index, (x, z, turn) in enumerate(((-1.6, 2.2, -65), (-0.5, 3.2, -115), (1.7, 2.7, 70), (0.5, 2.6, 180))):
        obj = frond("gobo", rng.uniform(1.7, 2.3), dark, 0.0, 13, 0.42, 0.045)
        target = Vector((side * x + rng.uniform(-0.2, 0.2), WALL_Y, z + rng.uniform(-0.2, 0.2)))
        roll = Matrix.Rotation(math.radians(side * turn + rng.uniform(-15, 15)), 4, "Z")
        obj.matrix_world = Matrix.Translation(target - travel * (3.4 + 0.4 * index)) @ facing @ roll
        _cast_only(obj)


def _blind_gobo(travel: Vector, rng: random.Random) -> None:
    """Slats of a blind and the frame around its window."""
    facing = travel.to_track_quat("Z", "Y").to_matrix().to_4x4()
    dark = materials.plain("gobo", (0.02, 0.02, 0.02))
    center = Vector((rng.uniform(-0.3, 0.3), WALL_Y, 1.5)) - travel * 4.2
    tilt = Matrix.Rotation(math.radians(rng.uniform(-6, 6)), 4, "Z")
    for k in range(-8, 9):
        slat = plane("slat", 5.0, 0.085, dark)
        slat.matrix_world = Matrix.Translation(center) @ facing @ tilt @ Matrix.Translation((0, k * 0.33, 0))
        _cast_only(slat)


def _soft_daylight(rng) -> None:
    side = rng.choice((-1, 1))
    _add_area((side * 2.2, -4.2, 4.6), (0, 0.4, 0.6), 4.5, 520, (1.0, 0.97, 0.93))


def _soft_side(side: int):
    def light(rng) -> None:
        _add_area((side * 4.4, rng.uniform(-1.6, -0.4), 2.6), (0, 0.3, 0.7), 2.6, 560, (1.0, 0.97, 0.93))

    return light


def _harsh_side(side: int):
    def light(rng) -> None:
        _add_sun((-side, rng.uniform(0.3, 0.7), -rng.uniform(0.42, 0.62)), 6.0, 0.5)

    return light


def _leaf_shadows(rng) -> None:
    side = rng.choice((-1, 1))
    _leaf_gobo(_add_sun((side * 0.62, 0.8, -0.5), 5.2, 1.1), rng)


def _blind_shadows(rng) -> None:
    side = rng.choice((-1, 1))
    _blind_gobo(_add_sun((side * 0.6, 0.8, -0.42), 5.5, 0.7), rng)


def _golden_hour(rng) -> None:
    side = rng.choice((-1, 1))
    _add_sun((side * 0.85, rng.uniform(0.3, 0.6), -0.24), 6.0, 1.6, (1.0, 0.5, 0.16))


def _neon(color: Color, second: Color):
    def light(rng) -> None:
        side = rng.choice((-1, 1))
        _add_area((side * 2.8, -0.9, 2.0), (0, 0.3, 0.8), 0.9, 330, color, 2.6)
        _add_area((side * 1.6, 1.3, 3.2), (side * 0.3, WALL_Y, 1.2), 1.2, 110, color)
        _add_area((-side * 2.8, -0.2, 1.6), (0, 0.2, 0.8), 0.7, 110, second, 2.4)

    return light


def _studio(rng) -> None:
    side = rng.choice((-1, 1))
    _add_area((side * 2.4, -2.6, 3.4), (0, 0, 0.8), 1.8, 330)
    _add_area((-side * 3.0, -2.0, 1.8), (0, 0, 0.8), 2.6, 110)
    _add_area((-side * 1.6, 1.2, 3.0), (0, 0, 0.9), 0.6, 120, size_y=2.2)


def _backlight(rng) -> None:
    side = rng.choice((-1, 1))
    _add_area((side * 0.9, 1.85, 3.3), (0, -0.2, 0.3), 1.6, 420, (1.0, 0.95, 0.88), 0.9)
    _add_sun((-side * 0.3, -1.0, -0.62), 3.2, 1.5, (1.0, 0.93, 0.82))


@dataclass(frozen=True)
class Light:
    """Lamps of a lighting phrase, the world image that fills the shadows, and its strength."""

    lamps: Callable[[random.Random], None]
    world: str
    fill: float


LIGHTS: dict[str, Light] = {
    "soft daylight": Light(_soft_daylight, "courtyard", 0.4),
    "soft light from the left side": Light(_soft_side(-1), "interior", 0.14),
    "soft light from the right side": Light(_soft_side(1), "interior", 0.14),
    "harsh light from the left side": Light(_harsh_side(-1), "interior", 0.12),
    "harsh light from the right side": Light(_harsh_side(1), "interior", 0.12),
    "leaf shadows on the wall": Light(_leaf_shadows, "interior", 0.24),
    "window blind shadows on the wall": Light(_blind_shadows, "interior", 0.2),
    "golden hour light": Light(_golden_hour, "sunset", 0.22),
    "pink neon light": Light(_neon((1.0, 0.03, 0.35), (0.35, 0.1, 1.0)), "night", 0.12),
    "blue neon light": Light(_neon((0.03, 0.2, 1.0), (0.0, 0.75, 0.9)), "night", 0.12),
    "studio lighting": Light(_studio, "studio", 0.2),
    "backlight": Light(_backlight, "interior", 0.36),
}


def _world_image(name: str) -> bpy.types.Image:
    path = os.path.join(bpy.utils.resource_path("LOCAL"), "datafiles", "studiolights", "world", f"{name}.exr")
    return bpy.data.images.load(path, check_existing=True)


def _build_world(light: Light, fill: float, turn: float) -> None:
    world = bpy.data.worlds.new("world")
    world.use_nodes = True
    tree = world.node_tree
    environment = materials.add_node(tree, "ShaderNodeTexEnvironment")
    environment.image = _world_image(light.world)
    coordinates = materials.add_node(tree, "ShaderNodeTexCoord")
    mapping = materials.add_node(tree, "ShaderNodeMapping", {"Rotation": (0, 0, turn)})
    tree.links.new(coordinates.outputs["Generated"], mapping.inputs[0])
    tree.links.new(mapping.outputs[0], environment.inputs[0])
    background = next(node for node in tree.nodes if node.type == "BACKGROUND")
    background.inputs["Strength"].default_value = fill
    tree.links.new(environment.outputs[0], background.inputs["Color"])
    # The importance map is rebuilt for every scene; 256 is fine for fill light and 16 times cheaper than automatic.
    world.cycles.sampling_method, world.cycles.sample_map_resolution = "MANUAL", 256
    bpy.context.scene.world = world


# --------------------------------------------------------------------------------------------- mood and camera


@dataclass(frozen=True)
class Grade:
    """Mood as a photographer sets it: AgX contrast look, exposure in stops, white balance in kelvin, fill factor."""

    look: str = "AgX - Medium High Contrast"
    exposure: float = 0.0
    kelvin: float = 6500.0
    fill: float = 1.0


GRADES: dict[str | None, Grade] = {
    None: Grade(),
    "minimalist": Grade("AgX - Base Contrast", 0.2),
    "warm": Grade(kelvin=8600),
    "cool": Grade(kelvin=4900),
    "dramatic": Grade("AgX - Very High Contrast", -0.25, fill=0.45),
    "luxurious": Grade("AgX - High Contrast", -0.15, 7100, 0.7),
    "fresh": Grade("AgX - Punchy", 0.45, 6200, 1.3),
    "calm": Grade("AgX - Medium Low Contrast", -0.05, 6700, 1.3),
    "playful": Grade("AgX - Punchy", 0.2),
}


def build_light(job: dict[str, Any]) -> None:
    """Lamps, world fill and grade of the job's lighting and mood."""
    rng = random.Random(f"packshot-light-{job['seed']}")
    scene, light, grade = bpy.context.scene, LIGHTS[job["scene"]["lighting"]], GRADES[job["scene"]["mood"]]
    light.lamps(rng)
    outdoors = 1.6 if job["scene"]["background"] in ("a blue sky", "mountains") else 1.0
    _build_world(light, light.fill * grade.fill * outdoors, rng.uniform(0, 6.28))
    view = scene.view_settings
    view.view_transform, view.look, view.exposure = "AgX", grade.look, grade.exposure
    view.use_white_balance, view.white_balance_temperature = grade.kelvin != 6500.0, grade.kelvin


def build_camera(job: dict[str, Any], product_z: float) -> None:
    """Camera so far away that the frame is FRAME wide at the product, looking at its middle from a little above."""
    spec, height = job["camera"], job["height"] * FRAME
    data = bpy.data.cameras.new("camera")
    data.lens, data.sensor_width, data.clip_end = spec["lens"], 36, 100
    distance = FRAME * spec["lens"] / 36
    elevation, azimuth = math.radians(spec["elevation"]), math.radians(spec["azimuth"])
    middle = Vector((0, 0, product_z + height / 2))
    away = Vector(
        (math.sin(azimuth) * math.cos(elevation), -math.cos(azimuth) * math.cos(elevation), math.sin(elevation))
    )
    camera = bpy.data.objects.new("camera", data)
    camera.location = middle + away * distance
    camera.rotation_euler = (-away).to_track_quat("-Z", "Y").to_euler()
    # Lens shift moves the product in the frame without tilting its verticals.
    data.shift_x, data.shift_y = -spec["offset"][0], -spec["offset"][1]
    if "shallow depth of field" in job["scene"]["style"]:
        # An aperture of 0.3 units blurs the wall by about 3 % of the frame and leaves the product's print sharp.
        front = distance - 0.4 * height * job["product"]["aspect"]
        data.dof.use_dof, data.dof.focus_distance, data.dof.aperture_fstop = True, front, spec["lens"] / 1000 / 0.3
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera

"""Light: the lamps, gobos and world image of each phrase of the vocabulary's LIGHTING."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass

import bpy
from mathutils import Matrix, Vector

from packshot.render import materials
from packshot.render.frame import WALL_Y, Job
from packshot.render.materials import Color
from packshot.render.mesh import frond, plane
from packshot.render.sample import OUTDOOR


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
    background = materials.find_node(tree, "BACKGROUND")
    background.inputs["Strength"].default_value = fill
    tree.links.new(environment.outputs[0], background.inputs["Color"])
    # The importance map is rebuilt for every scene; 256 is fine for fill light and 16 times cheaper than automatic.
    world.cycles.sampling_method, world.cycles.sample_map_resolution = "MANUAL", 256
    bpy.context.scene.world = world


def build_light(job: Job, fill: float) -> None:
    """Lamps and world light of the job's lighting phrase; `fill` scales what brightens the shadows."""
    rng = random.Random(f"packshot-light-{job['seed']}")
    light = LIGHTS[job["scene"]["lighting"]]
    light.lamps(rng)
    outdoors = 1.6 if job["scene"]["background"] in OUTDOOR else 1.0
    _build_world(light, light.fill * fill * outdoors, rng.uniform(0, 6.28))

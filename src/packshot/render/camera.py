"""Mood and camera: grade, exposure, white balance, lens, height, focus."""

from __future__ import annotations

import math
from dataclasses import dataclass

import bpy
from mathutils import Vector

from packshot.render.frame import FRAME, Job, items_of


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


def apply_grade(grade: Grade) -> None:
    """Set how the scene's light becomes pixels."""
    view = bpy.context.scene.view_settings
    view.view_transform, view.look, view.exposure = "AgX", grade.look, grade.exposure
    view.use_white_balance, view.white_balance_temperature = grade.kelvin != 6500.0, grade.kelvin


def build_camera(job: Job, product_z: float) -> None:
    """Camera so far away that the frame is FRAME wide at the product, looking at its middle from a little above."""
    spec = job["camera"]
    height = max(item["height"] for item in items_of(job)) * FRAME
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
        front = distance - 0.4 * height * job["product"]["footprint"]
        data.dof.use_dof, data.dof.focus_distance, data.dof.aperture_fstop = True, front, spec["lens"] / 1000 / 0.3
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera

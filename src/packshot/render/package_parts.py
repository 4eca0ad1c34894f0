"""Parts that packages share: the printable body, its skin, caps, and the usual profiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import bpy
import numpy as np

from packshot.render import materials
from packshot.render.frame import Design
from packshot.render.materials import tinted
from packshot.render.mesh import arc, loft


@dataclass(frozen=True)
class Body:
    """Outer skin of the labelled part: profile (radius, z), y/x ratio for each point, superellipse power."""

    profile: list[tuple[float, float]]
    depths: list[float]
    power: float = 2.0
    label: tuple[float, float] = (0.2, 0.6)  # z range that takes print

    def rows(self, low: float, high: float) -> np.ndarray:
        """Heights for print from `low` to `high`: with the body's own rows, or the skin would poke through."""
        own = [z for _, z in self.profile if low < z < high]
        return np.unique([low, *own, *np.linspace(low, high, 6)])

    def section(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(x radius, y / x ratio) of the skin at the heights."""
        radii, heights = np.array(self.profile).T
        return np.interp(z, heights, radii), np.interp(z, heights, self.depths)

    def front(self, x: np.ndarray, z: np.ndarray, offset: float) -> np.ndarray:
        """y of the front surface at (x, z), moved outwards by `offset`."""
        radius, ratio = self.section(z)
        depth = radius * ratio
        inside = np.clip(1 - np.abs(x / radius) ** self.power, 0, 1)
        return -depth * inside ** (1 / self.power) - offset


def color_of(design: Design, name: str) -> list[float]:
    """One of the palette's colours: body, label, ink or accent."""
    return design["colors"][name]


def skin(design: Design) -> bpy.types.Material:
    """The body's material in the design's colour and finish."""
    color = color_of(design, "body")
    finish = design["finish"]
    if finish == "glass":
        return materials.glass("body", tinted(color, 0.75, 0.25))
    if finish == "frosted":
        return materials.plain("body", tinted(color, 0.85, 0.15), 0.32, Transmission_Weight=0.35, Coat_Weight=0.2)
    if finish == "metal":
        return materials.metal("body", tinted(color, 0.6, 0.35), 0.28)
    if finish == "glossy":
        return materials.plain("body", color, 0.14, Coat_Weight=0.6)
    return materials.plain("body", color, 0.55)


def cap_material(design: Design) -> bpy.types.Material:
    """The material of the design's cap."""
    choices: dict[str, Callable[[], bpy.types.Material]] = {
        "gold": lambda: materials.metal("gold"),
        "silver": lambda: materials.metal("silver"),
        "black": lambda: materials.plain("black", (0.012, 0.012, 0.014), 0.25, Coat_Weight=0.4),
        "white": lambda: materials.plain("white", (0.86, 0.86, 0.85), 0.3),
        "wood": lambda: materials.mottled(
            "cap_wood", [(0.3, (0.3, 0.15, 0.06)), (0.7, (0.6, 0.36, 0.17))], 9, 0.5, stretch=(1, 1, 0.1)
        ),
        "accent": lambda: materials.plain("accent", color_of(design, "accent"), 0.35),
    }
    return choices[design["cap"]]()


def raise_by(obj: bpy.types.Object, z: float) -> bpy.types.Object:
    """Move an object up; returns it."""
    obj.location.z += z
    return obj


def draw_body(body: Body, material: bpy.types.Material, name="body") -> bpy.types.Object:
    """The body as a mesh."""
    return loft(name, body.profile, material, body.power, body.depths, 64 if body.power == 2 else 96)


def widened(profile: Sequence[tuple[float, float]], radius: float) -> list[tuple[float, float]]:
    """A profile of (share of the radius, z) as one of (radius, z)."""
    return [(radius * share, z) for share, z in profile]


def cylinder_body(radius, bottom, top, bevel, power=2.0, depth=1.0, label=(0.15, 0.85)) -> Body:
    """A cylinder, or a box of a high power; `label` is the printable share of its height."""
    profile = [*arc(radius - bevel, bottom + bevel, bevel, -90, 0), *arc(radius - bevel, top - bevel, bevel, 0, 90)]
    span = top - bottom
    return Body(profile, [depth] * len(profile), power, (bottom + label[0] * span, bottom + label[1] * span))


def shouldered(radius, shoulder_z, neck_radius, top, roundness) -> Body:
    """A bottle: a cylinder whose shoulder narrows to a neck."""
    bend = 0.03 + 0.6 * roundness * (radius - neck_radius)
    foot = min(0.05, radius * 0.3)
    profile = [
        *arc(radius - foot, foot, foot, -90, 0),
        *arc(radius - bend, shoulder_z - bend, bend, 0, 75, 8),
        (neck_radius, shoulder_z + 0.35 * (radius - neck_radius)),
        (neck_radius, top),
    ]
    return Body(profile, [1.0] * len(profile), 2.0, (foot + 0.06, shoulder_z - bend - 0.04))

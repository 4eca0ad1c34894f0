"""Products that the second generation of scenes adds: glass, thin and open shapes, and further packages.

Every builder draws a product 1 high on z = 0 that faces -y; it returns the body that takes print, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import bpy
import numpy as np

from packshot.render import materials
from packshot.render.frame import Design
from packshot.render.materials import tinted
from packshot.render.mesh import add_mesh, arc, loft, pillar, sphere_points, tube
from packshot.render.package_parts import (
    Body,
    cap_material,
    color_of,
    cylinder_body,
    draw_body,
    raise_by,
    shouldered,
    skin,
    widened,
)

Point = tuple[float, float, float]


def _circle(radius: float, z: float, count: int = 48) -> list[Point]:
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return [(radius * math.cos(angle), radius * math.sin(angle), z) for angle in angles]


def _clear(design: Design) -> bpy.types.Material:
    """Glass that is nearly colourless, with a breath of the design's colour."""
    return materials.glass("body", tinted(color_of(design, "body"), 0.18, 0.82), 0.0)


def _drink(design: Design) -> bpy.types.Material:
    return materials.plain(
        "drink", tinted(color_of(design, "accent"), 0.9, 0.1), 0.05, Transmission_Weight=0.7, IOR=1.33
    )


# ---- packages ----


def _wine_bottle(design: Design) -> Body:
    radius = design["aspect"] / 2
    body = shouldered(radius, 0.62, radius * 0.36, 0.99, 0.7)
    draw_body(body, skin(design))
    raise_by(pillar("capsule", radius * 0.41, 0.2, cap_material(design), 0.008), 0.8)
    return body


def _pouch(design: Design) -> Body:
    """A stand-up bag: full at the foot, welded flat at the top."""
    radius = design["aspect"] / 2
    heights = np.linspace(0.0, 1.0, 12)
    profile, depths = [], []
    for z in heights.tolist():
        profile.append((radius * (0.93 + 0.07 * math.sin(math.pi * z)), z))
        depths.append(max(0.02, 0.42 * (1 - z**1.8)))
    body = Body(profile, depths, 3.0, (0.22, 0.74))
    draw_body(body, skin(design))
    return body


def _mug(design: Design) -> Body:
    radius = 0.38 * design["aspect"]
    wall = 0.05
    profile = [(radius * 0.94, 0.0), (radius, 0.05), (radius, 0.98), (radius - wall / 2, 1.0), (radius - wall, 0.98)]
    material = skin(design)
    loft("body", [*profile, (radius - wall, 0.1)], material)
    angles = np.linspace(-1.3, 1.3, 20)
    grip = [(radius + 0.21 * design["aspect"] * math.cos(a) - 0.04, 0.0, 0.5 + 0.3 * math.sin(a)) for a in angles]
    tube("handle", grip, 0.05, material, (0, 1, 0))
    return Body([(radius, 0.0), (radius, 1.0)], [1.0, 1.0], 2.0, (0.2, 0.8))


def _paper_bag(design: Design) -> Body:
    radius = design["aspect"] / 2
    body = cylinder_body(radius, 0.0, 0.8, 0.006, power=40, depth=0.42, label=(0.2, 0.8))
    draw_body(body, skin(design))
    cord = materials.plain("cord", color_of(design, "accent"), 0.8)
    angles = np.linspace(0, math.pi, 24)
    for y in (-0.4 * radius, 0.4 * radius):
        arch = [(0.45 * radius * math.cos(a), y, 0.79 + 0.2 * math.sin(a)) for a in angles]
        tube("cord", arch, 0.012, cord, (0, 1, 0))
    return body


def _roll_on(design: Design) -> Body:
    radius = design["aspect"] / 2
    body = cylinder_body(radius, 0.0, 0.64, 0.03, label=(0.12, 0.9))
    draw_body(body, skin(design))
    dome = [(radius * 0.92, 0.65), (radius * 0.92, 0.82), *arc(0.001, 1 - radius * 0.92, radius * 0.92, 0, 88)]
    loft("cap", dome, cap_material(design))
    return body


def _diffuser(design: Design) -> Body:
    """A bottle with reeds."""
    radius = 0.36 * design["aspect"]
    body = shouldered(radius, 0.34, radius * 0.42, 0.42, design["roundness"])
    draw_body(body, skin(design))
    raise_by(pillar("collar", radius * 0.5, 0.06, cap_material(design), 0.008), 0.38)
    reed = materials.plain("reed", (0.6, 0.42, 0.22), 0.8)
    for number in range(7):
        around = 2 * math.pi * number / 7 + design["neck"]
        lean = 0.36 * design["aspect"] * (0.6 + 0.4 * math.cos(3.0 * number))
        tip = (lean * math.cos(around), lean * math.sin(around), 0.97 - 0.02 * (number % 3))
        tube("reed", [(0, 0, 0.12), (0.3 * tip[0], 0.3 * tip[1], 0.42), tip], 0.009, reed, (0.3, 1, 0))
    return body


# ---- glass ----


def _wine_glass(design: Design) -> None:
    radius = design["aspect"] / 2
    outside = [
        (0.8, 0.0),
        (0.8, 0.012),
        (0.12, 0.035),
        (0.07, 0.1),
        (0.06, 0.42),
        (0.3, 0.47),
        (0.85, 0.6),
        (1.0, 0.72),
    ]
    inside = [(0.82, 1.0), (0.78, 1.0), (0.91, 0.85), (0.95, 0.72), (0.79, 0.6), (0.2, 0.49)]
    profile = [*outside, (0.95, 0.85), *inside]
    loft("glass", widened(profile, radius), _clear(design))
    if design["stripes"]:
        fill = [(0.19, 0.492), (0.77, 0.602), (0.92, 0.7)]
        loft("drink", widened(fill, radius), _drink(design))


def _tumbler(design: Design) -> None:
    radius = design["aspect"] / 2
    profile = [(0.85, 0.0), (0.88, 0.03), (1.0, 0.98), (0.97, 1.0), (0.93, 0.98), (0.79, 0.13)]
    loft("glass", widened(profile, radius), _clear(design))
    if design["stripes"]:
        loft("drink", widened([(0.78, 0.135), (0.87, 0.66)], radius), _drink(design))


def _vase(design: Design) -> None:
    radius = design["aspect"] / 2
    belly = 0.25 + 0.3 * design["roundness"]
    outside = [(0.55, 0.0), (0.6, 0.02), (1.0, belly), (0.88, belly + 0.18), (0.4, 0.8), (0.55, 0.98), (0.53, 1.0)]
    inside = [(0.48, 0.98), (0.33, 0.8), (0.8, belly + 0.17), (0.9, belly), (0.45, 0.06)]
    loft("body", widened([*outside, *inside], radius), skin(design))


def _carafe(design: Design) -> None:
    radius = design["aspect"] / 2
    outside = [(0.9, 0.0), (1.0, 0.1), (0.98, 0.3), (0.36, 0.66), (0.3, 0.8), (0.42, 0.9)]
    inside = [(0.38, 0.9), (0.25, 0.8), (0.3, 0.66), (0.92, 0.3), (0.92, 0.1), (0.8, 0.04)]
    loft("glass", widened([*outside, *inside], radius), _clear(design))
    raise_by(pillar("stopper", radius * 0.34, 0.16, cap_material(design), 0.02), 0.84)
    if design["stripes"]:
        loft("drink", [(radius * 0.79, 0.045), (radius * 0.91, 0.1), (radius * 0.9, 0.3)], _drink(design))


# ---- thin and open ----


def _bracelet(design: Design) -> None:
    """A leaning ring, or beads on it."""
    radius = design["aspect"] / 2 - 0.1
    ring = [(x, y, 0.5 + 0.4 * y / radius) for x, y, _ in _circle(radius, 0.0, 60)]
    metal = materials.metal("metal", tinted(color_of(design, "accent"), 0.7, 0.3), 0.15)
    if design["stripes"] == 0:
        tube("ring", ring, 0.09, metal, (0, -0.37, 0.93), closed=True)
        return
    tube("string", ring, 0.02, metal, (0, -0.37, 0.93), closed=True)
    points, faces = sphere_points(12, 18)
    for number, place in enumerate(ring[::3]):
        bead = add_mesh("bead", points * 0.1, faces, metal if number % 4 else skin(design), smooth=180.0)
        bead.location = place


def _sunglasses(design: Design) -> None:
    half = design["aspect"] / 2
    material = skin(design)
    lens = materials.plain("lens", (0.02, 0.02, 0.025), 0.04, Transmission_Weight=0.5)
    for side in (-1, 1):
        middle = side * 0.54 * half
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        rim = [(middle + 0.4 * half * math.cos(a), 0.0, 0.55 + 0.4 * math.sin(a)) for a in angles]
        tube("rim", rim, 0.05, material, (0, 1, 0), closed=True)
        add_mesh("lens", rim, [tuple(range(40))], lens, smooth=None)
        hinge = side * 0.94 * half
        bow = [(hinge, 0.0, 0.72), (hinge, 0.9 * half, 0.7), (hinge, 1.15 * half, 0.62), (hinge, 1.3 * half, 0.3)]
        tube("temple", bow, 0.045, material, (1, 0, 0))
    tube("bridge", [(-0.16 * half, 0, 0.7), (0, -0.02, 0.76), (0.16 * half, 0, 0.7)], 0.05, material, (0, 1, 0))


def _desk_lamp(design: Design) -> None:
    reach = design["aspect"] / 2
    material = skin(design)
    pillar("base", 0.55 * reach, 0.04, material, 0.01)
    tube("arm", [(0, 0, 0.03), (-0.55 * reach, 0, 0.5), (0.1 * reach, 0, 0.92)], 0.016, material, (0, 1, 0))
    shade = loft("shade", [(0.05, 0.16), (0.08, 0.15), (0.17, 0.0), (0.155, 0.0), (0.07, 0.13)], material)
    shade.location = (0.42 * reach, 0, 0.72)
    shade.rotation_euler = (0, math.radians(-28), 0)
    tube("neck", [(0.1 * reach, 0, 0.92), (0.42 * reach - 0.07, 0, 0.86)], 0.016, material, (0, 1, 0))


def _wire_basket(design: Design) -> None:
    radius = design["aspect"] / 2
    material = skin(design)
    levels = ((0.02, 0.72), (0.34, 0.83), (0.66, 0.92), (0.98, 1.0))
    for z, share in levels:
        tube("ring", _circle(radius * share, z), 0.016, material, (0, 0, 1), closed=True)
    for number in range(16):
        around = 2 * math.pi * number / 16
        across = (math.cos(around), math.sin(around))
        wire = [(radius * share * across[0], radius * share * across[1], z) for z, share in levels]
        floor = [(0.0, 0.0, 0.02), wire[0]]
        tube("wire", wire, 0.011, material, (-across[1], across[0], 0))
        tube("wire", floor, 0.011, material, (0, 0, 1))


def _stool(design: Design) -> None:
    radius = design["aspect"] / 2
    material = skin(design)
    raise_by(pillar("seat", radius * 0.85, 0.07, cap_material(design), 0.02), 0.93)
    for number in range(4):
        around = math.pi / 4 + math.pi / 2 * number
        across = (math.cos(around), math.sin(around))
        foot = (radius * 0.97 * across[0], radius * 0.97 * across[1], 0.0)
        top = (radius * 0.6 * across[0], radius * 0.6 * across[1], 0.94)
        tube("leg", [foot, top], 0.022, material, (-across[1], across[0], 0))
    tube("brace", _circle(radius * 0.84, 0.33), 0.014, material, (0, 0, 1), closed=True)


def _candlestick(design: Design) -> None:
    radius = design["aspect"] / 2
    stem = [(1.0, 0.0), (1.0, 0.025), (0.3, 0.07), (0.14, 0.14), (0.12, 0.42), (0.34, 0.5), (0.34, 0.53), (0.2, 0.535)]
    loft("stick", widened(stem, radius), skin(design))
    wax = materials.plain("wax", color_of(design, "label"), 0.5)
    raise_by(pillar("candle", radius * 0.2, 0.42, wax, 0.008), 0.53)
    raise_by(pillar("wick", 0.006, 0.05, materials.plain("wick", (0.02, 0.02, 0.02)), 0.001), 0.95)


MORE_BUILDERS: dict[str, Callable[[Design], Body | None]] = {
    "wine-bottle": _wine_bottle,
    "pouch": _pouch,
    "mug": _mug,
    "paper-bag": _paper_bag,
    "roll-on": _roll_on,
    "diffuser": _diffuser,
    "wine-glass": _wine_glass,
    "tumbler": _tumbler,
    "vase": _vase,
    "carafe": _carafe,
    "bracelet": _bracelet,
    "sunglasses": _sunglasses,
    "desk-lamp": _desk_lamp,
    "wire-basket": _wire_basket,
    "stool": _stool,
    "candlestick": _candlestick,
}

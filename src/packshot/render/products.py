"""Products, standing on z = 0 and 1 high: twelve kinds of packaging with label, print and cap; modelled objects."""

from __future__ import annotations

import math
from collections.abc import Callable

import bpy
import numpy as np
from mathutils import Matrix

from packshot.render import materials
from packshot.render.frame import Design
from packshot.render.mesh import add_mesh, arc, grid_faces, loft, pillar
from packshot.render.more_products import MORE_BUILDERS
from packshot.render.objects import add_object
from packshot.render.package_parts import (
    Body,
    cap_material,
    color_of,
    cylinder_body,
    draw_body,
    raise_by,
    shouldered,
    skin,
)


def _bottle(design):
    radius, cap = design["aspect"] / 2, 0.13 * design["cap_height"]
    neck = radius * design["neck"]
    body = shouldered(radius, 0.66 - 0.1 * design["roundness"] * radius, neck, 1 - cap, design["roundness"])
    draw_body(body, skin(design))
    raise_by(pillar("cap", neck * 1.25, cap + 0.03, cap_material(design), 0.012), 1 - cap - 0.03)
    return body


def _dropper(design):
    radius, neck = design["aspect"] / 2, design["aspect"] / 2 * 0.5
    body = shouldered(radius, 0.6, neck, 0.68, design["roundness"])
    draw_body(body, skin(design))
    raise_by(pillar("collar", neck * 1.2, 0.12, cap_material(design), 0.01), 0.66)
    rubber = materials.plain("rubber", (0.02, 0.02, 0.022) if design["cap"] != "white" else (0.8, 0.8, 0.78), 0.6)
    bulb = neck * 0.72
    loft(
        "bulb",
        [(bulb, 0.77), (bulb * 0.85, 0.81), (bulb * 0.95, 0.9), *arc(0.001, 1 - bulb * 0.9, bulb * 0.9, 0, 88)],
        rubber,
        steps=48,
    )
    return body


def _pump(design):
    radius, neck = design["aspect"] / 2, 0.07
    body = shouldered(radius, 0.68, neck, 0.76, design["roundness"])
    draw_body(body, skin(design))
    material = cap_material(design)
    raise_by(pillar("collar", neck * 1.45, 0.09, material, 0.01), 0.74)
    raise_by(pillar("stem", 0.025, 0.12, material, 0.005), 0.83)
    raise_by(pillar("head", 0.075, 0.07, material, 0.015), 0.93)
    nozzle = pillar("nozzle", 0.024, 0.24, material, 0.008)
    nozzle.rotation_euler = (0, math.radians(-97), 0)
    nozzle.location = (0.02, 0, 0.965)
    return body


def _jar(design):
    radius = design["aspect"] / 2
    seam = 0.62
    body = cylinder_body(radius * 0.97, 0.0, seam, 0.02 + 0.14 * design["roundness"] * radius, label=(0.25, 0.8))
    draw_body(body, skin(design))
    raise_by(pillar("lid", radius, 1 - seam, cap_material(design), 0.03), seam)
    return body


def _tube(design):
    radius, cap = design["aspect"] / 2, 0.15
    heights = np.linspace(cap, 1.0, 14)
    t = (heights - cap) / (1 - cap)
    profile = list(zip(radius * (0.9 + 0.1 * t), heights, strict=True))
    body = Body(profile, [max(0.03, 1 - u**1.4) for u in t], 2.0, (0.3, 0.8))
    draw_body(body, skin(design))
    pillar("cap", radius * 0.8, cap + 0.01, cap_material(design), 0.015)
    return body


def _can(design):
    radius = design["aspect"] / 2
    profile = [(radius * 0.72, 0), (radius * 0.78, 0.012), (radius, 0.07), (radius, 0.87), (radius * 0.83, 0.955)]
    body = Body(profile, [1.0] * 5, 2.0, (0.09, 0.85))
    draw_body(body, skin(design))
    rim = radius * 0.83
    aluminium = materials.metal("silver", roughness=0.25)
    loft(
        "rim",
        [(rim, 0.95), (rim * 1.04, 0.975), (rim * 1.02, 1.0), (rim * 0.94, 1.0), (rim * 0.9, 0.972), (0.001, 0.972)],
        aluminium,
    )
    return body


def _aerosol(design):
    radius, cap = design["aspect"] / 2, 0.2
    body = cylinder_body(radius, 0.0, 1 - cap - 0.02, 0.03, label=(0.1, 0.9))
    draw_body(body, skin(design))
    profile = [
        (radius * 0.9, 0),
        (radius * 0.9, cap - 0.06),
        *arc(radius * 0.9 - 0.05, cap - 0.05, 0.05, 0, 88),
        (0.001, cap),
    ]
    raise_by(loft("cap", profile, cap_material(design)), 1 - cap)
    return body


def _carton(design):
    radius = design["aspect"] / 2
    body = cylinder_body(radius, 0.0, 1.0, 0.012, power=40, depth=0.65, label=(0.1, 0.9))
    draw_body(body, skin(design))
    return body


def _perfume(design):
    radius, cap = design["aspect"] / 2, 0.2 * design["cap_height"]
    top = 1 - cap - 0.04
    power = 2.0 + 8 * design["roundness"]
    body = cylinder_body(radius, 0.0, top, 0.04, power, 0.55, label=(0.2, 0.75))
    draw_body(body, skin(design))
    tone = materials.tinted(color_of(design, "accent"), 0.9, 0.2)
    liquid = materials.plain("liquid", tone, 0.05, Transmission_Weight=0.6, IOR=1.33)
    raise_by(pillar("liquid", radius * 0.84, top * 0.72, liquid, 0.03, power, 0.45), 0.05)
    raise_by(pillar("collar", radius * 0.26, 0.06, materials.metal("gold"), 0.008), top - 0.01)
    raise_by(
        pillar("cap", radius * 0.36, cap, cap_material(design), 0.02, 2.0 if design["roundness"] < 0.5 else 6.0),
        top + 0.04,
    )
    return body


def _tin(design):
    radius = design["aspect"] / 2
    body = cylinder_body(radius * 0.97, 0.0, 0.62, 0.03, label=(0.12, 0.9))
    draw_body(body, skin(design))
    lid = cap_material(design) if design["finish"] != "metal" else materials.metal("silver", roughness=0.3)
    raise_by(pillar("lid", radius, 0.4, lid, 0.035), 0.6)
    return body


def _spray(design):
    """Bottle with a trigger head."""
    radius, neck = design["aspect"] / 2, 0.075
    body = shouldered(radius, 0.62, neck, 0.74, design["roundness"])
    draw_body(body, skin(design))
    material, trigger = cap_material(design), materials.plain("trigger", color_of(design, "accent"), 0.4)
    raise_by(pillar("collar", neck * 1.35, 0.08, material, 0.01), 0.72)
    head = pillar("head", 0.09, 0.26, material, 0.02, power=5.0, depth=0.55)
    head.rotation_euler = (0, math.radians(-90), 0)
    head.location = (0.13, 0, 0.905)
    raise_by(pillar("throat", 0.06, 0.12, material, 0.012), 0.79)
    nozzle = pillar("nozzle", 0.035, 0.05, trigger, 0.008)
    nozzle.rotation_euler = (0, math.radians(-90), 0)
    nozzle.location = (-0.12, 0, 0.915)
    lever = pillar("lever", 0.028, 0.2, trigger, 0.01, power=4.0)
    lever.rotation_euler = (0, math.radians(28), 0)
    lever.location = (-0.17, 0, 0.7)
    crown = pillar("crown", 0.1, 0.035, material, 0.012)
    crown.location = (0.02, 0, 0.965)
    return body


def _lipstick(design):
    """Open lipstick: sleeve, metal collar, slanted bullet."""
    radius = design["aspect"] / 2
    body = cylinder_body(radius, 0.0, 0.52, 0.015, 6.0 if design["roundness"] > 0.6 else 2.0, label=(0.1, 0.9))
    draw_body(body, skin(design))
    metal = materials.metal("gold" if design["cap"] in ("gold", "wood", "black") else "silver")
    raise_by(pillar("collar", radius * 0.82, 0.2, metal, 0.01), 0.5)
    bullet = pillar("bullet", radius * 0.62, 0.34, materials.plain("wax", color_of(design, "accent"), 0.3), 0.02)
    for vertex in bullet.data.vertices:  # cut at a slant
        if vertex.co.z > 0.2:
            vertex.co.z -= (vertex.co.x / radius + 0.62) * 0.11
    raise_by(bullet, 0.66)
    return body


def _object(design):
    """A modelled object: nothing to print on."""
    add_object(design["model"], design["tint"])


BUILDERS: dict[str, Callable[[Design], Body | None]] = {
    "bottle": _bottle, "dropper": _dropper, "pump": _pump, "jar": _jar, "tube": _tube,
    "can": _can, "aerosol": _aerosol, "carton": _carton, "perfume": _perfume, "tin": _tin,
    "spray": _spray, "lipstick": _lipstick, "object": _object,
    **MORE_BUILDERS,
}  # fmt: skip


def _patch(name, body: Body, half_width, low, high, material, offset=0.002, steps=36) -> None:
    """A printed rectangle on the front of the body."""
    x, z = np.meshgrid(np.linspace(-half_width, half_width, steps), body.rows(low, high))
    points = np.stack([x, body.front(x, z, offset), z], -1).reshape(-1, 3)
    patch = add_mesh(name, points, grid_faces(*x.shape), material, smooth=60.0)
    patch.visible_shadow = False  # print lies in the skin; the gap that keeps it from flickering must cast nothing


def _ring(name, body: Body, low, high, material, offset=0.002) -> None:
    """A printed band all the way round."""
    heights = body.rows(low, high)
    radii, ratios = body.section(heights)
    x_radii = radii + offset
    profile = list(zip(x_radii.tolist(), heights.tolist(), strict=True))
    depths = ((radii * ratios + offset) / x_radii).tolist()
    loft(name, profile, material, body.power, depths, 64 if body.power == 2 else 96)


def _print_text(text, body: Body, size, z, material, offset) -> None:
    """Lay the text on the front of the body by projecting each vertex onto it."""
    curve = bpy.data.curves.new("text", "FONT")
    curve.body = text
    curve.size = size
    curve.align_x = "CENTER"
    curve.align_y = "CENTER"
    curve.resolution_u = 3
    holder = bpy.data.objects.new("text_curve", curve)
    bpy.context.scene.collection.objects.link(holder)
    bpy.context.view_layer.update()
    flat = bpy.data.meshes.new_from_object(holder.evaluated_get(bpy.context.evaluated_depsgraph_get()))
    points = np.array([vertex.co[:] for vertex in flat.vertices])
    faces = [tuple(polygon.vertices) for polygon in flat.polygons]
    for data, collection in ((holder, bpy.data.objects), (curve, bpy.data.curves), (flat, bpy.data.meshes)):
        collection.remove(data)
    x, heights = points[:, 0], z + points[:, 1]
    ink = add_mesh("text", np.stack([x, body.front(x, heights, offset), heights], 1), faces, material, smooth=None)
    ink.visible_shadow = False


def _print_front(body: Body, half_width: float, paper: bpy.types.Material, accent: bpy.types.Material) -> None:
    _patch("label", body, half_width, *body.label, paper)


def _print_wrap(body: Body, half_width: float, paper: bpy.types.Material, accent: bpy.types.Material) -> None:
    _ring("label", body, *body.label, paper)


def _print_badge(body: Body, half_width: float, paper: bpy.types.Material, accent: bpy.types.Material) -> None:
    """A tall oval in the middle of the front, cut from strips."""
    low, high = body.label
    for share in np.linspace(-0.95, 0.95, 9):
        middle = (low + high) / 2 + share * (high - low) / 2
        width = half_width * math.sqrt(1 - share**2)
        _patch("label", body, width, middle - (high - low) / 17, middle + (high - low) / 17, paper)


def _print_band(body: Body, half_width: float, paper: bpy.types.Material, accent: bpy.types.Material) -> None:
    """A coloured band around the foot, and paper above it."""
    low, high = body.label
    seam = low + 0.3 * (high - low)
    _ring("band", body, low, seam, accent)
    _ring("label", body, seam, high, paper)


def _print_block(body: Body, half_width: float, paper: bpy.types.Material, accent: bpy.types.Material) -> None:
    """The upper part of the print in paper, all the way round."""
    low, high = body.label
    _ring("label", body, low + 0.4 * (high - low), high, paper)


_LAYOUTS: dict[str, Callable[[Body, float, bpy.types.Material, bpy.types.Material], None]] = {
    "front": _print_front,
    "wrap": _print_wrap,
    "badge": _print_badge,
    "band": _print_band,
    "block": _print_block,
}


def _print_label(design: Design, body: Body) -> None:
    low, high = body.label
    radius = float(body.section(np.array((low + high) / 2))[0])
    paper = materials.plain("paper", color_of(design, "label"), 0.65)
    accent = materials.plain("stripe", color_of(design, "accent"), 0.5)
    half_width = radius * (0.8 if body.power == 2 else 0.72)
    labelled = design["label"] != "none"
    if labelled:
        _LAYOUTS[design["label"]](body, half_width, paper, accent)
    span = high - low
    for index in range(design["stripes"]):
        bottom = low + span * (0.08 + 0.1 * index)
        _patch("stripe", body, half_width * (0.86 if labelled else 0.7), bottom, bottom + span * 0.05, accent, 0.004)
    dark_body = sum(color_of(design, "body")) < 0.9
    ink_color = color_of(design, "ink") if labelled else ((0.9, 0.87, 0.8) if dark_body else color_of(design, "ink"))
    size = min(span * 0.5, half_width * 2.5 / len(design["brand"]))
    _print_text(design["brand"], body, size, low + span * 0.6, materials.plain("ink", ink_color, 0.55), 0.0045)


def add_product(design: Design, height: float, at: tuple[float, float, float], turn: float) -> list[bpy.types.Object]:
    """Build the product `height` scene units high at (x, y, z), turned by `turn` degrees; returns its objects."""
    before = set(bpy.context.scene.objects)
    body = BUILDERS[design["kind"]](design)
    if body is not None:
        _print_label(design, body)
    parts = [obj for obj in bpy.context.scene.objects if obj not in before]
    bpy.context.view_layer.update()
    place = Matrix.Translation(at) @ Matrix.Rotation(math.radians(turn), 4, "Z") @ Matrix.Scale(height, 4)
    for part in parts:
        part.matrix_world = place @ part.matrix_world
        part.pass_index = 1
    return parts

"""Meshes from numpy arrays: lofts, planes, displaced grids, pebbles, leaves. Units: the frame is 3 wide and high."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import bpy
import numpy as np


def add_mesh(name: str, vertices, faces, material=None, smooth: float | None = 35.0) -> bpy.types.Object:
    """Link a new mesh object. `smooth` is the angle in degrees above which an edge stays sharp; None shades flat."""
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata(np.asarray(vertices, float).tolist(), [], [tuple(map(int, face)) for face in faces])
    mesh.validate()
    if smooth is not None:
        mesh.shade_smooth()
        mesh.set_sharp_from_angle(angle=math.radians(smooth))
    if material is not None:
        mesh.materials.append(material)
    obj = bpy.data.objects.new(name, mesh)
    bpy.context.scene.collection.objects.link(obj)
    return obj


def link_copy(obj: bpy.types.Object) -> bpy.types.Object:
    """Another object with the same mesh: many of them cost little more than one."""
    copy = bpy.data.objects.new(obj.name, obj.data)
    bpy.context.scene.collection.objects.link(copy)
    return copy


def grid_faces(rows: int, columns: int, wrap: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Quads (n, 4) between the neighbours of a grid of points that are numbered row by row.

    wrap: 1 where the last (row, column) meets the first.
    """
    index = np.pad(np.arange(rows * columns).reshape(rows, columns), ((0, wrap[0]), (0, wrap[1])), "wrap")
    return np.stack([index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]], -1).reshape(-1, 4)


def arc(x: float, z: float, radius: float, start: float, stop: float, steps: int = 6) -> list[tuple[float, float]]:
    """Points (r, z) on a circle around (x, z), from angle `start` to `stop` in degrees."""
    angles = np.radians(np.linspace(start, stop, steps + 1))
    return [(x + radius * math.cos(a), z + radius * math.sin(a)) for a in angles]


def superellipse(angles, power: float):
    """Unit cross section |x|^p + |y|^p = 1 at the angles (radians): 2 is a circle, 8 a square with round corners."""
    cos = np.cos(angles)
    sin = np.sin(angles)
    return np.sign(cos) * np.abs(cos) ** (2 / power), np.sign(sin) * np.abs(sin) ** (2 / power)


def loft(name, profile, material=None, power=2.0, depths: Sequence[float] | None = None, steps=64) -> bpy.types.Object:
    """Closed surface from a profile of (radius, z); `depths` gives y radius / x radius for each profile point."""
    depths = depths if depths is not None else [1.0] * len(profile)
    x, y = superellipse(np.linspace(0, 2 * np.pi, steps, endpoint=False), power)
    rings = [np.stack([r * x, r * d * y, np.full(steps, z)], 1) for (r, z), d in zip(profile, depths, strict=True)]
    base = np.arange(steps)
    # End caps are fans of one n-gon: profiles start and end on the axis or close flat.
    caps = [base[::-1], (len(profile) - 1) * steps + base]
    return add_mesh(name, np.concatenate(rings), [*grid_faces(len(profile), steps, (0, 1)), *caps], material)


def pillar(name, radius, height, material, bevel=0.03, power=2.0, depth=1.0) -> bpy.types.Object:
    """Upright cylinder (or rounded square for a high power) with bevelled edges, standing on z = 0."""
    bevel = min(bevel, radius * 0.45, height * 0.45)
    profile = [*arc(radius - bevel, bevel, bevel, -90, 0, 4), *arc(radius - bevel, height - bevel, bevel, 0, 90, 4)]
    return loft(name, profile, material, power, [depth] * len(profile), 96 if power > 2 else 64)


def cuboid(name, size, material, bevel=0.02) -> bpy.types.Object:
    """Box of size (x, y, z) standing on z = 0, with bevelled edges."""
    corners = np.array(list(itertools.product((-1, 1), repeat=3))) * (np.array(size) / 2)
    corners[:, 2] += size[2] / 2
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    box = add_mesh(name, corners, faces, material)
    modifier = box.modifiers.new("bevel", "BEVEL")
    modifier.width = bevel
    modifier.segments = 2
    return box


def tube(
    name: str, points: Sequence[Sequence[float]], radius: float, material, across: Sequence[float], closed=False
) -> bpy.types.Object:
    """A round wire along a line of points. `across` is a direction that the line never takes, as its plane's normal."""
    line = np.array(points, float)
    ahead = np.roll(line, -1, axis=0) - np.roll(line, 1, axis=0) if closed else np.gradient(line, axis=0)
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    side = np.cross(ahead, np.array(across, float))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    up = np.cross(side, ahead)
    angles = np.linspace(0, 2 * np.pi, 10, endpoint=False)[:, None, None]
    rings = line + radius * (np.cos(angles) * side + np.sin(angles) * up)  # (10, points, 3)
    count = len(line)
    faces = list(grid_faces(10, count, (1, int(closed)))[:, [0, 3, 2, 1]])
    if not closed:
        ends = count * np.arange(10)
        faces += [ends[::-1], ends + count - 1]
    return add_mesh(name, rings.reshape(-1, 3), faces, material, smooth=60.0)


def plane(name, half_x, half_y, material, location=(0, 0, 0), rotation=(0, 0, 0)) -> bpy.types.Object:
    corners = [(-half_x, -half_y, 0), (half_x, -half_y, 0), (half_x, half_y, 0), (-half_x, half_y, 0)]
    obj = add_mesh(name, corners, [(0, 1, 2, 3)], material, smooth=None)
    obj.location = location
    obj.rotation_euler = rotation
    return obj


def relief(name, x_range, y_range, height, material, steps=140) -> bpy.types.Object:
    """Grid whose z is `height(x, y)`, a function of numpy arrays."""
    x, y = np.meshgrid(np.linspace(*x_range, steps), np.linspace(*y_range, steps))
    points = np.stack([x, y, height(x, y)], -1).reshape(-1, 3)
    return add_mesh(name, points, grid_faces(steps, steps), material, smooth=180.0)


def sphere_points(rows=24, columns=36) -> tuple[np.ndarray, np.ndarray]:
    """Vertices of a unit sphere and its faces; the first and last rows are tiny rings around the poles."""
    polar, around = np.meshgrid(
        np.linspace(1e-3, np.pi - 1e-3, rows), np.linspace(0, 2 * np.pi, columns, endpoint=False), indexing="ij"
    )
    points = np.stack([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], -1).reshape(
        -1, 3
    )
    return points, grid_faces(rows, columns, (0, 1))[:, [0, 3, 2, 1]]


def bumps(points: np.ndarray, rng, count=10, frequency=2.0) -> np.ndarray:
    """Smooth noise in about [-1, 1] at points (n, 3): a sum of random plane waves."""
    total = np.zeros(len(points))
    for _ in range(count):
        wave = np.array([rng.gauss(0, 1) for _ in range(3)]) * frequency
        total += np.sin(points @ wave + rng.uniform(0, 6.28))
    return total / math.sqrt(count)


def pebble(name, radii, rng, material, roughness=0.08) -> bpy.types.Object:
    """Ellipsoid with the three radii, disturbed by smooth noise, lying on z = 0."""
    points, faces = sphere_points()
    points = points * (1 + roughness * bumps(points, rng, 6, 1.2))[:, None] * np.array(radii)
    points[:, 2] -= points[:, 2].min()
    return add_mesh(name, points, faces, material, smooth=180.0)


def leaf(name, length, width, material, curl=0.25, fold=0.2, steps=8) -> bpy.types.Object:
    """Pointed leaf from the origin along +y, drooping by `curl` and folded along its rib by `fold`."""
    t = np.linspace(0, 1, steps + 1)
    half = width * np.sin(np.pi * t**0.8) ** 0.9 * 0.5
    columns = []
    for side in (-1.0, 0.0, 1.0):
        columns.append(np.stack([side * half, length * t, fold * half * abs(side) - curl * length * t**2], 1))
    points = np.concatenate(columns)
    return add_mesh(name, points, grid_faces(3, steps + 1)[:, [0, 3, 2, 1]], material, smooth=180.0)


def frond(name, length, material, droop=0.3, pairs=15, leaflet=0.42, width=0.035) -> bpy.types.Object:
    """Palm frond along +y in the xy plane, bending to -z by `droop`: a rib with pairs of narrow leaflets."""
    points, faces = [], []

    def bend(p):
        return (p[0] * length, p[1] * length, -droop * length * p[1] ** 2 - 0.35 * abs(p[0]) ** 2 * length)

    for side in (-1, 1):
        for k in range(pairs):
            t = 0.08 + 0.9 * k / (pairs - 1)
            reach = leaflet * (math.sin(math.pi * (0.18 + 0.74 * t)) + 0.1)
            angle = math.radians(62 - 34 * t)
            along = np.array([side * math.sin(angle), math.cos(angle)])
            across = np.array([-along[1], along[0]]) * width
            root = np.array([0.0, t])
            outline = [
                root - across * 0.3,
                root + along * reach * 0.45 - across,
                root + along * reach,
                root + along * reach * 0.45 + across,
                root + across * 0.3,
            ]
            faces.append(tuple(range(len(points), len(points) + 5)))
            points += map(bend, outline)
    rib = [(-0.012, -0.3), (0.012, -0.3), (0.004, 1.0), (-0.004, 1.0)]
    for lower, upper in zip(np.linspace(0, 1, 9)[:-1], np.linspace(0, 1, 9)[1:], strict=True):
        quad = []
        for left, right, t in (
            (rib[0], rib[3], lower),
            (rib[1], rib[2], lower),
            (rib[1], rib[2], upper),
            (rib[0], rib[3], upper),
        ):
            quad.append((left[0] + (right[0] - left[0]) * t, left[1] + (right[1] - left[1]) * t))
        faces.append(tuple(range(len(points), len(points) + 4)))
        points += map(bend, quad)
    return add_mesh(name, points, faces, material, smooth=180.0)

"""What stands around the product: one builder for each phrase of the vocabulary's SURROUNDINGS."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import bpy
import numpy as np
from mathutils import Euler, Matrix, Vector

from packshot.render import materials
from packshot.render.mesh import add_mesh, cuboid, frond, grid_faces, leaf, loft, pebble, pillar, sphere_points
from packshot.scene.vocabulary import split_position


@dataclass(frozen=True)
class Zone:
    """Where things stand: |x| and y of a bunch's foot, depths (y) of single things, and their size."""

    x: tuple[float, float]
    y: tuple[float, float]
    depth: tuple[float, float] | None = None  # None: what suits the thing
    scale: float = 1.0


BESIDE = Zone((1.05, 1.35), (0.3, 0.85))
BEHIND = Zone((0.3, 0.75), (1.1, 1.5), (0.75, 1.6))
CORNER = Zone((0.95, 1.1), (-1.05, -0.75), (-1.15, -0.65), 0.8)


@dataclass
class Layout:
    """Free places on the surface around the product; `clear` is the radius that belongs to product and podium."""

    rng: random.Random
    zone: Zone
    sides: tuple[int, ...]
    clear: float
    floor_z: Callable[[float, float], float]
    taken: list[tuple[float, float, float]] = field(default_factory=list)

    def spot(self, radius: float, depth: tuple[float, float], reach=1.42) -> Vector | None:
        """A place (x, y, z) for something of this radius in the zone, or None when it is full."""
        if self.zone is BEHIND:
            return self._free(radius, lambda y: (0.15, 1.0 + 0.12 * y), self.zone.depth or depth)
        if self.zone is CORNER:  # never between the product and the camera
            return self._free(radius, lambda y: (max(0.85, self.clear + radius * 0.6), 1.2), self.zone.depth or depth)

        def span(y: float) -> tuple[float, float]:
            # The frame widens behind the product: |x| may grow with y and still be seen.
            nearest = max(self.clear + radius, 0.35) if abs(y) < self.clear + radius else self.clear * 0.7
            return nearest, max(nearest + 0.05, reach + 0.16 * y - radius * 0.3)

        return self._free(radius, span, self.zone.depth or depth)

    def _free(self, radius, span: Callable[[float], tuple[float, float]], depth: tuple[float, float]) -> Vector | None:
        for _ in range(40):
            y = self.rng.uniform(*depth)
            x = self.rng.choice(self.sides) * self.rng.uniform(*span(y))
            if math.hypot(x, y) < self.clear + radius * 0.9:
                continue
            if all(math.hypot(x - a, y - b) > radius + r for a, b, r in self.taken):
                self.taken.append((x, y, radius))
                return Vector((x, y, self.floor_z(x, y)))
        return None

    def foot(self, side: int, radius: float) -> Vector:
        """Where a bunch or a stack of this radius stands on one side, clear of product and podium."""
        x, y = self.rng.uniform(*self.zone.x), self.rng.uniform(*self.zone.y)
        away = max(1.0, (self.clear + radius) / math.hypot(x, y))
        x, y = side * x * min(away, 1.25), y * min(away, 1.35)
        self.taken.append((x, y, radius))
        return Vector((x, y, self.floor_z(x, y)))


def _place(obj: bpy.types.Object, location, rotation=(0, 0, 0), scale=1.0) -> bpy.types.Object:
    obj.matrix_world = Matrix.Translation(location) @ Euler(rotation).to_matrix().to_4x4() @ Matrix.Scale(scale, 4)
    return obj


def _clusters(layout: Layout, each: int) -> int:
    return each * len(layout.sides)


def _palm_leaves(layout: Layout) -> None:
    rng, scale = layout.rng, layout.zone.scale
    green = materials.foliage((0.1, 0.3, 0.05))
    for side in layout.sides:
        foot = layout.foot(side, 0.3)
        for index in range(3):
            obj = frond("palm", scale * rng.uniform(1.5, 2.1), green, rng.uniform(0.15, 0.4), width=0.03)
            base = foot + Vector((side * rng.uniform(0, 0.2), rng.uniform(0, 0.3), rng.uniform(0.1, 0.45) * scale))
            lean = side * -rng.uniform(-0.1, 0.6) + (index - 1) * 0.5
            _place(obj, base, (math.radians(rng.uniform(70, 95)), lean, rng.uniform(-0.3, 0.3)))


def _pampas_grass(layout: Layout) -> None:
    """Dry plumes: a stalk with many fine drooping hairs towards its tip."""
    rng, scale = layout.rng, layout.zone.scale
    straw = materials.plain("straw", (0.62, 0.46, 0.27), 0.9)
    fluff = materials.plain("fluff", (0.8, 0.68, 0.5), 1.0, Sheen_Weight=0.4)
    for side in layout.sides:
        foot = layout.foot(side, 0.25)
        for _ in range(5):
            height, lean = scale * rng.uniform(1.3, 2.1), (rng.gauss(0.05 * side, 0.16), rng.gauss(0, 0.1))
            points, faces = [], []
            for k in range(260):
                t = rng.uniform(0.45, 1.0)
                root = np.array([lean[0] * t * t, lean[1] * t * t, t]) * height
                around, reach = rng.uniform(0, 6.28), 0.15 * height * (1.1 - t) ** 0.5 * rng.uniform(0.5, 1)
                tip = root + np.array([math.cos(around) * reach * 0.55, math.sin(around) * reach * 0.55, reach * 0.7])
                across = np.array([-math.sin(around), math.cos(around), 0.0]) * 0.014
                faces.append((3 * k, 3 * k + 1, 3 * k + 2))
                points += [root - across, root + across, tip]
            _place(add_mesh("plume", points, faces, fluff, smooth=None), foot)
            stalk = [(lean[0] * t * t * height, lean[1] * t * t * height, t * height) for t in np.linspace(0, 1, 8)]
            ribbon = [(x + dx, y, z) for x, y, z in stalk for dx in (-0.014, 0.014)]
            _place(add_mesh("stalk", ribbon, grid_faces(8, 2), straw, smooth=None), foot)


def _spray_of_leaves(layout, base, count, length, green) -> None:
    """Leaves on one bending twig, alternating sides, tips facing up and outwards."""
    rng = layout.rng
    lean = rng.uniform(-0.5, 0.5)
    for k in range(count):
        t = k / count
        obj = leaf(
            "leaf", length * rng.uniform(0.75, 1.15), length * rng.uniform(0.42, 0.55), green, rng.uniform(0.1, 0.35)
        )
        origin = Vector(base) + Vector((lean * t * 0.5, 0, t * 0.95 * layout.zone.scale))
        _place(
            obj,
            origin,
            (
                math.radians(rng.uniform(45, 80)),
                (1 if k % 2 else -1) * rng.uniform(0.5, 1.2) + lean,
                rng.uniform(-0.5, 0.5),
            ),
        )


def _green_leaves(layout: Layout) -> None:
    rng, scale = layout.rng, layout.zone.scale
    for side in layout.sides:
        green = materials.foliage(rng.choice(((0.06, 0.24, 0.06), (0.12, 0.3, 0.09), (0.16, 0.32, 0.05))))
        foot = layout.foot(side, 0.3)
        _spray_of_leaves(layout, foot + Vector((0, 0, 0.05)), 9, 0.52 * scale, green)
        _spray_of_leaves(layout, foot + Vector((side * 0.22, -0.15, 0)), 8, 0.45 * scale, green)
        for _ in range(2):
            if spot := layout.spot(0.16, (-0.5, 0.2)):
                flat = leaf("fallen", 0.45 * scale, 0.2 * scale, green, curl=0.1)
                turn = (rng.uniform(-0.05, 0.1), rng.uniform(-0.2, 0.2), rng.uniform(0, 6.28))
                _place(flat, spot + Vector((0, 0, 0.05)), turn)


def _flower(rng, center, size, petals_material, heart_material) -> None:
    """Two rows of petals around a heart, facing up and towards the camera."""
    face = (
        Matrix.Translation(center)
        @ Euler((math.radians(rng.uniform(25, 60)), rng.uniform(-0.4, 0.4), 0)).to_matrix().to_4x4()
    )
    for row, (count, lift, share) in enumerate(((7, 12, 1.0), (5, 42, 0.7))):
        for k in range(count):
            petal = leaf("petal", size * share, size * share * 0.72, petals_material, -0.12, 0.18, 6)
            around = 2 * math.pi * (k + 0.5 * row) / count + rng.uniform(-0.1, 0.1)
            petal.matrix_world = face @ Matrix.Rotation(around, 4, "Z") @ Matrix.Rotation(math.radians(lift), 4, "X")
    points, faces = sphere_points(10, 14)
    heart = add_mesh("heart", points * size * 0.2, faces, heart_material, smooth=180.0)
    heart.matrix_world = face @ Matrix.Translation((0, 0, size * 0.1))


def _flowers(color) -> Callable[[Layout], None]:
    def build(layout: Layout) -> None:
        rng = layout.rng
        petals = materials.plain("petals", color, 0.6, Sheen_Weight=0.2)
        heart = materials.plain("heart", (0.85, 0.5, 0.06), 0.7)
        green = materials.foliage((0.08, 0.24, 0.06))
        for _ in range(_clusters(layout, 4)):
            size = rng.uniform(0.2, 0.3)
            if spot := layout.spot(size * 0.75, (-0.45, 0.8)):
                lift = size * 0.55 + max(0.0, spot.y) * 0.5
                _flower(rng, spot + Vector((0, 0, lift)), size, petals, heart)
                for _ in range(2):
                    _place(
                        leaf("sepal", size * 1.5, size * 0.55, green, 0.2),
                        spot + Vector((0, 0, lift * 0.6)),
                        (0.3, 0, rng.uniform(0, 6.28)),
                    )

    return build


def _smooth_stones(layout: Layout) -> None:
    rng = layout.rng
    tones = ((0.28, 0.27, 0.26), (0.5, 0.47, 0.43), (0.1, 0.1, 0.105), (0.4, 0.33, 0.26))
    for _ in range(_clusters(layout, 5)):
        size = rng.uniform(0.12, 0.32)
        if spot := layout.spot(size, (-0.6, 0.8)):
            tone = rng.choice(tones)
            stops = [(0.3, materials.tinted(tone, 0.8)), (0.7, tone)]
            material = materials.mottled("pebble", stops, 12, 0.5, bump=0.1)
            stone = pebble("pebble", (size, size * rng.uniform(0.65, 0.9), size * rng.uniform(0.4, 0.6)), rng, material)
            _place(stone, spot, (0, 0, rng.uniform(0, 6.28)))


def _white_boxes(layout: Layout) -> None:
    rng = layout.rng
    white = materials.plain("white_box", (0.86, 0.86, 0.85), 0.55)
    for size, depth in ((0.75, (0.6, 1.0)), (0.5, (0.1, 0.5)), (0.34, (-0.4, 0.1))):
        for _ in layout.sides:
            if spot := layout.spot(size * 0.6, depth):
                _place(
                    cuboid("box", (size, size, size * rng.uniform(0.8, 1.7)), white),
                    spot,
                    (0, 0, rng.uniform(-0.5, 0.5)),
                )


def _gold_beads(layout: Layout) -> None:
    rng = layout.rng
    gold = materials.metal("gold", roughness=0.16)
    points, faces = sphere_points(18, 28)
    for _ in range(_clusters(layout, 13)):
        radius = rng.choice((0.06, 0.08, 0.11, 0.17))
        if spot := layout.spot(radius, (-0.8, 0.7)):
            _place(add_mesh("bead", points * radius, faces, gold, smooth=180.0), spot + Vector((0, 0, radius)))


def _glass_spheres(layout: Layout) -> None:
    rng = layout.rng
    tone = rng.choice(((0.95, 0.98, 0.97), (0.85, 0.93, 0.98), (0.98, 0.86, 0.86)))
    clear = materials.glass("sphere", tone, 0.0)
    points, faces = sphere_points(28, 40)
    for _ in range(_clusters(layout, 5)):
        radius = rng.choice((0.12, 0.17, 0.24, 0.3))
        if spot := layout.spot(radius, (-0.6, 0.8)):
            _place(add_mesh("sphere", points * radius, faces, clear, smooth=180.0), spot + Vector((0, 0, radius)))


def _half_fruit(radius, rind, flesh, pith) -> list[bpy.types.Object]:
    """A halved citrus: a bowl of rind, a pale disc, and wedges of flesh; the cut faces +z."""
    bowl = loft(
        "half",
        [(radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(-math.pi / 2 + 0.02, 0, 10)],
        rind,
        steps=40,
    )
    disc = loft("pith", [(radius * 0.985, 0.0), (radius * 0.97, 0.006)], pith, steps=40)
    parts = [bowl, disc]
    for k in range(9):
        start, stop = 2 * math.pi * (k + 0.06) / 9, 2 * math.pi * (k + 0.94) / 9
        rim = [(radius * 0.86 * math.cos(a), radius * 0.86 * math.sin(a), 0.012) for a in np.linspace(start, stop, 5)]
        middle = (radius * 0.1 * math.cos((start + stop) / 2), radius * 0.1 * math.sin((start + stop) / 2), 0.012)
        parts.append(add_mesh("wedge", [middle, *rim], [tuple(range(6))], flesh, smooth=None))
    return parts


def _fruits(color, flesh_color, stretch: float, size: tuple[float, float]) -> Callable[[Layout], None]:
    def build(layout: Layout) -> None:
        rng = layout.rng
        rind, flesh = materials.citrus(color), materials.plain("flesh", flesh_color, 0.3, Coat_Weight=0.4)
        pith, green = materials.plain("pith", (0.9, 0.82, 0.62), 0.6), materials.foliage((0.06, 0.22, 0.03))
        points, faces = sphere_points()
        # A lemon is a sphere drawn out to two tips.
        tips = points * np.stack(
            [np.ones(len(points))] * 2 + [1 + (stretch - 1) * np.abs(points[:, 2]) ** 3 + 0.12 * (stretch - 1)], 1
        )
        for k in range(_clusters(layout, 3)):
            radius = rng.uniform(*size)
            if not (spot := layout.spot(radius, (-0.45, 0.75))):
                continue
            if k % 3 == 1:
                tilt = (
                    Matrix.Translation(spot + Vector((0, 0, radius * 0.8)))
                    @ Euler((math.radians(62), 0, rng.uniform(-0.6, 0.6))).to_matrix().to_4x4()
                )
                for part in _half_fruit(radius, rind, flesh, pith):
                    part.matrix_world = tilt
                continue
            _place(
                add_mesh("fruit", tips * radius, faces, rind, smooth=180.0),
                spot + Vector((0, 0, radius)),
                (math.radians(80 if stretch > 1 else 20), 0, rng.uniform(0, 6.28)),
            )
            if stretch == 1:
                _place(
                    leaf("fruit_leaf", radius * 1.3, radius * 0.6, green),
                    spot + Vector((0, 0, radius * 1.95)),
                    (0.3, 0, rng.uniform(0, 6.28)),
                )

    return build


def _apples(layout: Layout) -> None:
    """Dented above and below, with a stalk."""
    rng = layout.rng
    skin = materials.mottled("apple", [(0.35, (0.2, 0.42, 0.03)), (0.65, (0.42, 0.6, 0.08))], 6, 0.25, Coat_Weight=0.3)
    wood = materials.plain("stalk", (0.12, 0.06, 0.03), 0.8)
    points, faces = sphere_points()
    across = np.hypot(points[:, 0], points[:, 1])
    body = points.copy()
    body[:, 2] = points[:, 2] * 0.92 - 0.3 * np.sign(points[:, 2]) * np.exp(-((across / 0.32) ** 2))
    for _ in range(_clusters(layout, 3)):
        radius = rng.uniform(0.2, 0.27)
        if spot := layout.spot(radius, (-0.45, 0.75)):
            center, turn = spot + Vector((0, 0, radius * 0.85)), (rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35), 0)
            _place(add_mesh("apple", body * radius, faces, skin, smooth=180.0), center, turn)
            stalk = pillar("stalk", radius * 0.05, radius * 0.6, wood, 0.002)
            stalk.data.transform(Matrix.Translation((0, 0, radius * 0.55)))
            _place(stalk, center, turn)


def _candles(layout: Layout) -> None:
    rng = layout.rng
    wax = materials.plain("wax", (0.85, 0.78, 0.64), 0.5, Subsurface_Weight=0.0)
    wick, flame = materials.plain("wick", (0.02, 0.02, 0.02)), materials.glow("flame", (1.0, 0.5, 0.12), 14)
    for _ in range(_clusters(layout, 3)):
        radius, height = rng.uniform(0.13, 0.19), rng.uniform(0.45, 1.1)
        if not (spot := layout.spot(radius + 0.03, (0.0, 0.9))):
            continue
        _place(pillar("candle", radius, height, wax, 0.02), spot)
        _place(pillar("wick", 0.012, 0.08, wick, 0.002), spot + Vector((0, 0, height)))
        drop = [(0.045 * math.sin(math.pi * t) ** 0.8 * (1 - 0.55 * t) + 0.001, 0.22 * t) for t in np.linspace(0, 1, 9)]
        _place(loft("flame", drop, flame, steps=16), spot + Vector((0, 0, height + 0.05)))
        lamp = bpy.data.lights.new("flame", "POINT")
        lamp.energy, lamp.color, lamp.shadow_soft_size = 9, (1, 0.55, 0.2), 0.06
        holder = bpy.data.objects.new("flame_light", lamp)
        holder.location = spot + Vector((0, 0, height + 0.16))
        holder.visible_camera = False
        bpy.context.scene.collection.objects.link(holder)


def _books(layout: Layout) -> None:
    rng, scale = layout.rng, layout.zone.scale
    paper = materials.plain("pages", (0.85, 0.79, 0.66), 0.8)
    covers = (
        (0.4, 0.05, 0.04),
        (0.03, 0.1, 0.25),
        (0.05, 0.2, 0.13),
        (0.75, 0.5, 0.12),
        (0.7, 0.65, 0.58),
        (0.05, 0.05, 0.06),
    )
    for side in layout.sides:
        x, y, z = layout.foot(side, 0.55)
        for color in rng.sample(covers, rng.choice((3, 4, 5))):
            thick, turn = rng.uniform(0.1, 0.19), rng.uniform(-0.25, 0.25)
            width, depth = scale * rng.uniform(0.95, 1.1), scale * rng.uniform(0.65, 0.8)
            cover = materials.plain("cover", color, 0.5)
            _place(cuboid("cover", (width, depth, 0.02), cover, 0.004), (x, y, z), (0, 0, turn))
            _place(
                cuboid("pages", (width - 0.06, depth - 0.04, thick - 0.04), paper, 0.004),
                (x, y, z + 0.02),
                (0, 0, turn),
            )
            _place(cuboid("cover", (width, depth, 0.02), cover, 0.004), (x, y, z + thick - 0.02), (0, 0, turn))
            spine = Matrix.Rotation(turn, 3, "Z") @ Vector((0, -depth / 2, 0))
            _place(cuboid("spine", (width, 0.03, thick), cover, 0.004), Vector((x, y, z)) + spine, (0, 0, turn))
            z += thick


BUILDERS: dict[str, Callable[[Layout], None]] = {
    "palm leaves": _palm_leaves,
    "green leaves": _green_leaves,
    "pampas grass": _pampas_grass,
    "white flowers": _flowers((0.88, 0.86, 0.83)),
    "pink flowers": _flowers((0.88, 0.2, 0.36)),
    "smooth stones": _smooth_stones,
    "white boxes": _white_boxes,
    "gold beads": _gold_beads,
    "glass spheres": _glass_spheres,
    "oranges": _fruits((0.95, 0.3, 0.02), (0.95, 0.36, 0.03), 1.0, (0.22, 0.3)),
    "lemons": _fruits((0.95, 0.68, 0.03), (0.93, 0.75, 0.18), 1.32, (0.17, 0.23)),
    "green apples": _apples,
    "candles": _candles,
    "books": _books,
}


_PLACES: dict[str, tuple[Zone, tuple[int, ...] | None]] = {
    "on the left side": (BESIDE, (-1,)),
    "on the right side": (BESIDE, (1,)),
    "behind it": (BEHIND, (-1, 1)),
    "in the corner": (CORNER, None),  # left or right
}


def add_surroundings(phrases: list[str], seed: int, clear: float, floor_z: Callable[[float, float], float]) -> None:
    """Place the phrases' objects where the phrases put them; without a position, next to the product on a free side."""
    rng = random.Random(f"packshot-props-{seed}")
    free = [-1, 1]
    rng.shuffle(free)
    alone = len(phrases) == 1 and rng.random() < 0.6
    taken: list[tuple[float, float, float]] = []
    # Things with a place of their own first: the others take what is left.
    for phrase in sorted(phrases, key=lambda phrase: split_position(phrase)[1] is None):
        thing, position = split_position(phrase)
        zone, sides = _PLACES.get(position or "", (BESIDE, None))
        if sides is None:
            sides = (-1, 1) if alone and position is None else (free[0],)
        if zone is not BEHIND:
            free = [side for side in free if side not in sides] or free
        BUILDERS[thing](Layout(rng, zone, sides, clear, floor_z, taken))

"""The second generation of render jobs: other views, sizes, places, frames and products. Keyed by seed, pure Python.

Seeds from ``FIRST_SEED`` on belong to it (``run.seed`` from 100 on), so that every earlier seed keeps its scene.
"""

from __future__ import annotations

import math
import random

from packshot.render.frame import FRAME, Item, Words
from packshot.scene.vocabulary import BACKDROPS, STUDIO_COLORS, SWEEPS, VIEWS

FIRST_SEED = 100_000_000

PACKAGE_COUNT = 224  # ids "q000" to "q223"
ASPECTS = {  # width / height of the kinds that this generation adds
    "wine-bottle": (0.25, 0.3), "pouch": (0.6, 0.8), "mug": (0.95, 1.2), "paper-bag": (0.65, 0.9),
    "roll-on": (0.3, 0.36), "wine-glass": (0.36, 0.46), "tumbler": (0.6, 0.85), "vase": (0.4, 0.62),
    "carafe": (0.42, 0.55), "diffuser": (0.42, 0.6), "bracelet": (1.6, 2.2), "sunglasses": (2.2, 2.8),
    "desk-lamp": (0.6, 0.8), "wire-basket": (1.0, 1.5), "stool": (0.6, 0.8), "candlestick": (0.3, 0.45),
}  # fmt: skip
FINISHES = {
    "wine-bottle": ("glass", "glass", "frosted"),
    "pouch": ("matte", "metal", "glossy"),
    "mug": ("glossy", "matte"),
    "paper-bag": ("matte",),
    "roll-on": ("glass", "glossy", "frosted"),
    "wine-glass": ("glass",),
    "tumbler": ("glass",),
    "vase": ("glass", "glossy", "matte"),
    "carafe": ("glass",),
    "diffuser": ("glass", "frosted", "matte"),
    "bracelet": ("metal",),
    "sunglasses": ("glossy", "metal"),
    "desk-lamp": ("metal", "glossy", "matte"),
    "wire-basket": ("metal", "matte"),
    "stool": ("matte", "glossy"),
    "candlestick": ("metal", "matte"),
}
LABELS = ("front", "wrap", "none", "badge", "band", "block")

# Share of the scenes in a studio: on a sweep, or in front of a backdrop.
ON_SWEEP = 0.22
BEFORE_BACKDROP = 0.08
STUDIO_WEIGHTS = (5, 3, 1, 1, 1, 1, 1, 1)  # of the colours: most studios are white or grey
SEVERAL = 0.12  # share of the scenes that show a set of two or three products
FRAMES = {(1.0, 1.0): 0.6, (0.75, 1.0): 0.2, (1.0, 0.75): 0.2}  # (width, height): share
MARGIN = 0.05  # of the frame, kept free around the product
_LOW, _HIGH, _TOP = VIEWS


def draw_frame(rng: random.Random) -> tuple[float, float]:
    """(width, height) of the picture, the longer one 1."""
    return rng.choices(list(FRAMES), list(FRAMES.values()))[0]


def draw_view(rng: random.Random) -> tuple[float, str | None]:
    """The camera's elevation in degrees, and the style phrase that describes it."""
    form = rng.random()
    if form < 0.12:
        return rng.uniform(-9, -2), _LOW
    if form < 0.3:
        return rng.uniform(32, 46), _HIGH
    if form < 0.38:
        return rng.uniform(60, 84), _TOP
    return rng.triangular(2, 30, 10), None


def studio(scene: Words, rng: random.Random) -> Words:
    """The scene on a studio sweep or before a backdrop, for the share of scenes that are; else as it is."""
    form = rng.random()
    number = rng.choices(range(len(SWEEPS)), STUDIO_WEIGHTS)[0]
    if form < ON_SWEEP + BEFORE_BACKDROP and ("neon" in scene["lighting"] or STUDIO_COLORS[number] == "black"):
        scene = scene | {"lighting": "studio lighting"}
    if form < ON_SWEEP:
        # what is around a product in a studio is mostly nothing
        around = scene["surroundings"] if rng.random() < 0.25 else []
        return scene | {"surface": SWEEPS[number], "background": BACKDROPS[number], "surroundings": around}
    if form < ON_SWEEP + BEFORE_BACKDROP:
        return scene | {"background": BACKDROPS[number]}
    return scene


def radius_of(item: Item) -> float:
    """Radius of a product on the ground, in scene units; its height is a share of the frame."""
    return 0.5 * item["height"] * FRAME * item["product"]["footprint"]


def place_set(items: list[Item], rng: random.Random) -> None:
    """Sets the `place` of each product of a set: side by side, no two touching, the set's middle at (0, 0)."""
    x = 0.0
    for number, item in enumerate(items):
        if number:
            x += radius_of(items[number - 1]) + radius_of(item) + rng.uniform(0.04, 0.16)
        item["place"] = (x, rng.uniform(-0.15, 0.15))
    first, last = items[0], items[-1]
    middle = (first["place"][0] - radius_of(first) + last["place"][0] + radius_of(last)) / 2
    for item in items:
        x, y = item["place"]
        item["place"] = (round(x - middle, 3), round(y, 3))


def extent(items: list[Item], elevation: float, lens: float) -> tuple[float, float]:
    """Width and height that the products take in the picture at most, in units of the frame's longer side.

    The nearest parts are seen larger, and from above a product's depth adds to its height.
    """
    right = 0.0
    near = 0.0
    highest = 0.0
    for item in items:
        x, y = item["place"]
        right = max(right, abs(x) + radius_of(item))
        near = max(near, abs(y) + radius_of(item))
        highest = max(highest, item["height"])
    slant = math.radians(abs(elevation))
    magnified = 1 / (1 - min(0.6, near / (FRAME * lens / 36)))
    tall = highest * math.cos(slant) + 2 * near / FRAME * math.sin(slant)
    return 2 * right / FRAME * magnified, tall * magnified


def offset_within(rng: random.Random, taken: float, length: float) -> float:
    """A place along one side of the frame for something that long; both in units of the longer side."""
    free = max(0.0, (length - taken) / 2 - MARGIN)
    return round(rng.uniform(-free, free) if rng.random() < 0.6 else rng.gauss(0, 0.3 * free), 3)


def lowest_elevation(lens: float, middle: float) -> float:
    """Degrees; from further below, the camera would be under the floor. middle: height of what it looks at."""
    distance = FRAME * lens / 36
    return -math.degrees(math.asin(min(1.0, max(0.0, middle - 0.12) / distance)))

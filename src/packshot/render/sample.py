"""Draw render jobs: a Scene in words, a product from a finite pool, a camera. Pure Python, keyed by seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from functools import cache

from packshot.lists import map_values
from packshot.render import varied
from packshot.render.frame import FRAME, Design, Item, Job, Words
from packshot.runs.files import resolve
from packshot.scene.vocabulary import (
    BACKGROUNDS,
    LIGHTING,
    MOODS,
    ON,
    POSITIONS,
    SURFACES,
    SURROUNDINGS,
    without_position,
)

PACKAGE_COUNT = 96

BRANDS = (
    "LUMEN", "ALBA", "NORD", "VERA", "SOLE", "AURA", "FJORD", "MIRA", "OKO", "TERRA",
    "NOVA", "ELM", "PURE", "KAIA", "HALO", "RIVA", "BLOOM", "SAGE", "ONYX", "DUNE",
)  # fmt: skip
KINDS = (
    "bottle", "dropper", "pump", "jar", "tube", "can", "aerosol", "carton", "perfume", "tin", "spray", "lipstick",
)  # fmt: skip
# Linear RGB. Body, label, ink and accent are chosen to sit together, as a packaging designer would.
_PARTS = ("body", "label", "ink", "accent")
PALETTES: dict[str, dict[str, tuple[float, float, float]]] = map_values(
    lambda colors: dict(zip(_PARTS, colors, strict=True)),
    {
        "amber": ((0.55, 0.18, 0.03), (0.86, 0.82, 0.72), (0.05, 0.03, 0.02), (0.7, 0.45, 0.15)),
        "ivory": ((0.84, 0.78, 0.66), (0.95, 0.93, 0.88), (0.12, 0.08, 0.05), (0.6, 0.25, 0.12)),
        "forest": ((0.03, 0.14, 0.07), (0.85, 0.84, 0.74), (0.02, 0.08, 0.04), (0.75, 0.55, 0.2)),
        "blush": ((0.85, 0.38, 0.4), (0.95, 0.88, 0.86), (0.3, 0.05, 0.08), (0.9, 0.6, 0.5)),
        "cobalt": ((0.02, 0.08, 0.42), (0.9, 0.92, 0.95), (0.01, 0.03, 0.2), (0.9, 0.5, 0.1)),
        "onyx": ((0.015, 0.015, 0.018), (0.04, 0.04, 0.045), (0.85, 0.65, 0.3), (0.85, 0.65, 0.3)),
        "snow": ((0.88, 0.88, 0.88), (0.8, 0.85, 0.88), (0.03, 0.05, 0.09), (0.1, 0.35, 0.6)),
        "coral": ((0.85, 0.16, 0.08), (0.95, 0.9, 0.82), (0.25, 0.03, 0.02), (0.95, 0.75, 0.3)),
        "mint": ((0.32, 0.68, 0.52), (0.93, 0.96, 0.93), (0.03, 0.2, 0.14), (0.9, 0.8, 0.5)),
        "lilac": ((0.45, 0.3, 0.68), (0.93, 0.9, 0.96), (0.12, 0.05, 0.25), (0.9, 0.75, 0.3)),
        "sun": ((0.92, 0.56, 0.04), (0.97, 0.94, 0.85), (0.15, 0.08, 0.01), (0.1, 0.3, 0.25)),
        "clay": ((0.48, 0.17, 0.08), (0.88, 0.8, 0.7), (0.12, 0.04, 0.02), (0.8, 0.7, 0.55)),
    },
)  # fmt: skip
# Finishes that exist for the kind in a shop: no glass cartons, no transparent drink cans.
FINISHES = {
    "bottle": ("glass", "glossy", "matte", "frosted"),
    "dropper": ("glass", "glass", "frosted", "matte"),
    "pump": ("glossy", "matte", "frosted", "glass"),
    "jar": ("glossy", "matte", "frosted", "glass"),
    "tube": ("glossy", "matte", "metal"),
    "can": ("metal", "glossy"),
    "aerosol": ("metal", "glossy", "matte"),
    "carton": ("matte", "glossy"),
    "perfume": ("glass", "glass", "frosted"),
    "tin": ("metal", "matte", "glossy"),
    "spray": ("glossy", "matte", "frosted", "glass"),
    "lipstick": ("glossy", "matte", "metal"),
}
ASPECTS = {  # width / height
    "bottle": (0.36, 0.52), "dropper": (0.36, 0.5), "pump": (0.38, 0.5), "jar": (0.85, 1.15), "tube": (0.36, 0.46),
    "can": (0.46, 0.55), "aerosol": (0.28, 0.36), "carton": (0.5, 0.75), "perfume": (0.55, 0.8), "tin": (1.2, 1.6),
    "spray": (0.36, 0.46), "lipstick": (0.22, 0.28),
}  # fmt: skip
_CORNERED = {
    "carton": 1.2,
    "perfume": 1.15,
    "paper-bag": 1.1,
    "sunglasses": 1.15,
}  # diameter / width of what is not round
CAPS = ("gold", "silver", "black", "white", "wood", "accent")
LABELS = ("front", "wrap", "none")
# Objects of one plain colour: the pool has them in the colours of these palettes too.
_PLAIN = ("cosmetics-pot", "baby-bottle", "plastic-cup", "flacon", "handbag", "boots", "briefcase", "headphones")
TINTED = dict.fromkeys(_PLAIN, ("blush", "cobalt", "forest"))

OUTDOOR = ("a blue sky", "mountains", "a forest")
_NO_WALL = (*OUTDOOR, "bokeh lights")
_WALL_LIGHT = ("leaf shadows on the wall", "window blind shadows on the wall")
_NEON = ("pink neon light", "blue neon light")
_PAINTED = tuple(f"{color} wall" for color in ("white", "beige", "pink", "blue", "green", "grey", "yellow"))
_COLORED = (
    "a white podium", "a pink podium", "a green podium", "a beige stone podium", "a concrete podium",
    "a green marble table", "a grey concrete table",
)  # fmt: skip
_COLORED_THINGS = ("white flowers", "pink flowers")

# Which phrases a mood likes: three times as probable, never the only ones, so that every slot stays learnable alone.
_MOOD_LIKES: dict[str, tuple[str, ...]] = {
    "minimalist": ("a white podium", "a beige stone podium", "a concrete podium", "a white wall", "a beige wall",
                   "a grey wall", "a white panelled wall", "soft daylight", "leaf shadows on the wall", "white boxes",
                   "smooth stones", "a bed of white pebbles"),
    "warm": ("a light wooden table", "a beige stone podium", "a wooden podium", "a linen tablecloth", "a bed of sand",
             "a beige wall", "a wooden panel wall", "golden hour light", "candles", "oranges", "books",
             "pampas grass", "a pink and orange gradient"),
    "cool": ("a grey concrete table", "a white marble table", "rippled water", "fresh snow", "a blue wall",
             "a concrete wall", "a white tiled wall", "a blue sky", "mountains", "blue neon light", "smooth stones",
             "white boxes", "glass spheres", "a blue and white gradient"),
    "dramatic": ("a black glossy table", "a dark wooden table", "a black podium", "a dark wall", "bokeh lights",
                 "a brick wall", "harsh light from the left side", "harsh light from the right side", "backlight",
                 "pink neon light", "rippled water"),
    "luxurious": ("a black glossy table", "a green marble table", "a draped silk cloth", "a dark wall", "bokeh lights",
                  "gold beads", "studio lighting", "backlight", "candles", "white flowers", "a black podium"),
    "fresh": ("a moss-covered stone", "a green podium", "a white tiled counter", "rippled water", "a green wall",
              "a blue sky", "a forest", "a window", "a white tiled wall", "lemons", "oranges", "green apples",
              "green leaves", "soft daylight"),
    "calm": ("a bed of sand", "a linen tablecloth", "a beige stone podium", "a bed of white pebbles", "a beige wall",
             "a window", "smooth stones", "white flowers", "pampas grass", "soft light from the left side",
             "soft light from the right side", "a blue and white gradient"),
    "playful": ("a pink podium", "a green podium", "a yellow wall", "a pink wall", "a blue wall", "lemons", "oranges",
                "green apples", "pink flowers", "pink neon light", "glass spheres", "a pink and orange gradient"),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- products


@cache
def _objects() -> dict[str, Design]:
    """The modelled objects by name, with their proportions (`data/objects/index.json`)."""
    return json.loads(resolve("data/objects/index.json").read_text())


@cache
def product_pool() -> tuple[str, ...]:
    """The ids of all products: packages `p000` to `p095`, objects by name, and their colours (`handbag.blush`)."""
    tints = []
    for name, palettes in TINTED.items():
        tints += map(f"{name}.{{}}".format, palettes)
    return (*package_ids("p", PACKAGE_COUNT), *_objects(), *tints)


def package_ids(letter: str, count: int) -> list[str]:
    """The ids of a generation's packages, `p000` and so on."""
    return [f"{letter}{index:03d}" for index in range(count)]


def _share(text: str) -> float:
    """A number in [0, 1) that belongs to a text for ever."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@cache
def varied_pool() -> tuple[str, ...]:
    """The ids that the second generation's scenes choose from: packages `q000` to `q223` and the first pool."""
    return (*package_ids("q", varied.PACKAGE_COUNT), *product_pool())


def is_held_out(product_id: str) -> bool:
    """Which products are kept from all training: data sets, and the mini family that ships, split by it.

    Every eleventh package (so that the kinds alternate) and every fifth object with all its colours.
    """
    if product_id[1:].isdigit():
        return int(product_id[1:]) % 11 == 10
    return sorted(_objects()).index(product_id.split(".")[0]) % 5 == 4


def is_held_out_combination(surface: str, background: str) -> bool:
    """One pair in eight of surface and background is kept from all training, each phrase appearing in other pairs."""
    return _share(f"packshot-pair {surface} | {background}") < 1 / 8


def design(product_id: str) -> Design:
    """The design behind an id: kind, colours, aspect (width / height), footprint (diameter / height), and more.

    It depends on the id alone, so that two scenes with one id show the same product.
    """
    if product_id[1:].isdigit():
        return _package(product_id)
    name, _, palette = product_id.partition(".")
    found = _objects()[name]
    return {
        "kind": "object",
        "model": name,
        "palette": palette or None,
        "tint": list(PALETTES[palette]["body"]) if palette else None,
        "aspect": found["aspect"],
        "footprint": found["footprint"],
    }


def _package(product_id: str) -> Design:
    rng = random.Random(f"packshot-product-{product_id}")
    second = product_id.startswith("q")
    kinds = (*KINDS, *varied.ASPECTS) if second else KINDS
    kind = kinds[int(product_id[1:]) % len(kinds)]
    palette = rng.choice(tuple(PALETTES))
    finish = rng.choice((FINISHES | varied.FINISHES)[kind])
    aspect = round(rng.uniform(*(ASPECTS | varied.ASPECTS)[kind]), 3)
    labels = varied.LABELS if second else LABELS
    return {
        "kind": kind,
        "palette": palette,
        "colors": map_values(list, PALETTES[palette]),
        "finish": finish,
        "cap": rng.choice(CAPS),
        "label": rng.choice(LABELS[:2] if finish == "glass" else labels),  # ink alone drowns in glass
        "brand": rng.choice(BRANDS),
        "aspect": aspect,
        "footprint": round(aspect * _CORNERED.get(kind, 1.0), 3),
        "roundness": round(rng.uniform(0.1, 1.0), 3),
        "neck": round(rng.uniform(0.3, 0.55), 3),
        "cap_height": round(rng.uniform(0.6, 1.4), 3),
        "stripes": rng.choice((0, 1, 2)),
    }


# ---------------------------------------------------------------------------------------------------------- scenes


def _draw(rng: random.Random, phrases: Sequence[str], mood: str | None) -> str:
    likes = _MOOD_LIKES.get(mood or "", ())
    return rng.choices(phrases, [3.0 if phrase in likes else 1.0 for phrase in phrases])[0]


def suits(surface: str, background: str, lighting: str) -> bool:
    """Whether all three can be seen as they are called: no shadows on a wall that is not there, no neon at noon, no
    neon on what is called by a colour that it would drown."""
    excluded: tuple[str, ...] = ()
    if background in (*_NO_WALL, "a window"):
        excluded += _WALL_LIGHT
    if background in (*OUTDOOR, "a window"):
        excluded += (*_NEON, "studio lighting")
    if background == "bokeh lights":
        excluded += ("soft daylight",)
    if background == "a dark wall":  # too dark to carry a shadow
        excluded += (*_WALL_LIGHT, "soft daylight")
    if lighting in _NEON:
        own = f"a {lighting.split()[0]} wall"
        drowned = background != own and (background.removeprefix("a ") in _PAINTED or "gradient" in background)
        return not drowned and surface.partition(ON)[0] not in _COLORED and lighting not in excluded
    return lighting not in excluded


def _draw_surroundings(rng: random.Random, mood: str | None) -> list[str]:
    """Up to two things, half of them with the place they stand at; two of them never at the same one."""
    count = rng.choices((0, 1, 2), (3, 5, 2) if mood == "minimalist" else (2, 5, 3))[0]
    things: list[str] = []
    while len(things) < count:
        thing = _draw(rng, SURROUNDINGS, mood)
        if thing not in things:
            things.append(thing)
    places = rng.sample(POSITIONS, 2)
    return [f"{thing} {place}" if rng.random() < 0.5 else thing for thing, place in zip(things, places, strict=False)]


def sample_scene(rng: random.Random, given: Words | None = None, held_out: bool = False) -> Words:
    """Draw the five slots and the style as phrases of the vocabulary, coherent with the mood.

    given: slots that are set instead of drawn. The others stay what they are without it, unless they cannot be seen
        together with it.
    held_out: draw surface and background from the combinations that training never sees (else from the others).

    Raises:
        ValueError: the given slots cannot be seen together.
    """
    mood = rng.choice(MOODS) if rng.random() < 0.8 else None
    pairs = random.Random(rng.random())  # its own stream, so that redrawing leaves the rest alone
    surroundings = _draw_surroundings(random.Random(rng.random()), mood)
    style = ["shallow depth of field"] if rng.random() < 0.2 else []

    def draw() -> Words:
        surface = _draw(pairs, SURFACES, mood)
        background = _draw(pairs, BACKGROUNDS, mood)
        lighting = _draw(pairs, LIGHTING, mood)
        drowned = _COLORED_THINGS if lighting in _NEON else ()
        return {
            "surface": surface,
            "surroundings": [thing for thing in surroundings if without_position(thing) not in drowned],
            "background": background,
            "lighting": lighting,
            "mood": mood,
            "style": style,
        }

    def fits(scene: Words) -> bool:
        return suits(scene["surface"], scene["background"], scene["lighting"])

    scene = draw()
    while not fits(scene) or is_held_out_combination(scene["surface"], scene["background"]) != held_out:
        scene = draw()
    for _ in range(1000):
        if fits(scene | (given or {})):
            return scene | (given or {})
        scene = draw()
    raise ValueError(f"these cannot be seen together: {given}")


def is_test_seed(seed: int) -> bool:
    """Every seventh scene is for testing: a held-out product in a held-out combination of surface and background."""
    return seed % 7 == 6


@cache
def _products_of(held_out: bool, second: bool = False) -> tuple[str, ...]:
    pool = varied_pool() if second else product_pool()
    return tuple(product for product in pool if is_held_out(product) == held_out)


def sample_job(seed: int, given: Words | None = None, products: Sequence[str] | None = None) -> Job:
    """One render job, the same for the same seed; JSON in and out without loss.

    Every seventh seed makes a scene for testing: a held-out product in a held-out combination of surface and
    background. `height` is the product's share of the frame height, angles are degrees, `lens` millimetres on a 36 mm
    sensor and `offset` is the product's place in the frame as a share of its width and height.

    given: slots of the scene (as `Scene.to_dict` names them) that are set instead of drawn. products: narrows the pool.
    """
    if seed >= varied.FIRST_SEED:
        return _sample_varied(seed, given, products)
    rng = random.Random(f"packshot-scene-{seed}")
    product_id = rng.choice(products or _products_of(is_test_seed(seed)))
    product = design(product_id)
    tall = {"tin": (0.34, 0.42), "jar": (0.36, 0.5)}.get(product["kind"], (0.44, 0.64))
    height = min(rng.uniform(*tall), rng.uniform(0.5, 0.62) / product["aspect"])
    scene = sample_scene(random.Random(rng.random()), given, is_test_seed(seed))
    return {
        "seed": seed,
        "scene": scene,
        "product_id": product_id,
        "product": product,
        "height": round(height, 3),
        "turn": round(rng.uniform(-24, 24), 1),
        "camera": {
            "lens": rng.choice((40, 50, 60, 70, 85, 100)),
            "elevation": round(rng.triangular(2, 30, 9), 2),
            "azimuth": round(rng.uniform(-9, 9), 2),
            "offset": [round(rng.gauss(0, 0.05), 3), round(rng.uniform(-0.07, 0.03), 3)],
        },
        "podium": _draw_podium(rng),
    }


def _draw_podium(rng: random.Random) -> dict[str, object]:
    return {"shape": rng.choice(("round", "round", "square")), "height": round(rng.uniform(0.22, 0.5), 3)}


def _tallest(product: Design, rng: random.Random, frame: tuple[float, float]) -> float:
    """A height for the product, as a share of the frame's longer side: from small to nearly filling the frame."""
    room = min(frame[1], frame[0] / product["aspect"])
    return room * rng.triangular(0.28, 0.78, 0.62)


def _draw_set(pool: Sequence[str], rng: random.Random, frame: tuple[float, float]) -> list[Item]:
    """A scene's products, without place and turn: one, or a set of two or three that share the frame's width."""
    count = rng.choice((2, 2, 3)) if rng.random() < varied.SEVERAL else 1
    first = rng.choice(pool)
    chosen = [first]
    while len(chosen) < count:
        chosen.append(first if rng.random() < 0.3 else rng.choice(pool))
    narrow = (frame[0] / count, frame[1])
    items: list[Item] = []
    for product_id in chosen:
        product = design(product_id)
        height = round(_tallest(product, rng, narrow), 3)
        items.append({"product_id": product_id, "product": product, "height": height})
    return items


def _varied_scene(rng: random.Random, given: Words | None, held_out: bool, view: str | None) -> Words:
    """A scene of the first generation's slots, moved to a studio or seen from elsewhere for some of the seeds.

    A studio's surface and backdrop are one paper, so the rule on held-out pairs does not apply to them.
    """
    scene: Words = sample_scene(random.Random(rng.random()), None, held_out)
    scene = varied.studio(scene, rng)
    if view is not None:
        scene["style"] = [view]
    if view == varied.VIEWS[-1]:  # from above nothing but the ground is seen
        scene["background"] = None
        if "wall" in scene["lighting"]:
            scene["lighting"] = "soft daylight"
    return scene | (given or {})


def _sample_varied(seed: int, given: Words | None, products: Sequence[str] | None) -> Job:
    """A job of the second generation. In addition to :func:`sample_job`: `frame` is the picture's (width, height), the
    longer one 1, and `others` are the further products of a set with their heights, places and turns."""
    rng = random.Random(f"packshot-varied-{seed}")
    frame = varied.draw_frame(rng)
    items = _draw_set(products or _products_of(is_test_seed(seed), second=True), rng, frame)
    varied.place_set(items, rng)
    elevation, view = varied.draw_view(rng)
    lens = rng.choice((40, 50, 60, 70, 85, 100))
    wide, tall = varied.extent(items, elevation, lens)
    shrink = min(1.0, (frame[0] - 2 * varied.MARGIN) / wide, (frame[1] - 2 * varied.MARGIN) / tall)
    tallest = 0.0
    for item in items:
        x, y = item["place"]
        item["height"] = round(item["height"] * shrink, 3)
        item["place"] = [round(x * shrink, 3), round(y * shrink, 3)]
        tallest = max(tallest, item["height"])
    elevation = max(elevation, varied.lowest_elevation(lens, tallest * FRAME / 2))
    if elevation > -1 and view == varied.VIEWS[0]:  # too small to be seen from below
        view = None
    scene = _varied_scene(rng, given, is_test_seed(seed), view)
    first, *others = items
    for item in others:
        item["turn"] = round(rng.uniform(-24, 24), 1)
    return {
        "seed": seed,
        "scene": scene,
        "product_id": first["product_id"],
        "product": first["product"],
        "height": first["height"],
        "turn": round(rng.uniform(-40, 40), 1),
        "place": first["place"],
        "others": others,
        "frame": list(frame),
        "camera": _draw_camera(rng, lens, elevation, (wide * shrink, tall * shrink), frame),
        "podium": _draw_podium(rng),
    }


def _draw_camera(
    rng: random.Random, lens: int, elevation: float, taken: tuple[float, float], frame: tuple[float, float]
) -> dict[str, object]:
    """taken: the (width, height) of the frame that the products need."""
    azimuth = round(rng.uniform(-14, 14), 2)
    offset = [varied.offset_within(rng, taken[0], frame[0]), varied.offset_within(rng, taken[1], frame[1])]
    return {"lens": lens, "elevation": round(elevation, 2), "azimuth": azimuth, "offset": offset}

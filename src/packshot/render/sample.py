"""Draw render jobs: a Scene in words, a product from a finite pool of designs, a camera. Pure Python, keyed by seed."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from packshot.scene.vocabulary import BACKGROUNDS, LIGHTING, MOODS, SURFACES, SURROUNDINGS

PRODUCT_COUNT = 60

BRANDS = (
    "LUMEN", "ALBA", "NORD", "VERA", "SOLE", "AURA", "FJORD", "MIRA", "OKO", "TERRA",
    "NOVA", "ELM", "PURE", "KAIA", "HALO", "RIVA", "BLOOM", "SAGE", "ONYX", "DUNE",
)  # fmt: skip
KINDS = ("bottle", "dropper", "pump", "jar", "tube", "can", "aerosol", "carton", "perfume", "tin")
# Linear RGB. Body, label, ink and accent are chosen to sit together, as a packaging designer would.
_PARTS = ("body", "label", "ink", "accent")
PALETTES: dict[str, dict[str, tuple[float, float, float]]] = {
    name: dict(zip(_PARTS, colors, strict=True))
    for name, colors in {
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
    }.items()
}  # fmt: skip
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
}
ASPECTS = {  # width / height
    "bottle": (0.36, 0.52), "dropper": (0.36, 0.5), "pump": (0.38, 0.5), "jar": (0.85, 1.15), "tube": (0.36, 0.46),
    "can": (0.46, 0.55), "aerosol": (0.28, 0.36), "carton": (0.5, 0.75), "perfume": (0.55, 0.8), "tin": (1.2, 1.6),
}  # fmt: skip
CAPS = ("gold", "silver", "black", "white", "wood", "accent")
LABELS = ("front", "wrap", "none")

OUTDOOR = ("a blue sky", "mountains")
_NO_WALL = (*OUTDOOR, "bokeh lights")
_WALL_LIGHT = ("leaf shadows on the wall", "window blind shadows on the wall")
_NEON = ("pink neon light", "blue neon light")

# Which phrases a mood likes: three times as probable, never the only ones, so that every slot stays learnable alone.
_MOOD_LIKES: dict[str, tuple[str, ...]] = {
    "minimalist": ("a white podium", "a beige stone podium", "a white wall", "a beige wall", "a grey wall",
                   "soft daylight", "leaf shadows on the wall", "white boxes", "smooth stones"),
    "warm": ("a light wooden table", "a beige stone podium", "a linen tablecloth", "a bed of sand", "a beige wall",
             "a wooden panel wall", "golden hour light", "candles", "oranges", "books"),
    "cool": ("a grey concrete table", "a white marble table", "a blue wall", "a concrete wall", "a blue sky",
             "mountains", "blue neon light", "smooth stones", "white boxes"),
    "dramatic": ("a black glossy table", "a dark wooden table", "a dark wall", "bokeh lights", "a brick wall",
                 "harsh light from the left side", "harsh light from the right side", "backlight", "pink neon light"),
    "luxurious": ("a black glossy table", "a white marble table", "a dark wall", "bokeh lights", "gold beads",
                  "studio lighting", "backlight", "candles", "white flowers"),
    "fresh": ("a moss-covered stone", "a green podium", "a white marble table", "a green wall", "a blue sky",
              "lemons", "oranges", "green leaves", "soft daylight"),
    "calm": ("a bed of sand", "a linen tablecloth", "a beige stone podium", "a beige wall", "smooth stones",
             "white flowers", "soft light from the left side", "soft light from the right side"),
    "playful": ("a pink podium", "a green podium", "a yellow wall", "a pink wall", "a blue wall", "lemons",
                "oranges", "pink flowers", "pink neon light"),
}  # fmt: skip


def product_pool() -> tuple[str, ...]:
    """The ids of all product designs, `p000` to `p059`."""
    return tuple(f"p{index:03d}" for index in range(PRODUCT_COUNT))


def is_held_out(product_id: str) -> bool:
    """Every twelfth design is kept from all training: data sets, and the mini family that ships, split by it."""
    return int(product_id[1:]) % 12 == 11


def design(product_id: str) -> dict[str, Any]:
    """The design behind an id: kind, palette, finish, cap, label, brand, aspect (width / height) and proportions.

    It depends on the id alone, so that two scenes with one id show the same product.
    """
    rng = random.Random(f"packshot-product-{product_id}")
    kind = KINDS[int(product_id[1:]) % len(KINDS)]
    palette = rng.choice(tuple(PALETTES))
    finish = rng.choice(FINISHES[kind])
    return {
        "kind": kind,
        "palette": palette,
        "colors": {name: list(color) for name, color in PALETTES[palette].items()},
        "finish": finish,
        "cap": rng.choice(CAPS),
        "label": rng.choice(LABELS[:2] if finish == "glass" else LABELS),  # ink alone drowns in glass
        "brand": rng.choice(BRANDS),
        "aspect": round(rng.uniform(*ASPECTS[kind]), 3),
        "roundness": round(rng.uniform(0.1, 1.0), 3),
        "neck": round(rng.uniform(0.3, 0.55), 3),
        "cap_height": round(rng.uniform(0.6, 1.4), 3),
        "stripes": rng.choice((0, 1, 2)),
    }


def _draw(rng: random.Random, phrases: tuple[str, ...], mood: str | None) -> str:
    likes = _MOOD_LIKES.get(mood or "", ())
    return rng.choices(phrases, [3.0 if phrase in likes else 1.0 for phrase in phrases])[0]


def _lighting_for(background: str) -> tuple[str, ...]:
    """Lighting that can be seen before this background: no shadows on a wall that is not there, no neon at noon."""
    excluded: tuple[str, ...] = ()
    if background in _NO_WALL:
        excluded += _WALL_LIGHT
    if background in OUTDOOR:
        excluded += (*_NEON, "studio lighting")
    if background == "bokeh lights":
        excluded += ("soft daylight",)
    if background == "a dark wall":  # too dark to carry a shadow
        excluded += (*_WALL_LIGHT, "soft daylight")
    return tuple(phrase for phrase in LIGHTING if phrase not in excluded)


def sample_scene(rng: random.Random) -> dict[str, Any]:
    """Draw the five slots and the style as phrases of the vocabulary, coherent with the mood."""
    mood = rng.choice(MOODS) if rng.random() < 0.8 else None
    background = _draw(rng, BACKGROUNDS, mood)
    count = rng.choices((0, 1, 2), (3, 5, 2) if mood == "minimalist" else (2, 5, 3))[0]
    surroundings: list[str] = []
    while len(surroundings) < count:
        phrase = _draw(rng, SURROUNDINGS, mood)
        if phrase not in surroundings:
            surroundings.append(phrase)
    return {
        "surface": _draw(rng, SURFACES, mood),
        "surroundings": surroundings,
        "background": background,
        "lighting": _draw(rng, _lighting_for(background), mood),
        "mood": mood,
        "style": ["shallow depth of field"] if rng.random() < 0.2 else [],
    }


def sample_job(seed: int, products: tuple[str, ...] | None = None) -> dict[str, Any]:
    """One render job, the same for the same seed; JSON in and out without loss.

    `height` is the product's share of the frame height, angles are degrees, `lens` millimetres on a 36 mm sensor and
    `offset` is the product's place in the frame as a share of its width and height. `products` narrows the pool.
    """
    rng = random.Random(f"packshot-scene-{seed}")
    product_id = rng.choice(products or product_pool())
    product = design(product_id)
    tall = {"tin": (0.34, 0.42), "jar": (0.36, 0.5)}.get(product["kind"], (0.44, 0.64))
    return {
        "seed": seed,
        "scene": sample_scene(rng),
        "product_id": product_id,
        "product": product,
        "height": round(rng.uniform(*tall), 3),
        "turn": round(rng.uniform(-22, 22), 1),
        "camera": {
            "lens": rng.choice((50, 60, 70, 85, 100)),
            "elevation": round(rng.triangular(2, 22, 8), 2),
            "azimuth": round(rng.uniform(-9, 9), 2),
            "offset": [round(rng.gauss(0, 0.05), 3), round(rng.uniform(-0.07, 0.03), 3)],
        },
        "podium": {"shape": rng.choice(("round", "round", "square")), "height": round(rng.uniform(0.22, 0.5), 3)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write render jobs as JSON lines.")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "END"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(sample_job(seed)) + "\n" for seed in range(*args.seeds)))


if __name__ == "__main__":
    main()

"""Words of a scene: what the packshot factory can render, what a parser recognises, what names a product.

The tuples of phrases are *suggestions*: a slot takes any text. They exist so that rendered scenes, mini models,
examples and documentation speak of the same things.
"""

TABLES = (
    "a white marble table",
    "a green marble table",
    "a grey concrete table",
    "a light wooden table",
    "a dark wooden table",
    "a black glossy table",
    "a white tiled counter",
)

PODIUMS = (
    "a beige stone podium",
    "a white podium",
    "a pink podium",
    "a green podium",
    "a black podium",
    "a concrete podium",
    "a wooden podium",
)

GROUNDS = (
    "a bed of sand",
    "a bed of white pebbles",
    "a moss-covered stone",
    "a linen tablecloth",
    "a draped silk cloth",
    "rippled water",
    "fresh snow",
)

ON = " which is on "  # joins a podium with the table below it; the renderer builds any such pair

SURFACES = (
    *TABLES,
    *PODIUMS,
    *GROUNDS,
    "a beige stone podium which is on a white marble table",
    "a white podium which is on a light wooden table",
    "a pink podium which is on a white tiled counter",
    "a black podium which is on a black glossy table",
    "a concrete podium which is on a dark wooden table",
    "a wooden podium which is on a grey concrete table",
)

SURROUNDINGS = (
    "palm leaves",
    "green leaves",
    "pampas grass",
    "white flowers",
    "pink flowers",
    "smooth stones",
    "white boxes",
    "gold beads",
    "glass spheres",
    "oranges",
    "lemons",
    "green apples",
    "candles",
    "books",
)

# Where things around the object stand; written after the thing ("lemons behind it"), or left to the renderer.
POSITIONS = ("on the left side", "on the right side", "behind it", "in the corner")

BACKGROUNDS = (
    "a white wall",
    "a beige wall",
    "a pink wall",
    "a blue wall",
    "a green wall",
    "a grey wall",
    "a yellow wall",
    "a concrete wall",
    "a brick wall",
    "a wooden panel wall",
    "a white panelled wall",
    "a white tiled wall",
    "a dark wall",
    "a pink and orange gradient",
    "a blue and white gradient",
    "a window",
    "a blue sky",
    "mountains",
    "a forest",
    "bokeh lights",
)

LIGHTING = (
    "soft daylight",
    "soft light from the left side",
    "soft light from the right side",
    "harsh light from the left side",
    "harsh light from the right side",
    "leaf shadows on the wall",
    "window blind shadows on the wall",
    "golden hour light",
    "pink neon light",
    "blue neon light",
    "studio lighting",
    "backlight",
)

MOODS = ("minimalist", "warm", "cool", "dramatic", "luxurious", "fresh", "calm", "playful")

STYLES = ("product photography", "shallow depth of field")


# The second generation of rendered scenes adds these. They stand apart from the tuples above, because the scenes of the
# first generation are drawn from those by seed, and because shipped weights know no other words.
STUDIO_COLORS = ("white", "grey", "black", "beige", "pink", "blue", "green", "yellow")
SWEEPS = tuple(f"a {color} studio sweep" for color in STUDIO_COLORS)  # paper that bends from floor to wall
BACKDROPS = tuple(f"a {color} studio backdrop" for color in STUDIO_COLORS)
VIEWS = ("low angle", "high angle", "top view")


def split_position(phrase: str) -> tuple[str, str | None]:
    """A thing of the surroundings and where it stands: "lemons behind it" -> ("lemons", "behind it")."""
    for position in POSITIONS:
        if phrase.endswith(" " + position):
            return phrase[: -len(position) - 1], position
    return phrase, None


def without_position(phrase: str) -> str:
    """A thing of the surroundings alone: "lemons behind it" -> "lemons"."""
    return split_position(phrase)[0]

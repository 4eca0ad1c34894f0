"""Words of a scene: what the packshot factory can render, what a parser recognises, what names a product.

The tuples of phrases are *suggestions*: a slot takes any text. They exist so that rendered scenes, mini models,
examples and documentation speak of the same things.
"""

SURFACES = (
    "a white marble table",
    "a grey concrete table",
    "a light wooden table",
    "a dark wooden table",
    "a beige stone podium",
    "a white podium",
    "a pink podium",
    "a green podium",
    "a bed of sand",
    "a moss-covered stone",
    "a linen tablecloth",
    "a black glossy table",
    "a beige stone podium which is on a white marble table",
    "a white podium which is on a light wooden table",
)

SURROUNDINGS = (
    "palm leaves",
    "green leaves",
    "white flowers",
    "pink flowers",
    "smooth stones",
    "white boxes",
    "gold beads",
    "oranges",
    "lemons",
    "candles",
    "books",
)

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
    "a dark wall",
    "a blue sky",
    "mountains",
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

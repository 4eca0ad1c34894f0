"""Rendered sets as training data: pixels, product masks, and captions in many wordings."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import cv2
import numpy as np
import torch

from packshot.dataset.rows import load_rows
from packshot.errors import ConfigError
from packshot.imaging.pixels import from_network, to_bytes, to_network, to_unit
from packshot.lists import attributes, pick, select
from packshot.render.sample import design
from packshot.scene import Scene
from packshot.scene.grammar import filled
from packshot.scene.vocabulary import ON, without_position

SIZE = 128  # px; the family's native image size
_LAYERS = ("image", "plate", "cutout")


@dataclass(frozen=True)
class Render:
    """One scene: image and plate (the same without product) uint8 RGB (H, W, 3), cutout uint8 (H, W, 4).

    product: the design behind ``product_id``, as the renderer was given it.
    """

    id: str
    product_id: str
    product: dict[str, object]
    scene: Scene
    image: np.ndarray
    plate: np.ndarray
    cutout: np.ndarray

    @property
    def alpha(self) -> np.ndarray:
        """The product's share of every pixel, float32 (H, W) in [0, 1]."""
        return to_unit(self.cutout[..., 3])

    @property
    def mask(self) -> np.ndarray:
        """Where the product is, bool (H, W)."""
        return self.cutout[..., 3] > 127


def _square(images: list[np.ndarray], alpha_HW: np.ndarray) -> list[np.ndarray]:
    """Every image of a portrait or landscape frame cut to the square around the product; whole if it needs more."""
    height, width = alpha_HW.shape
    side = min(height, width)
    rows, columns = np.nonzero(alpha_HW)
    if height == width or max(np.ptp(rows), np.ptp(columns)) >= side:
        return images
    top = int(np.clip((rows.min() + rows.max() - side) // 2, 0, height - side))
    left = int(np.clip((columns.min() + columns.max() - side) // 2, 0, width - side))
    return [image[top : top + side, left : left + side] for image in images]


def _resized(array: np.ndarray, size: int) -> np.ndarray:
    if array.shape[:2] == (size, size):
        return array
    method = cv2.INTER_AREA if min(array.shape[:2]) >= size else cv2.INTER_CUBIC
    return cv2.resize(array, (size, size), interpolation=method)


def read_renders(key: str, path: str, size: int = SIZE) -> Iterator[Render]:
    """The scenes of a rendered set at ``size`` px, called ``key`` in messages. Raises ConfigError if it is not one."""
    rows = load_rows(key, path)
    for index in range(len(rows)):
        row = rows.read(index, _LAYERS)
        missing = [name for name in (*_LAYERS, "product_id") if row.get(name) is None]
        if missing:
            raise ConfigError(
                f"{key} {path}: sample {row['id']} lacks {', '.join(missing)}.",
                "The mini family learns from rendered sets: build_data.py dataset=rendered writes them.",
            )
        layers = list(map(np.array, select(row, _LAYERS).values()))
        image, plate, cutout = map(_resized, _square(layers, layers[-1][..., 3]), (size,) * len(layers))
        product = design(row["product_id"])
        yield Render(row["id"], row["product_id"], product, row["scene"], image, plate, cutout)


@dataclass(frozen=True)
class Renders:
    """The scenes of two rendered sets, decoded: one to learn from, one to measure on."""

    train: list[Render]
    held_out: list[Render]

    @classmethod
    def open(cls, train: Sequence[str], held_out: str, size: int = SIZE) -> Renders:
        """Read every set whole, at ``size`` px (160 kB per scene of 128 px).

        Raises:
            ConfigError: a set is missing, empty, not Parquet, or not a rendered one; both show the same product.
        """
        scenes: list[Render] = []
        for path in train:
            scenes += read_renders("--train", path, size)
        renders = cls(scenes, list(read_renders("--heldout", held_out, size)))
        shared = product_ids(renders.train) & product_ids(renders.held_out)
        if shared:
            raise ConfigError(
                f"--train {' '.join(train)} and --heldout {held_out} both show {', '.join(sorted(shared)[:3])}.",
                "Scores on products that training has seen mean nothing: name sets without common products.",
            )
        return renders

    @property
    def held_out_id(self) -> str:
        """16 hex digits that stand for the held-out scenes."""
        return hashlib.sha256("".join(render.id for render in self.held_out).encode()).hexdigest()[:16]

    def draw(self, generator: torch.Generator, count: int) -> list[Render]:
        """``count`` training scenes with replacement."""
        drawn = torch.randint(len(self.train), (count,), generator=generator).tolist()
        return pick(self.train, drawn)


def product_ids(renders: Sequence[Render]) -> set[str]:
    """The products that the renders show."""
    return set(map(attrgetter("product_id"), renders))


def images_of(renders: Sequence[Render]) -> list[np.ndarray]:
    """The renders' images, in their order."""
    return list(map(attrgetter("image"), renders))


def scenes_of(renders: Sequence[Render]) -> list[Scene]:
    """The renders' scenes, in their order."""
    return list(map(attrgetter("scene"), renders))


def images_and_plates(renders: Sequence[Render]) -> list[np.ndarray]:
    """Image and plate of each render in turn."""
    images: list[np.ndarray] = []
    for render in renders:
        images += [render.image, render.plate]
    return images


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) images to pixels_BCHW in [-1, 1]."""
    return to_network(np.stack(images))


def standardized(pixels_BCHW: torch.Tensor, mean: Sequence[float], deviation: Sequence[float]) -> torch.Tensor:
    """Pixels in [-1, 1] as an image processor with this mean and standard deviation makes them."""
    means = pixels_BCHW.new_tensor(mean).view(1, 3, 1, 1)
    deviations = pixels_BCHW.new_tensor(deviation).view(1, 3, 1, 1)
    return (pixels_BCHW.add(1).div(2) - means) / deviations


def to_images(pixels_BCHW: torch.Tensor) -> np.ndarray:
    """Inverse of :func:`to_pixels`: uint8 (B, H, W, 3)."""
    return to_bytes(from_network(pixels_BCHW))


def without_product(render: Render, rng: random.Random) -> np.ndarray:
    """The scene with its product, with the product painted grey, or without it, at equal odds."""
    choice = rng.randrange(3)
    if choice == 0:
        return render.image
    if choice == 1:
        return render.plate
    image = render.image.copy()
    image[render.mask] = 128
    return image


def reframed(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """A random window of at least seven eighths of the side, at the image's size: few scenes pass for more."""
    size = image.shape[0]
    side = rng.randint(size * 7 // 8, size)
    top = rng.randint(0, size - side)
    left = rng.randint(0, size - side)
    window = np.ascontiguousarray(image[top : top + side, left : left + side])
    return cv2.resize(window, (size, size), interpolation=cv2.INTER_LINEAR)


def mirrored(scene: Scene) -> Scene:
    """The scene as its mirrored image shows it: left and right change places in every slot."""

    def swap(text: str) -> str:
        return text.replace("left", "\0").replace("right", "left").replace("\0", "right")

    return replace(
        scene,
        surface=swap(scene.surface),
        surroundings=tuple(map(swap, scene.surroundings)),
        background=scene.background and swap(scene.background),
        lighting=scene.lighting and swap(scene.lighting),
        style=tuple(map(swap, scene.style)),
    )


def bare_phrases(scene: Scene, slot: str) -> tuple[str, ...]:
    """The slot's phrases without where their things stand, as the vocabulary lists them."""
    return tuple(map(without_position, scene.slots()[slot]))


def shares_right(guesses: Mapping[str, Sequence[str]], scenes: Sequence[Scene]) -> dict[str, float]:
    """Per slot, how often the guessed phrase is one that the scene has; a slot that no scene fills is left out.

    guesses: per slot, a phrase for each scene.
    """
    result = {}
    for slot, phrases in guesses.items():
        hits: list[bool] = []
        for phrase, scene in zip(phrases, scenes, strict=True):
            values = bare_phrases(scene, slot)
            if values:
                hits.append(phrase in values)
        if hits:
            result[slot] = sum(hits) / len(hits)
    return result


def sub_scene(scene: Scene, slots: set[str]) -> Scene:
    """The scene with only the named slots filled."""
    return Scene(**attributes(scene, slots))  # type: ignore[arg-type]


def filled_slots(scene: Scene) -> list[str]:
    """The slots that the scene fills."""
    return list(filled(scene))


def thinned(scene: Scene, rng: random.Random, keep: float) -> Scene:
    """Every slot stays with probability ``keep``; at least one stays."""
    filled = filled_slots(scene)
    kept = {slot for slot in filled if rng.random() < keep} or {rng.choice(filled)}
    return sub_scene(scene, kept)


def coarser(scene: Scene, rng: random.Random, keep: float) -> Scene:
    """The scene less closely described: where a thing stands, and the table under a podium, stay with odds ``keep``."""
    surface = scene.surface if rng.random() < keep else scene.surface.partition(ON)[0]
    around = (text if rng.random() < keep else without_position(text) for text in scene.surroundings)
    return replace(scene, surface=surface, surroundings=tuple(around))


def loose_caption(scene: Scene, rng: random.Random) -> str:
    """The scene's phrases as people prompt: any order, commas, with or without the words that join them."""
    clauses = []
    if scene.surface:
        clauses.append(rng.choice(("on {}", "an object on {}", "{}", "a product standing on {}")).format(scene.surface))
    if scene.surroundings:
        around = " and ".join(scene.surroundings)
        clauses.append(rng.choice(("surrounded by {}", "with {}", "{}", "next to {}")).format(around))
    if scene.background:
        clauses.append(rng.choice(("{} in the background", "{}", "in front of {}")).format(scene.background))
    if scene.lighting:
        clauses.append(scene.lighting)
    if scene.mood:
        clauses.append(rng.choice(("{} mood", "{}")).format(scene.mood))
    clauses += scene.style
    rng.shuffle(clauses)
    return ", ".join(clauses)


def prompt(scene: Scene, rng: random.Random, empty: bool) -> str:
    """A training prompt: mostly the canonical caption, sometimes thinned, coarser or loosely worded.

    empty: the picture shows the scene without a product. Most of its prompts then say so ("an empty place on ..."),
        the rest keep "an object": the models that paint around a product start from the wording they will be given.
    """
    form = rng.random()
    if form > 0.85:
        text = loose_caption(thinned(coarser(scene, rng, 0.6), rng, 0.8), rng)
    else:
        text = (scene if form < 0.6 else thinned(coarser(scene, rng, 0.6), rng, 0.7)).render()
    return text.replace("an object", "an empty place") if empty and rng.random() < 0.7 else text


_NOUNS = {
    "dropper": "dropper bottle",
    "pump": "pump bottle",
    "aerosol": "spray can",
    "perfume": "perfume bottle",
    "spray": "spray bottle",
    "speaker-small": "small speaker",
    "speaker-tall": "tall speaker",
    "bread": "loaf of bread",
    "boots": "pair of boots",
    "slippers": "pair of slippers",
    "headphones": "pair of headphones",
}


def product_words(product: dict[str, object]) -> str:
    """A plain noun phrase for the product, article included: "an amber glass bottle"."""
    name = str(product.get("model") or product["kind"])  # a modelled object, or a kind of package
    noun = _NOUNS.get(name, name.replace("-", " "))
    words = " ".join(map(str, filter(None, (product["palette"], product.get("finish"), noun))))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def free_caption(render: Render, scene: Scene, rng: random.Random, detail: int) -> str:
    """A caption as a general captioner writes it: full sentences that name the product.

    detail: 0 one clause, 1 one sentence with surface and background, 2 a paragraph with every slot.
    """
    product = product_words(render.product)
    stands = rng.choice(("standing on", "placed on", "on", "sitting on top of"))
    subject = f"{product} {stands} {scene.surface}"
    opening = rng.choice(("The image shows {}", "There is {}", "A photo of {}", "This is a picture of {}"))
    sentence = opening.format(subject)
    if detail == 0:
        return sentence + "."
    behind = rng.choice(("with {} in the background", "in front of {}", "and behind it there is {}"))
    sentence += " " + behind.format(scene.background)
    if detail == 1:
        return sentence + "."
    sentences = [sentence]
    if scene.surroundings:
        around = " and ".join(scene.surroundings)
        forms = ("Around it there are {}", "It is surrounded by {}", "Next to it are {}")
        sentences.append(rng.choice(forms).format(around))
    if scene.lighting:
        forms = ("The lighting is {}", "The scene has {}", "One can see {}")
        sentences.append(rng.choice(forms).format(scene.lighting))
    if scene.mood:
        sentences.append(rng.choice(("The mood is {}", "The overall mood of the image is {}")).format(scene.mood))
    sentences += [f"It has {style}" for style in scene.style]
    return ". ".join(sentences) + "."

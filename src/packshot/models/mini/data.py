"""Renders as training data: pixels, product masks, and captions in many wordings."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from packshot.core.errors import PackshotError
from packshot.render.sample import is_held_out
from packshot.scene import Scene
from packshot.scene.vocabulary import split_position

SIZE = 128  # px; the family's native image size


@dataclass(frozen=True)
class Render:
    """One scene: image and plate (the same without product) uint8 RGB (SIZE, SIZE, 3), mask bool (SIZE, SIZE)."""

    seed: str
    product_id: str
    product: dict[str, object]
    scene: Scene
    image: np.ndarray
    plate: np.ndarray
    mask: np.ndarray


def _read(path: Path, flags: int, channels: int) -> np.ndarray | None:
    array = cv2.imread(str(path), flags)
    if array is None or array.ndim != 3 or array.shape[2] != channels:
        return None
    if array.shape[:2] != (SIZE, SIZE):
        array = cv2.resize(array, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(array, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGBA)


def read_render(folder: Path) -> Render | None:
    """Read one scene's folder; None while the renderer has not finished writing it."""
    if not (folder / "job.json").is_file():
        return None
    image = _read(folder / "image.png", cv2.IMREAD_COLOR, 3)
    plate = _read(folder / "plate.png", cv2.IMREAD_COLOR, 3)
    cutout = _read(folder / "cutout.png", cv2.IMREAD_UNCHANGED, 4)
    if image is None or plate is None or cutout is None:
        return None
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    scene = Scene.from_dict(job["scene"])
    return Render(folder.name, job["product_id"], job["product"], scene, image, plate, cutout[..., 3] > 127)


class Renders:
    """The finished scenes of a folder that may still be growing; ``refresh`` picks up what has been added."""

    def __init__(self, folder: Path, minimum: int = 2) -> None:
        if not folder.is_dir():
            raise PackshotError(f"{folder} is no folder", hint="name the folder that holds <seed>/image.png")
        self.folder = folder
        self._known: set[str] = set()
        self.train: list[Render] = []
        self.held_out: list[Render] = []
        self.refresh()
        if min(len(self.train), len(self.held_out)) < minimum:
            raise PackshotError(
                f"{folder} has {len(self.train)} finished training and {len(self.held_out)} held-out renders; "
                f"{minimum} of each are needed",
                hint="render more scenes, or name the folder that holds <seed>/image.png",
            )

    def refresh(self) -> int:
        """List the folder again; returns how many scenes are new."""
        before = len(self._known)
        for folder in sorted(path for path in self.folder.iterdir() if path.is_dir() and path.name not in self._known):
            render = read_render(folder)
            if render is not None:
                self._known.add(folder.name)
                (self.held_out if is_held_out(render.product_id) else self.train).append(render)
        return len(self._known) - before

    def draw(self, generator: torch.Generator, count: int) -> list[Render]:
        """``count`` training scenes with replacement."""
        return [self.train[i] for i in torch.randint(len(self.train), (count,), generator=generator).tolist()]


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) images to pixels_BCHW in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_images(pixels_BCHW: torch.Tensor) -> np.ndarray:
    """Inverse of :func:`to_pixels`: uint8 (B, H, W, 3)."""
    scaled = pixels_BCHW.float().add(1).mul(127.5).round().clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()


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


def mirrored(scene: Scene) -> Scene:
    """The scene as its mirrored image shows it: left and right change places in every slot."""

    def swap(text: str | None) -> str | None:
        if text is None:
            return None
        return text.replace("left", "\0").replace("right", "left").replace("\0", "right")

    return replace(
        scene,
        surface=swap(scene.surface) or "",
        surroundings=tuple(swap(text) or "" for text in scene.surroundings),
        background=swap(scene.background),
        lighting=swap(scene.lighting),
        style=tuple(swap(text) or "" for text in scene.style),
    )


def bare_phrases(scene: Scene, slot: str) -> tuple[str, ...]:
    """The slot's phrases without where their things stand, as the vocabulary lists them."""
    return tuple(split_position(value)[0] for value in scene.slots()[slot])


def sub_scene(scene: Scene, slots: set[str]) -> Scene:
    """The scene with only the named slots filled."""
    return Scene(**{slot: getattr(scene, slot) for slot in slots})


def thinned(scene: Scene, rng: random.Random, keep: float) -> Scene:
    """Every slot stays with probability ``keep``; at least one stays."""
    filled = [slot for slot, values in scene.slots().items() if values]
    kept = {slot for slot in filled if rng.random() < keep} or {rng.choice(filled)}
    return sub_scene(scene, kept)


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
    """A training prompt: mostly the canonical caption, sometimes thinned or loosely worded.

    empty: the picture shows the scene without a product. Most of its prompts then say so ("an empty place on ..."),
        the rest keep "an object": the models that paint around a product start from the wording they will be given.
    """
    form = rng.random()
    if form > 0.85:
        text = loose_caption(thinned(scene, rng, 0.8), rng)
    else:
        text = (scene if form < 0.6 else thinned(scene, rng, 0.7)).render()
    return text.replace("an object", "an empty place") if empty and rng.random() < 0.7 else text


def product_words(product: dict[str, object]) -> str:
    """A plain noun phrase for the product, article included: "an amber glass bottle"."""
    kind = {"dropper": "dropper bottle", "pump": "pump bottle", "aerosol": "spray can", "perfume": "perfume bottle"}
    words = f"{product['palette']} {product['finish']} {kind.get(str(product['kind']), product['kind'])}"
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

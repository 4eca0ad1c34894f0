"""Seeing before speaking: a captioner's image encoder learns to tell the scene's phrases, before it learns to write.

Left to captions alone, a short training learns fluent sentences that do not look at the picture. Three things made the
difference on two cores (docs/log.md has the figures): small pictures first, which cost a quarter; means over a grid of
regions, so that a head finds the surface below and the wall above at once; and pictures put together from two scenes,
without which a network learns which walls go with which tables instead of looking at either.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packshot.lists import pick
from packshot.pipeline.shards import split
from packshot.scene import Scene
from tools.mini.budgeted_training import Plan, Progress, run_stretch
from tools.mini.clip import PHRASES, phrase_loss
from tools.mini.data import Render, Renders, images_of, mirrored, reframed, scenes_of, shares_right

GRID = 3  # regions a side
DROPOUT = 0.2  # of what is seen, while captions are learned: a few scenes that come often are recognised, not looked at
BATCH = 64


class Regions(torch.nn.Module):
    """Phrase logits_BP (all slots of ``PHRASES`` in a row) from the tokens of a square grid, tokens_BTC."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.phrases = torch.nn.Linear(width * GRID**2, sum(map(len, PHRASES.values())))

    def forward(self, tokens_BTC: Tensor) -> Tensor:
        side = round(tokens_BTC.shape[1] ** 0.5)
        tokens_BCHW = self.norm(tokens_BTC).transpose(1, 2).unflatten(2, (side, side))
        return self.phrases(F.adaptive_avg_pool2d(tokens_BCHW, GRID).flatten(1))


def other_product(render: Render, other: Render) -> np.ndarray:
    """The scene's plate with another scene's product, where that one stood, uint8 (SIZE, SIZE, 3)."""
    alpha = other.alpha[..., None]
    return (render.plate * (1 - alpha) + other.cutout[..., :3] * alpha).astype(np.uint8)


def stacked(below: Render, above: Render, rng: random.Random) -> tuple[np.ndarray, Scene]:
    """The lower part of one scene under the upper part of another, and the scene of the two together."""
    size = below.image.shape[0]
    seam = rng.randint(size * 27 // 64, size * 37 // 64)
    share = np.clip((np.arange(size) - seam) / 6 + 0.5, 0, 1)[:, None, None]
    image = (above.plate * (1 - share) + below.image * share).astype(np.uint8)
    return image, Scene(surface=below.scene.surface, background=above.scene.background)


def sight_batch(renders: Renders, generator: torch.Generator, count: int) -> tuple[list[np.ndarray], list[Scene]]:
    """Pictures and their scenes: renders as they are, with another product, and stacked; reframed and mirrored."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    images, scenes = [], []
    for render, other in zip(renders.draw(generator, count), renders.draw(generator, count), strict=True):
        image = render.image
        scene = render.scene
        form = rng.random()
        if form < 0.3:
            image, scene = stacked(render, other, rng)
        elif form < 0.55:
            image = other_product(render, other)
        image = reframed(image, rng)
        flip = rng.random() < 0.5
        images.append(image[:, ::-1] if flip else image)
        scenes.append(mirrored(scene) if flip else scene)
    return images, scenes


@torch.inference_mode()
def sight_accuracy(logits_of: Callable[[list[np.ndarray]], Tensor], renders: list[Render]) -> dict[str, float]:
    """Per slot, how often the likeliest phrase is one the scene has."""
    parts = [logits_of(images_of(batch)) for batch in split(renders, BATCH)]
    of_slots = torch.cat(parts).split(list(map(len, PHRASES.values())), dim=1)
    guesses = {}
    for (slot, phrases), logits_BP in zip(PHRASES.items(), of_slots, strict=True):
        guesses[slot] = pick(phrases, logits_BP.argmax(dim=1).tolist())
    return shares_right(guesses, scenes_of(renders))


def train_sight(
    name: str,
    tower: torch.nn.Module,
    regions: Regions,
    tokens_of: Callable[[list[np.ndarray], int], Tensor],
    renders: Renders,
    folder: Path,
    minutes: float,
    rate: float,
    sizes: tuple[int, ...],
    seed: int,
) -> Progress:
    """Train ``tower`` with ``regions`` on pictures of each side of ``sizes`` in turn, for equal shares of ``minutes``.

    tokens_of: tokens_BTC of uint8 images that are first brought to the given side.
    Returns: steps and seconds of all stretches together.
    """
    model = torch.nn.ModuleList([tower, regions])
    whole = Progress()
    for size in sizes:
        plan = Plan(f"{name} sight {size} px", folder / f"sight{size}", minutes / len(sizes), rate, BATCH, seed=seed)

        def loss_of(generator: torch.Generator, size: int = size) -> tuple[Tensor, dict[str, float]]:
            images, scenes = sight_batch(renders, generator, BATCH)
            loss = phrase_loss(regions(tokens_of(images, size)), scenes)
            return loss, {}

        def preview(at: Progress, size: int = size) -> None:
            accuracy = sight_accuracy(lambda images: regions(tokens_of(images, size)), renders.held_out)
            print(f"{name}  sight {size} px  step {at.step}  held out {accuracy}", flush=True)

        done = run_stretch(plan, model, loss_of, preview)
        whole = Progress(whole.step + done.step, whole.seconds + done.seconds)
    return whole

"""Stage ``matting``: a segmentation network for products, from rendered alpha."""

# diffusers annotates block tuples as one-element tuples.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import random
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from packshot.imaging.matting_network import alpha_logits, input_side
from packshot.pipeline.shards import split
from tools.mini.budgeted_training import DEVICE, Loss, Plan, Progress, fast_precision, run_stretch
from tools.mini.data import Render, Renders, to_pixels
from tools.mini.folder import Family
from tools.mini.matting_samples import SIDE, Material, Sample, draw, in_other_scene, in_studio, read_cutouts

PATCH = 4  # px; the network works on blocks of this side


def build_matting() -> UNet2DModel:
    """The network before training; its config holds the side of its input (``input_side``)."""
    return UNet2DModel(
        sample_size=SIDE // PATCH,
        in_channels=3 * PATCH**2,
        out_channels=PATCH**2,
        block_out_channels=(32, 48, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
    )


# ---- loss and scores ----


def matting_loss(logits_B1HW: torch.Tensor, alpha_B1HW: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every pixel plus one minus the soft overlap of every picture (Milletari et al. 2016, V-Net,
    arXiv 1606.04797, section 3), which counts a small product as much as a large one."""
    guess = logits_B1HW.sigmoid()
    shared = (guess * alpha_B1HW).sum((1, 2, 3))
    overlap = (2 * shared + 1) / (guess.pow(2).sum((1, 2, 3)) + alpha_B1HW.pow(2).sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits_B1HW, alpha_B1HW) + 0.5 * (1 - overlap).mean()


@torch.inference_mode()
def find_alphas(network: UNet2DModel, images: list[np.ndarray]) -> list[np.ndarray]:
    """Alpha of uint8 RGB pictures, float32 (height, width) at each picture's own size."""
    side = input_side(network)
    squares = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images]
    found = alpha_logits(network, to_pixels(squares).to(DEVICE)).sigmoid()[:, 0].float().cpu().numpy()
    alphas = []
    for alpha, image in zip(found, images, strict=True):
        alphas.append(cv2.resize(alpha, image.shape[1::-1], interpolation=cv2.INTER_LINEAR))
    return alphas


def measure_matting(network: UNet2DModel, samples: list[Sample]) -> dict[str, float]:
    """``iou``: mean over pictures of the overlap of alpha >= 0.5; ``good``: share above 0.9; ``error``: mean absolute
    error of alpha."""
    overlaps, errors = [], []
    for batch in split(samples, 32):
        images, truths = zip(*batch, strict=True)
        for guess, truth in zip(find_alphas(network, list(images)), truths, strict=True):
            both = (guess >= 0.5) & (truth >= 0.5)
            either = (guess >= 0.5) | (truth >= 0.5)
            overlaps.append(both.sum() / either.sum())
            errors.append(np.abs(guess - truth).mean())
    good = np.mean(np.array(overlaps) > 0.9)
    return {"iou": float(np.mean(overlaps)), "good": float(good), "error": float(np.mean(errors))}


def held_out_samples(scenes: list[Render]) -> dict[str, list[Sample]]:
    """Renders as they are, and for each a studio picture and a composite of held-out products: always the same."""
    material = Material(scenes, [])
    seeds = range(len(scenes))
    return {
        "scenes": [(scene.image, scene.alpha) for scene in scenes],
        "studio": [in_studio(material, random.Random(seed)) for seed in seeds],
        "composites": [in_other_scene(material, random.Random(seed)) for seed in seeds],
    }


def _scores(network: UNet2DModel, held_out: dict[str, list[Sample]], count: int | None) -> dict[str, float]:
    scores = {}
    for name, samples in held_out.items():
        for key, value in measure_matting(network, samples[:count]).items():
            scores[f"{name}_{key}"] = value
    return scores


def _loss(network: UNet2DModel, material: Material, batch_size: int) -> Loss:
    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        images, alphas = zip(*(draw(material, rng) for _ in range(batch_size)), strict=True)
        pixels = to_pixels(list(images)).to(DEVICE)
        alpha_B1HW = torch.from_numpy(np.stack(alphas))[:, None].to(DEVICE)
        with fast_precision():
            logits = alpha_logits(network, pixels)
        return matting_loss(logits.float(), alpha_B1HW), {}

    return loss_of


def train_matting(
    renders: Renders, family: Family, folder: Path, minutes: float, seed: int, cutouts: Path | None
) -> None:
    """Train the network and stage it. cutouts: a folder of further products with alpha."""
    held_out = held_out_samples(renders.held_out)
    torch.manual_seed(seed)
    network = build_matting().to(DEVICE, memory_format=torch.channels_last)
    rate = family.rate(2e-3) if family.begin(network, "") else 2e-3
    plan = Plan("matting", folder, minutes, rate, batch_size=16, seed=seed)
    loss_of = _loss(network, Material(renders.train, read_cutouts(cutouts)), plan.batch_size)

    def preview(at: Progress) -> None:
        print(f"matting  step {at.step}  held out {_scores(network, held_out, 64)}", flush=True)

    progress = run_stretch(plan, network, loss_of, preview)
    measures = _scores(network, held_out, None)
    score = (measures["scenes_iou"] + measures["studio_iou"]) / 2
    record = family.record("matting", progress, renders, score, measures, network.num_parameters())
    family.keep_if_better("matting", record, lambda staging: network.half().save_pretrained(staging))

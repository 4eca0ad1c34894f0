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

from packshot.imaging.matting_network import PATCH, SIDE, alpha_logits
from tools.mini.budgeted_training import Plan, Progress, run_stretch
from tools.mini.data import Render, Renders, to_pixels
from tools.mini.folder import Family, Record

# Shares of samples: renders as they are, and grounds without a product; the rest are cut-outs on other grounds.
IN_SCENE, EMPTY = 0.5, 0.07
Sample = tuple[np.ndarray, np.ndarray]  # uint8 (SIDE, SIDE, 3), float32 alpha (SIDE, SIDE)


def build_matting() -> UNet2DModel:
    """The network before training."""
    return UNet2DModel(
        sample_size=SIDE // PATCH,
        in_channels=3 * PATCH**2,
        out_channels=PATCH**2,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
    )


# ---- samples ----


def _window(alpha_HW: np.ndarray, rng: random.Random) -> np.ndarray:
    """A random affine map (2, 3) after which the product is still inside: crop, stretch, small turn, mirror."""
    rows, columns = np.nonzero(alpha_HW > 0.5)
    # pixel i lies between i - 1/2 and i + 1/2
    top, left, bottom, right = rows.min() - 0.5, columns.min() - 0.5, rows.max() + 0.5, columns.max() + 0.5
    most = 0.95 * SIDE / max(bottom - top, right - left)
    scale = float(np.exp(rng.uniform(np.log(0.6), np.log(max(0.65, min(most, 2.2))))))
    stretch = float(np.exp(rng.uniform(-0.2, 0.2)))
    turn = np.deg2rad(rng.gauss(0, 4))
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ np.diag((scale * stretch, scale / stretch))
    if rng.random() < 0.5:
        matrix[:, 0] *= -1
    reach = np.abs(matrix) @ np.array([right - left, bottom - top]) / 2  # of the turned and stretched box, each way
    shrink = min(1.0, 0.5 * SIDE / reach.max())
    matrix, reach = matrix * shrink, reach * shrink
    centre = matrix @ np.array([(left + right) / 2, (top + bottom) / 2])
    middle = (SIDE - 1) / 2
    where = [middle + rng.uniform(-1, 1) * (SIDE / 2 - half) for half in reach]
    return np.column_stack([matrix, np.array(where) - centre]).astype(np.float32)


def _warp(array: np.ndarray, matrix_23: np.ndarray, border: int = cv2.BORDER_CONSTANT) -> np.ndarray:
    return cv2.warpAffine(array, matrix_23, (SIDE, SIDE), flags=cv2.INTER_AREA, borderMode=border)


def _in_scene(scene: Render, rng: random.Random) -> Sample:
    """The render through a window; what lies beyond it is the mirrored plate, where there is no second product."""
    matrix = _window(scene.alpha, rng)
    inside_HW1 = _warp(np.ones((SIDE, SIDE), np.float32), matrix)[..., None]
    beyond = _warp(scene.plate, matrix, cv2.BORDER_REFLECT_101)
    image = _warp(scene.image, matrix) + beyond * (1 - inside_HW1)
    return image.clip(0, 255).astype(np.uint8), _warp(scene.alpha, matrix)


def _studio(rng: random.Random) -> np.ndarray:
    """A plain ground: one colour, mostly light and grey, with a gradient and a horizon now and then."""
    light = rng.choice((1.0, rng.uniform(0.75, 1), rng.uniform(0, 1)))
    tint = np.array([rng.gauss(0, 0.04 if rng.random() < 0.7 else 0.25) for _ in range(3)])
    ground = np.full((SIDE, SIDE, 3), light) + tint
    slope = np.linspace(-1, 1, SIDE)[:, None, None] * rng.gauss(0, 0.08)
    ground = ground + (slope if rng.random() < 0.5 else slope.transpose(1, 0, 2))
    if rng.random() < 0.4:
        ground[int(SIDE * rng.uniform(0.5, 0.9)) :] += rng.gauss(0, 0.1)
    return np.clip(255 * ground, 0, 255).astype(np.uint8)


def _shadowed(ground: np.ndarray, alpha_HW: np.ndarray, rng: random.Random) -> np.ndarray:
    """The ground with a soft shadow of the product: its outline, flattened towards its foot, moved and blurred."""
    bottom = np.nonzero(alpha_HW.max(1) > 0.5)[0].max()
    flat = rng.uniform(0.05, 0.6)
    matrix = np.array([[1, rng.gauss(0, 0.5), 0], [0, flat, (1 - flat) * bottom]], np.float32)
    matrix[0, 2] = -matrix[0, 1] * bottom
    shadow = cv2.GaussianBlur(_warp(alpha_HW, matrix), (0, 0), rng.uniform(1, 6))
    return (ground * (1 - rng.uniform(0.1, 0.7) * shadow[..., None])).astype(np.uint8)


def _ground(other: Render, rng: random.Random) -> np.ndarray:
    """A scene's plate through a window, or a studio."""
    plain = rng.random() < 0.5
    return _studio(rng) if plain else _warp(other.plate, _window(other.alpha, rng), cv2.BORDER_REFLECT_101)


def _composite(scene: Render, other: Render, rng: random.Random) -> Sample:
    """The product of one scene before another ground."""
    cutout = _warp(scene.cutout, _window(scene.alpha, rng))
    alpha_HW = cutout[..., 3].astype(np.float32) / 255
    ground = _ground(other, rng)
    if rng.random() < 0.6:
        ground = _shadowed(ground, alpha_HW, rng)
    mixed = cutout[..., :3] * alpha_HW[..., None] + ground * (1 - alpha_HW[..., None])
    return mixed.round().astype(np.uint8), alpha_HW


def _photographed(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """What cameras and files do: exposure, contrast, colour, blur, noise, JPEG."""
    pixels = (image / 255.0) ** float(np.exp(rng.gauss(0, 0.25)))
    pixels = (pixels - 0.5) * float(np.exp(rng.gauss(0, 0.15))) + 0.5 + rng.gauss(0, 0.04)
    pixels *= np.exp([rng.gauss(0, 0.08) for _ in range(3)])
    if rng.random() < 0.2:
        pixels = np.roll(pixels, rng.randrange(3), axis=-1)
    if rng.random() < 0.3:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.3, 1.2))
    if rng.random() < 0.4:
        pixels += np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 0.04), pixels.shape)
    image = (255 * np.clip(pixels, 0, 1)).round().astype(np.uint8)
    if rng.random() < 0.3:
        file = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, rng.randint(40, 95)])[1]
        return np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR))
    return image


def draw(scenes: list[Render], rng: random.Random) -> Sample:
    """One training sample."""
    scene, other, kind = rng.choice(scenes), rng.choice(scenes), rng.random()
    if kind < EMPTY:
        image, alpha_HW = _ground(other, rng), np.zeros((SIDE, SIDE), np.float32)
    else:
        image, alpha_HW = _in_scene(scene, rng) if kind < EMPTY + IN_SCENE else _composite(scene, other, rng)
    return _photographed(image, rng), alpha_HW


# ---- loss and scores ----


def matting_loss(logits_B1HW: torch.Tensor, alpha_B1HW: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every pixel plus one minus the soft overlap of every picture (Milletari et al. 2016, V-Net,
    arXiv 1606.04797, section 3), which counts a small product as much as a large one."""
    guess = logits_B1HW.sigmoid()
    shared = (guess * alpha_B1HW).sum((1, 2, 3))
    overlap = (2 * shared + 1) / (guess.pow(2).sum((1, 2, 3)) + alpha_B1HW.pow(2).sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits_B1HW, alpha_B1HW) + 0.5 * (1 - overlap).mean()


@torch.inference_mode()
def measure_matting(network: UNet2DModel, samples: list[Sample]) -> dict[str, float]:
    """``iou``: mean over pictures of the overlap of alpha >= 0.5; ``good``: share above 0.9; ``error``: mean absolute
    error of alpha."""
    found = []
    for first in range(0, len(samples), 32):
        images = [image for image, _ in samples[first : first + 32]]
        found.append(alpha_logits(network, to_pixels(images)).sigmoid()[:, 0].numpy())
    guess, truth = np.concatenate(found), np.stack([alpha for _, alpha in samples])
    a, b = guess >= 0.5, truth >= 0.5
    iou = (a & b).sum((1, 2)) / (a | b).sum((1, 2))
    return {"iou": float(iou.mean()), "good": float((iou > 0.9).mean()), "error": float(np.abs(guess - truth).mean())}


def _held_out(scenes: list[Render]) -> dict[str, list[Sample]]:
    """Renders as they are, and one composite of each: the same at every call."""
    composites = [
        _composite(scene, random.Random(i).choice(scenes), random.Random(i)) for i, scene in enumerate(scenes)
    ]
    return {"scenes": [(scene.image, scene.alpha) for scene in scenes], "composites": composites}


def train_matting(renders: Renders, family: Family, folder: Path, minutes: float, seed: int) -> None:
    """Train the network and stage it."""
    held_out = _held_out(renders.held_out)
    torch.manual_seed(seed)
    network = build_matting().to(memory_format=torch.channels_last)
    family.begin(network, "")
    plan = Plan("matting", folder, minutes, learning_rate=family.rate(2e-3), batch_size=8, seed=seed)

    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        images, alphas = zip(*(draw(renders.train, rng) for _ in range(plan.batch_size)), strict=True)
        alpha_B1HW = torch.from_numpy(np.stack(alphas))[:, None]
        return matting_loss(alpha_logits(network, to_pixels(list(images))), alpha_B1HW), {}

    def preview(at: Progress) -> None:
        print(f"matting  step {at.step}  held out {_scores(network, held_out, 64)}", flush=True)

    progress = run_stretch(plan, network, loss_of, preview)
    measures = _scores(network, held_out, None)
    record = Record(
        score=measures["scenes_iou"],
        measures=measures,
        **family.effort("matting", progress),
        scenes=len(renders.train),
        held_out=renders.held_out_id,
        parameters=network.num_parameters(),
    )
    family.keep_if_better("matting", record, lambda staging: network.half().save_pretrained(staging))


def _scores(network: UNet2DModel, held_out: dict[str, list[Sample]], count: int | None) -> dict[str, float]:
    found = {name: measure_matting(network, samples[:count]) for name, samples in held_out.items()}
    return {f"{name}_{key}": value for name, figures in found.items() for key, value in figures.items()}

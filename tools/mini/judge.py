"""Stage ``judge``: a classifier of scenes that reads pictures for the scores, and takes part in nothing else.

Text-to-image scores ask whether a picture shows the surface, the background and the light of its prompt. The family's
own image encoder cannot be asked, because adapters and samplers are trained with it. This network is trained on renders
alone, no adapter or sampler ever sees it, and it is not shipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packshot.engine.checkpoints import on_cpu
from tools.mini.budgeted_training import DEVICE, Plan, Progress, fast_precision, run_stretch
from tools.mini.clip import phrase_loss
from tools.mini.data import Renders, to_pixels
from tools.mini.encoder_pretraining import BATCH, Regions, sight_accuracy, sight_batch
from tools.mini.folder import Family

CHANNELS = (32, 64, 128, 192)  # one level each, every level at half the size of the one before
WEIGHTS = "judge.safetensors"


class Block(nn.Module):
    """Halve the picture, then one residual convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.halve = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        self.branch = nn.Sequential(
            nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.halve(x_BCHW)
        return nn.functional.silu(x_BCHW + self.branch(x_BCHW))


class Judge(nn.Module):
    """Phrase logits_BP, all slots in a row, of pixels_B3HW in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *CHANNELS[:-1])
        self.tower = nn.Sequential(*map(Block, inputs, CHANNELS))
        self.regions = Regions(CHANNELS[-1])

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        return self.regions(self.tower(pixels_B3HW).flatten(2).transpose(1, 2))


def load_judge(folder: Path) -> Judge:
    """The judge of a folder, in eval mode."""
    judge = Judge()
    judge.load_state_dict(load_file(folder / WEIGHTS))
    return judge.eval()


def judge_logits(judge: Judge, images: list[np.ndarray]) -> Tensor:
    """Logits_BP of uint8 images."""
    return judge(to_pixels(images).to(next(judge.parameters()).device)).float().cpu()


def train_judge(renders: Renders, family: Family, folder: Path, minutes: float, seed: int) -> None:
    """Train the classifier on whole renders, on renders with another product, and on two scenes put together."""
    torch.manual_seed(seed)
    judge = Judge().to(DEVICE)
    plan = Plan("judge", folder, minutes, learning_rate=1e-3, batch_size=BATCH, seed=seed, weight_decay=0.05)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images, scenes = sight_batch(renders, generator, BATCH)
        pixels = to_pixels(images).to(DEVICE, memory_format=torch.channels_last)
        with fast_precision():
            logits = judge(pixels)
        return phrase_loss(logits.float().cpu(), scenes), {}

    def accuracy() -> dict[str, float]:
        return sight_accuracy(lambda images: judge_logits(judge, images), renders.held_out)

    def preview(at: Progress) -> None:
        print(f"judge  step {at.step}  held out {accuracy()}", flush=True)

    progress = run_stretch(plan, judge, loss_of, preview)
    measures = accuracy()
    score = (measures["surface"] + measures["background"] + measures["lighting"]) / 3
    parameters = sum(map(Tensor.numel, judge.parameters()))
    record = family.record("judge", progress, renders, score, measures, parameters)
    weights = on_cpu(judge.state_dict())
    family.keep_if_better("judge", record, lambda staging: save_file(weights, staging / WEIGHTS))

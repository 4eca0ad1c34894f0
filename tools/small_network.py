"""Training of the small networks behind checks of pictures, and their weights as text."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from packshot.imaging.check_network import Block

RATE = 3e-3
DECAY = 0.02
AVERAGE = 0.998  # of the weights that are kept, per step
WARM_UP = 400  # steps from zero to RATE
REPORT_EVERY = 250  # steps
LARGEST_VALUE = 99  # of a stored weight

Network = TypeVar("Network", bound=nn.Module)
Batch = tuple[Tensor, ...]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Training:
    """network: with normalisation. average: of its weights over the last steps, which is what is kept."""

    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    step: int = 0

    def save(self, file: Path) -> None:
        state = {"network": self.network.state_dict(), "average": self.average.state_dict()}
        torch.save(state | {"optimizer": self.optimizer.state_dict(), "step": self.step}, file)

    def load(self, file: Path) -> None:
        state = torch.load(file)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def learn(self, batch: Batch, rate: float) -> float:
        """One step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        loss = self.loss(self.network, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(AVERAGE, self.step / (self.step + 9))
        pairs = zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True)
        for kept, value in pairs:
            if kept.dtype.is_floating_point:
                kept.lerp_(value, 1 - keep)
        return loss.item()


def begin(make: Callable[[], nn.Module], loss: Loss, seed: int, state: Path | None) -> Training:
    """A new training of a network, or the one that a file keeps."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = make()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    training = Training(network, copy.deepcopy(network), optimizer, loss)
    if state is not None and state.exists():
        training.load(state)
    return training


def rate_at(step: int, steps: int) -> float:
    """Up in a straight line, down as a cosine."""
    return RATE * min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def folded(network: Network) -> Network:
    """The network with its normalisation folded into the convolutions before it."""
    plain = copy.deepcopy(network).eval()
    for block in plain.modules():
        if isinstance(block, Block) and isinstance(block.norm, nn.BatchNorm2d):
            block.depthwise = fuse_conv_bn_eval(block.depthwise, block.norm)
            block.norm = nn.Identity()
    return plain


def as_text(network: nn.Module) -> str:
    """Weights as whole numbers with a scale for each row of a tensor."""
    entries = {}
    for name, tensor in network.state_dict().items():
        rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor[None]
        scales = rows.abs().amax(dim=1).clamp(min=1e-8) / LARGEST_VALUE
        scales = torch.tensor([float(f"{scale:.4g}") for scale in scales])
        values = torch.round(rows / scales[:, None]).int()
        entries[name] = {"scales": [float(f"{scale:.4g}") for scale in scales], "values": values.tolist()}
    lines = [f'"{name}": {json.dumps(entry, separators=(",", ":"))}' for name, entry in entries.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def fit(
    training: Training,
    draw_batch: Callable[[np.random.Generator], Batch],
    progress: Callable[[nn.Module], str],
    args: argparse.Namespace,
) -> None:
    """Train up to ``args.steps``; weights are written, and the progress printed, every REPORT_EVERY steps.

    draw_batch: of a step's own generator. progress: what is printed of a network. args: see :func:`arguments`.
    """
    losses: list[float] = []
    began = time.process_time()
    while training.step < args.steps:
        batch = draw_batch(np.random.default_rng([args.seed, training.step]))
        losses.append(training.learn(batch, rate_at(training.step, args.steps)))
        if training.step % REPORT_EVERY == 0 or training.step == args.steps:
            seconds = time.process_time() - began
            found = progress(training.average)
            print(f"{training.step} {np.mean(losses[-REPORT_EVERY:]):.4f} {seconds:.0f}s {found}", flush=True)
            args.out.write_text(as_text(folded(training.average)))
            if args.state:
                training.save(args.state)


def arguments(about: str | None, weights: Path, steps: int, step: str) -> argparse.ArgumentParser:
    """The arguments of a tool that trains on rendered scenes. weights: where they go. step: what one reads."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", default="data/rendered/train")
    parser.add_argument("--held-out", default="data/rendered/heldout")
    parser.add_argument("--steps", type=int, default=steps, help=f"of {step} each")
    parser.add_argument("--out", type=Path, default=weights)
    parser.add_argument("--state", type=Path, help="file that keeps the training; it is continued if it is there")
    parser.add_argument("--seed", type=int, default=0)
    return parser

"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from packshot.config.schema import LRSchedule, OptimConfig, OptimizerKind, TrainConfig


def _adamw(
    parameters: Iterable[torch.nn.Parameter], config: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        eps=config.eps,
        fused=True,
    )


OPTIMIZERS: dict[OptimizerKind, Callable[..., torch.optim.Optimizer]] = {OptimizerKind.adamw: _adamw}

# Share of the peak at the share ``done`` in [0, 1] of the steps after the warm-up.
SCHEDULES: dict[LRSchedule, Callable[[float], float]] = {
    LRSchedule.constant: lambda done: 1.0,
    LRSchedule.linear: lambda done: 1 - done,
    LRSchedule.cosine: lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` (0-based): a closed form, so there is no scheduler to get out of step.

    It counts optimizer steps, whatever the accumulation and the number of processes.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.learning_rate * SCHEDULES[config.lr_schedule](min(1.0, done))

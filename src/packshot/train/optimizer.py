"""Optimizers by name, from their libraries, and learning-rate schedules as closed forms of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from packshot.config.schema import LRSchedule, OptimConfig, OptimizerKind, TrainConfig
from packshot.core.errors import ConfigError

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    return torch.optim.AdamW(groups, betas=betas, weight_decay=decay, eps=config.eps, fused=True)


def _adam8bit(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Dettmers et al. 2021 (arXiv 2110.02861): moments in eight bits; small tensors keep 32
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, eps=config.eps)


def _adafactor(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Shazeer & Stern 2018 (arXiv 1804.04235): second moments as an outer product
    return torch.optim.Adafactor(groups, weight_decay=config.weight_decay)


def _prodigy(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Mishchenko & Defazio 2023 (arXiv 2306.06101): finds its own step size
    from prodigyopt import Prodigy

    betas, decay = (config.beta1, config.beta2), config.weight_decay
    make: Any = Prodigy  # its signature calls rates integers
    return make(
        groups, betas=betas, weight_decay=decay, eps=config.eps, use_bias_correction=True, safeguard_warmup=True
    )


def _schedule_free(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Defazio et al. 2024 (arXiv 2405.15682): averaging instead of decay
    from schedulefree import AdamWScheduleFree

    betas = (config.beta1, config.beta2)
    return AdamWScheduleFree(groups, betas=betas, weight_decay=config.weight_decay, eps=config.eps)


def _lion(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Chen et al. 2023 (arXiv 2302.06675): the sign of a momentum; wants a rate 3 to 10 times below AdamW's
    from lion_pytorch import Lion

    return Lion(groups, betas=(config.beta1, min(config.beta2, 0.99)), weight_decay=config.weight_decay)


OPTIMIZERS: dict[OptimizerKind, Callable[[Groups, OptimConfig], torch.optim.Optimizer]] = {
    OptimizerKind.adamw: _adamw,
    OptimizerKind.adam8bit: _adam8bit,
    OptimizerKind.adafactor: _adafactor,
    OptimizerKind.prodigy: _prodigy,
    OptimizerKind.schedule_free: _schedule_free,
    OptimizerKind.lion: _lion,
}


def build_optimizer(
    parameters: dict[str, torch.nn.Parameter], config: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of ``optim.kind`` over one group for each pattern of ``optim.groups`` and one for the rest.

    A group's ``peak`` is the learning rate that the schedule scales; it survives in the optimizer's state.

    Raises:
        ConfigError: a pattern is no "regex=rate" or matches no trained parameter.
    """
    rest, groups = dict(parameters), []
    for text in config.groups:
        pattern, _, rate = text.rpartition("=")
        try:
            peak = float(rate)
            mine = {name: rest.pop(name) for name in list(rest) if re.search(pattern, name)}
        except (ValueError, re.error) as error:
            raise ConfigError(f"optim.groups: {text!r} is no 'regex=learning rate' ({error}).") from error
        if not mine:
            raise ConfigError(
                f"optim.groups: {pattern!r} matches no trained parameter that an earlier pattern has left.",
                f"There are, for example: {', '.join(list(parameters)[:4])}.",
            )
        groups.append({"params": list(mine.values()), "lr": peak, "peak": peak})
    if rest:
        groups.insert(0, {"params": list(rest.values()), "lr": learning_rate, "peak": learning_rate})
    return OPTIMIZERS[config.kind](groups, config)


def set_learning_rate(optimizer: Any, step: int, config: TrainConfig) -> float:
    """Give every group its rate for optimizer step ``step``; returns the first group's."""
    share = schedule(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return optimizer.param_groups[0]["lr"]


def training_mode(optimizer: Any) -> None:
    """Schedule-free optimizers hold other weights while they train; others need nothing."""
    getattr(optimizer, "train", _nothing)()


def evaluation_mode(optimizer: Any) -> None:
    """Before weights are validated, saved or exported; see :func:`training_mode`."""
    getattr(optimizer, "eval", _nothing)()


def _nothing() -> None:
    pass


# Share of the peak at the share ``done`` in [0, 1] of the steps after the warm-up.
SCHEDULES: dict[LRSchedule, Callable[[float, TrainConfig], float]] = {
    LRSchedule.constant: lambda done, config: 1.0,
    LRSchedule.linear: lambda done, config: 1 - done,
    LRSchedule.cosine: lambda done, config: 0.5 * (1 + math.cos(math.pi * done)),
    LRSchedule.polynomial: lambda done, config: (1 - done) ** config.lr_power,
    # warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395, section 4)
    LRSchedule.wsd: lambda done, config: min(1.0, (1 - done) / config.lr_decay_share),
    LRSchedule.cosine_restarts: lambda done, config: 0.5 * (1 + math.cos(math.pi * ((done * config.lr_cycles) % 1.0))),
}


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (0-based), in [0, 1].

    A closed form, so there is no scheduler to get out of step. It counts optimizer steps, whatever the accumulation
    and the number of processes, and ends at ``lr_min_ratio``.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    share = SCHEDULES[config.lr_schedule](min(1.0, done), config)
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * share


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` for parameters without a group of their own."""
    return config.learning_rate * schedule(step, config)

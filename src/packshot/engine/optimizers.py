"""The optimizer of a run, its state, and learning rates as closed forms of the step."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from packshot.config.optimizers import OPTIMIZERS
from packshot.config.schema import LRSchedule, OptimConfig, TrainConfig, group_rates
from packshot.engine.sharding import shard_like
from packshot.errors import ConfigError, PackshotError
from packshot.lists import column
from packshot.runs.folder import log

Group = dict[str, Any]  # a parameter group, as torch.optim keeps it


def build_optimizer(
    parameters: dict[str, torch.nn.Parameter], config: OptimConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of ``optim.kind``, with one group for each pattern of ``optim.groups`` and one for the rest.

    A group's ``peak`` is the learning rate that the schedule scales. It and ``names``, which identifies the group's
    parameters in their order, are part of the optimizer's state; :func:`load_optimizer` compares the names.

    Raises:
        ConfigError: a pattern is not "regex=rate", or matches no trained parameter.
    """
    row = OPTIMIZERS[config.kind.name]
    if row.finds_step_size and learning_rate < 0.5:
        log.warning(
            "optim=%s expects train.learning_rate=1; %g shrinks the step size that it finds", row.name, learning_rate
        )
    rest = dict(parameters)
    groups: list[Group] = []
    for pattern, peak in group_rates(config):
        matched = {name: rest.pop(name) for name in list(rest) if re.search(pattern, name)}
        if not matched:
            raise ConfigError(
                f"optim.groups: {pattern!r} matches no trained parameter that an earlier pattern has left.",
                f"Some of their names: {', '.join(list(parameters)[:4])}.",
            )
        groups.append(_group(matched, peak))
    if rest:
        groups.insert(0, _group(rest, learning_rate))
    return row.build(groups, config)


def _group(parameters: dict[str, torch.nn.Parameter], peak: float) -> Group:
    names = hashlib.sha256("\n".join(parameters).encode()).hexdigest()[:12]
    return {"params": list(parameters.values()), "lr": peak, "peak": peak, "names": f"{len(parameters)} ({names})"}


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Restore the state of an optimizer of the same parameters.

    torch and bitsandbytes give the state of each position to the parameter at that position and ignore its name.

    Raises:
        PackshotError: the state belongs to other parameters.
    """
    expected = column(optimizer.param_groups, "names")
    found = column(stored["param_groups"], "names")
    if expected != found:
        raise PackshotError(
            f"The checkpoint's optimizer holds other parameters: {', '.join(found)}; this run has "
            f"{', '.join(expected)}.",
            "Resume with the version and the settings of the run that wrote it, or start a new run.",
        )
    sharded = column(stored["param_groups"], "params"), column(optimizer.param_groups, "params")
    for numbers, parameters in zip(*sharded, strict=True):
        for number, parameter in zip(numbers, parameters, strict=True):
            state = stored["state"].get(number, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[name] = shard_like(value, parameter)
    optimizer.load_state_dict(stored)


class StepInBackward:
    """Steps an optimizer parameter by parameter during the backward pass, and frees each gradient at once.

    There is never more than one whole gradient. The optimizer keeps all parameters in its groups, so its state equals
    that of ordinary steps. Only for optimizers that treat each parameter by itself (``stepwise`` in their row).

    :meth:`norm` reveals a gradient that is not finite, but only after it has spoiled the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._norms: list[torch.Tensor] = []
        self._hooks: list[RemovableHandle] = []
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._step, index)))

    def _step(self, group: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # PyTorch calls this hook right after it has added to the gradient
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        groups = self._optimizer.param_groups  # looked up each time, because loading a state replaces the groups
        self._optimizer.param_groups = [{**groups[group], "params": [parameter]}]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

    def norm(self) -> torch.Tensor:
        """L2 norm of the gradients that were applied since the last call, scalar."""
        norm = torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros(())
        self._norms.clear()
        return norm

    def remove(self) -> None:
        """Leave the parameters to ordinary steps again."""
        for hook in self._hooks:
            hook.remove()


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainConfig) -> float:
    """Give every group its rate for optimizer step ``step``; returns the first group's rate."""
    share = schedule(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return optimizer.param_groups[0]["lr"]


def training_mode(optimizer: torch.optim.Optimizer) -> None:
    """Schedule-free optimizers train on other weights than those they validate; the others need nothing."""
    if hasattr(optimizer, "train"):
        optimizer.train()


def evaluation_mode(optimizer: torch.optim.Optimizer) -> None:
    """To call before weights are validated, saved or exported; see :func:`training_mode`."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


# Share of the peak at the share ``done`` in [0, 1] of the steps after the warm-up.
SCHEDULES: dict[LRSchedule, Callable[[float, TrainConfig], float]] = {
    LRSchedule.constant: lambda done, config: 1.0,
    LRSchedule.linear: lambda done, config: 1 - done,
    LRSchedule.cosine: lambda done, config: 0.5 * (1 + math.cos(math.pi * done)),
    LRSchedule.polynomial: lambda done, config: (1 - done) ** config.lr_power,
    # warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395, section 4)
    LRSchedule.wsd: lambda done, config: min(1.0, (1 - done) / config.lr_decay_share),
    # Loshchilov & Hutter 2017 (arXiv 1608.03983), with cycles of equal length. Rounding counts 12.999… cycles as 13;
    # otherwise a restart would be missed.
    LRSchedule.cosine_restarts: lambda done, config: (
        0.5 * (1 + math.cos(math.pi * (round(done * config.lr_cycles, 9) % 1.0)))
    ),
}


def schedule(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at optimizer step ``step`` (0-based), in [0, 1].

    It is a closed form, so no scheduler can get out of step. It depends on optimizer steps alone, not on accumulation
    or the number of processes, and it ends at ``lr_min_ratio``.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    share = SCHEDULES[config.lr_schedule](min(1.0, done), config)
    return config.lr_min_ratio + (1 - config.lr_min_ratio) * share


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step ``step`` for parameters without a group of their own."""
    return config.learning_rate * schedule(step, config)

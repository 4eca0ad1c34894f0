"""Optimizers by name, from their libraries, and learning-rate schedules as closed forms of the step."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from packshot.config.checks import group_rates
from packshot.config.schema import LRSchedule, OptimConfig, OptimizerKind, TrainConfig
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import log

Groups = list[dict[str, Any]]


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    return torch.optim.AdamW(groups, betas=betas, weight_decay=decay, eps=config.eps, fused=True)


def _adam8bit(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Dettmers et al. 2021 (arXiv 2110.02861): moments in eight bits; small tensors keep 32
    from bitsandbytes.optim import AdamW8bit

    class Checked(AdamW8bit):
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            _refuse_other_parameters(self, state_dict)  # bitsandbytes replaces this method and calls no hooks
            super().load_state_dict(state_dict, move_to_device)

    return Checked(groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, eps=config.eps)


def _adafactor(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    # Shazeer & Stern 2018 (arXiv 1804.04235): second moments as an outer product. The paper scales each step by the
    # parameter's root mean square, at least 1e-3: an adapter's matrix that starts at zero would hardly move. A floor of
    # 1 makes the rate an absolute one, as for the others.
    return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=config.weight_decay)


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

    A group's ``peak`` is the learning rate that the schedule scales. It and ``names``, the identity of the group's
    parameters in their order, survive in the optimizer's state: loading that of others raises PackshotError.

    Raises:
        ConfigError: a pattern is no "regex=rate" or matches no trained parameter.
    """
    if config.kind is OptimizerKind.prodigy and learning_rate < 0.5:
        log.warning("optim=prodigy expects train.learning_rate=1; %g shrinks the step size it finds", learning_rate)
    rest, groups = dict(parameters), []
    for pattern, peak in group_rates(config):
        mine = {name: rest.pop(name) for name in list(rest) if re.search(pattern, name)}
        if not mine:
            raise ConfigError(
                f"optim.groups: {pattern!r} matches no trained parameter that an earlier pattern has left.",
                f"There are, for example: {', '.join(list(parameters)[:4])}.",
            )
        groups.append(_group(mine, peak))
    if rest:
        groups.insert(0, _group(rest, learning_rate))
    optimizer = OPTIMIZERS[config.kind](groups, config)
    optimizer.register_load_state_dict_pre_hook(_refuse_other_parameters)
    return optimizer


def _group(parameters: dict[str, torch.nn.Parameter], peak: float) -> dict[str, Any]:
    names = hashlib.sha256("\n".join(parameters).encode()).hexdigest()[:12]
    return {"params": list(parameters.values()), "lr": peak, "peak": peak, "names": f"{len(parameters)} ({names})"}


def _refuse_other_parameters(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Loading gives every parameter the moments of its position, whatever its name."""
    mine, theirs = ([group["names"] for group in groups] for groups in (optimizer.param_groups, stored["param_groups"]))
    if mine != theirs:
        raise PackshotError(
            f"The checkpoint's optimizer is of other parameters: {', '.join(theirs)}; this run has {', '.join(mine)}.",
            "Resume with the version and the settings that it was made with, or start a new run.",
        )


class StepInBackward:
    """Steps an optimizer parameter by parameter during the backward pass, and frees each gradient.

    At no time is there more than one whole gradient. The optimizer keeps all parameters in its groups, so its state
    is that of ordinary steps. Only for optimizers that treat each parameter by itself.

    A gradient that is not finite is found by :meth:`norm`, when the parameters have been spoiled already.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._norms: list[torch.Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._step, index))
            for index, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        ]

    def _step(self, group: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # PyTorch calls this hook when it has added to the gradient
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        groups = self._optimizer.param_groups  # loading a state makes new ones: they are looked up each time
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
    # Loshchilov & Hutter 2017 (arXiv 1608.03983), cycles of one length; 12.999… of them are 13, or a restart is missed
    LRSchedule.cosine_restarts: lambda done, config: (
        0.5 * (1 + math.cos(math.pi * (round(done * config.lr_cycles, 9) % 1.0)))
    ),
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

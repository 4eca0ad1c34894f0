"""One row for each optimizer: all that configuration, checks, plan, findings and engine know about it.

To add an optimizer, write its builder and its row here and a YAML file in ``conf/optim``. Libraries are imported inside
the builders, so that this module costs nothing at ``--help``. docs/decisions.md explains why the rows live here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch costs a second, and the schema imports this module
    import torch
    from torch.optim.optimizer import ParamsT

    from packshot.config.train import OptimConfig, TrainConfig


@dataclass(frozen=True)
class Conflict:
    """Settings that an optimizer cannot work with; the config is refused.

    exists: whether a config has them. message, hint: the error; ``{optim.…}`` and ``{train.…}`` are filled in.
    """

    exists: Callable[[OptimConfig, TrainConfig], bool]
    message: str
    hint: str


@dataclass(frozen=True)
class OptimizerRow:
    """What one optimizer is.

    name: the value of ``optim.kind``. build: makes it for parameter groups, each with its own ``lr``.
    reads: the keys of ``optim`` that change what it does; another value than the default of any other key is refused.
    state_bytes: bytes of its state for each trained parameter, in fp32 unless its name has another precision.
    usual_rates: lowest and highest peak learning rate that are usual for adapters and ControlNets; others mostly are a
        slip of a power of ten, or the setting of another optimizer, and ``mode=check`` reports them.
    finds_step_size: the learning rate only multiplies a step size that the optimizer finds, so it should be 1.
    stepwise: treats every parameter by itself, which train.fused_backward needs; the step size of the others depends
        on all parameters at once.
    elementwise: treats every value of a parameter by itself, which sharded training needs.
    """

    name: str
    build: Callable[[ParamsT, OptimConfig], torch.optim.Optimizer]
    reads: tuple[str, ...]
    state_bytes: int
    usual_rates: tuple[float, float] = (1e-6, 2e-3)
    finds_step_size: bool = False
    stepwise: bool = True
    elementwise: bool = False
    conflicts: tuple[Conflict, ...] = ()


def adamw(groups: ParamsT, config: OptimConfig) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019 (arXiv 1711.05101)."""
    import torch

    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=config.weight_decay, eps=config.eps, fused=True)


def adam8bit(groups: ParamsT, config: OptimConfig) -> torch.optim.Optimizer:
    """Dettmers et al. 2021 (arXiv 2110.02861): moments in eight bits; small tensors keep 32."""
    from bitsandbytes.optim import AdamW8bit

    betas = (config.beta1, config.beta2)
    return AdamW8bit(groups, betas=betas, weight_decay=config.weight_decay, eps=config.eps)


def adafactor(groups: ParamsT, config: OptimConfig) -> torch.optim.Optimizer:
    """Shazeer & Stern 2018 (arXiv 1804.04235): second moments as an outer product."""
    import torch

    # The paper scales each step by the parameter's root mean square, at least 1e-3: an adapter's matrix that starts at
    # zero would hardly move. A floor of 1 makes the rate an absolute one, as for the others.
    return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=config.weight_decay)


def prodigy(groups: ParamsT, config: OptimConfig) -> torch.optim.Optimizer:
    """Mishchenko & Defazio 2023 (arXiv 2306.06101): finds its own step size."""
    from prodigyopt import Prodigy

    return Prodigy(
        groups,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,  # type: ignore[arg-type]  # its signature calls it an integer
        eps=config.eps,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def schedule_free(groups: ParamsT, config: OptimConfig) -> torch.optim.Optimizer:
    """Defazio et al. 2024 (arXiv 2405.15682): averages instead of decaying the rate."""
    from schedulefree import AdamWScheduleFree

    betas = (config.beta1, config.beta2)
    return AdamWScheduleFree(groups, betas=betas, weight_decay=config.weight_decay, eps=config.eps)


def lion(groups: ParamsT, config: OptimConfig) -> torch.optim.Optimizer:
    """Chen et al. 2023 (arXiv 2302.06675): the sign of a momentum; wants a rate 3 to 10 times below AdamW's."""
    from lion_pytorch import Lion

    return Lion(groups, betas=(config.beta1, min(config.beta2, 0.99)), weight_decay=config.weight_decay)


_OWN_STEP_SIZE = (
    Conflict(
        lambda optim, train: bool(optim.groups),
        "optim={optim.kind} finds one step size for all parameters; optim.groups would give some another.",
        "Leave optim.groups empty, or choose another optimizer.",
    ),
    Conflict(
        lambda optim, train: train.learning_rate < 0.01,
        "optim={optim.kind} finds the step size itself; train.learning_rate={train.learning_rate} only shrinks it.",
        "Set train.learning_rate=1.",
    ),
)

_OWN_AVERAGE = (
    Conflict(
        lambda optim, train: train.ema_decay > 0,
        "optim={optim.kind} keeps an average itself; train.ema_decay={train.ema_decay} would export another one, of "
        "the points where gradients are taken.",
        "Set train.ema_decay=0.",
    ),
    Conflict(
        lambda optim, train: train.lr_schedule.name != "constant",
        "optim={optim.kind} averages instead of decaying; train.lr_schedule={train.lr_schedule} would do both.",
        "Set train.lr_schedule=constant.",
    ),
)

ADAM_KEYS = ("beta1", "beta2", "weight_decay", "eps")

OPTIMIZERS: dict[str, OptimizerRow] = {}


def register(row: OptimizerRow) -> None:
    """Make an optimizer known. Rows from elsewhere must come before ``packshot.config.schema`` is first imported."""
    OPTIMIZERS[row.name] = row


register(OptimizerRow("adamw", adamw, ADAM_KEYS, state_bytes=8, elementwise=True))
register(OptimizerRow("adam8bit", adam8bit, ADAM_KEYS, state_bytes=2))
# Its state is one row and one column of each matrix: next to nothing. It keeps no average of the gradient, and the
# decay of its second moment is not an option.
register(OptimizerRow("adafactor", adafactor, ("weight_decay",), state_bytes=0))
register(
    OptimizerRow(
        "prodigy",
        prodigy,
        ADAM_KEYS,
        state_bytes=16,
        usual_rates=(1.0, 1.0),
        finds_step_size=True,
        stepwise=False,
        conflicts=_OWN_STEP_SIZE,
    )
)
register(
    OptimizerRow(
        "schedule_free",
        schedule_free,
        ADAM_KEYS,
        state_bytes=8,
        usual_rates=(1e-6, 1e-2),
        stepwise=False,
        conflicts=_OWN_AVERAGE,
    )
)
# It takes the sign of the momentum and does not divide by a root, so it has no eps.
register(
    OptimizerRow(
        "lion",
        lion,
        ("beta1", "beta2", "weight_decay"),
        state_bytes=4,
        usual_rates=(1e-7, 3e-4),
        elementwise=True,
    )
)

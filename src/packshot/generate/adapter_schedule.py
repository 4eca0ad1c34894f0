"""From which denoising step to which an adapter counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from packshot.diffusion.hold_product import Callback
from packshot.diffusion.protocols import Pipeline

Span = tuple[float, float]  # shares of the steps, in [0, 1]
ALWAYS: Span = (0.0, 1.0)


@dataclass(frozen=True)
class Switch:
    """An adapter that works in a part of the steps only.

    set_weight: sets its weight to this share of the configured one.
    """

    span: Span
    set_weight: Callable[[float], None]


def counts(span: Span, step: int, steps: int) -> bool:
    """Whether an adapter works at a step: where the whole step lies inside the span, as diffusers has it for
    ControlNets."""
    return step / steps >= span[0] and (step + 1) / steps <= span[1]


def set_weights(switches: Sequence[Switch], step: int, steps: int) -> None:
    """Switch every adapter for a step."""
    for switch in switches:
        switch.set_weight(float(counts(switch.span, step, steps)))


@contextmanager
def switching(switches: Sequence[Switch], steps: int, callback: Callback) -> Iterator[Callback]:
    """``callback`` with the adapters switched before every step; all of them are on outside: text is encoded there."""

    def switched(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step + 1 < steps:
            set_weights(switches, step + 1, steps)
        return callback(pipe, step, timestep, tensors)

    try:
        set_weights(switches, 0, steps)
        yield switched
    finally:
        for switch in switches:
            switch.set_weight(1.0)

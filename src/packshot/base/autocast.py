"""What autocast does to the memory of a step, on tensors without values: PyTorch's own has no rules for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packshot.lists import map_values

Function: TypeAlias = Callable[..., Tensor]
# What runs in the lower precision, on any device; and what CUDA runs in fp32 (a CPU keeps the precision of its input).
LOWER = ("linear", "conv2d", "scaled_dot_product_attention")
UPPER_ON_CUDA = ("group_norm", "layer_norm")


class Casts:
    """Casts of tensors. Those of trained weights are kept until :meth:`forget`, as autocast keeps them to its end."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def cast(self, value: object, dtype: torch.dtype) -> object:
        """A floating-point tensor in this dtype; anything else as it is."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype is dtype:
            return value
        if not (isinstance(value, nn.Parameter) and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = value.to(dtype)
        return self.kept[id(value)]

    def forget(self) -> None:
        """Drop the kept casts: the forward pass has ended."""
        self.kept.clear()

    def wrapped(self, function: Function, dtype: torch.dtype) -> Function:
        """The function with its arguments cast."""

        def run(*arguments: object, **options: object) -> Tensor:
            cast = partial(self.cast, dtype=dtype)
            return function(*map(cast, arguments), **map_values(cast, options))

        return run


@contextmanager
def autocast_rules(dtype: torch.dtype, on_cuda: bool) -> Iterator[Casts]:
    """Functions cast as under autocast in ``dtype``.

    They are replaced and not intercepted by a mode: modes are suspended in a backward pass, and what checkpointing
    recomputes is part of that.
    """
    casts = Casts()
    if dtype is torch.float32:
        yield casts
        return
    rules = dict.fromkeys(LOWER, dtype)
    if on_cuda:
        rules |= dict.fromkeys(UPPER_ON_CUDA, torch.float32)
    ordinary: dict[str, Function] = {}
    for name, wanted in rules.items():
        ordinary[name] = getattr(F, name)
        setattr(F, name, casts.wrapped(ordinary[name], wanted))
    try:
        yield casts
    finally:
        for name, function in ordinary.items():
            setattr(F, name, function)

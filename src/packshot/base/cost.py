"""What a pass of a network costs, from shapes alone: FLOPs, and bytes that are alive at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from packshot.base.autocast import autocast_rules
from packshot.config.gpus import GPUS, Gpu, find_gpu
from packshot.config.optimizers import OPTIMIZERS
from packshot.config.plan import PlanConfig
from packshot.config.train import OptimConfig, TrainConfig

GIB = 2**30


class Cost(TorchDispatchMode):
    """FLOPs of operations, and bytes of what they have made and nobody has dropped yet, with their peak.

    PyTorch's FlopCounterMode keeps what checkpointing recomputes alive (its hooks on modules hold the graph).
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0
        self.peak = 0
        self._counted = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # a model asks whether its inputs are as they should be
        made = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=made)
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._counted:
            self._counted[storage] = size = storage.nbytes()
            self._change(size)
            weakref.finalize(storage, self._change, -size)

    def _change(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Count attention as a fused kernel does it: for tensors without values PyTorch would keep every score."""
    ordinary = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    # replaced, not intercepted by a mode: modes are suspended in a backward pass, and recomputation is part of that
    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ordinary


def training_cost(
    module: nn.Module,
    known: Iterable[Tensor],
    loss: Callable[[], Tensor],
    dtype: torch.dtype,
    on_cuda: bool,
    fused: bool = True,
) -> Cost:
    """The cost of forward and backward of one micro-batch under autocast, besides ``known`` tensors and gradients.

    fused: attention counts as a fused kernel. on_cuda: whether autocast follows CUDA's rules or those of a CPU.
    """
    hooks = []
    for parameter in module.parameters():
        if parameter.requires_grad:  # gradients are counted by themselves
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)))
    kernel = fused_attention() if fused else nullcontext()
    with kernel, autocast_rules(dtype, on_cuda) as casts, Cost(known) as cost:
        value = loss()
        casts.forget()
        value.backward()
        casts.forget()
    for hook in hooks:
        hook.remove()
    return cost


def state_gib(frozen: float, sizes: Sequence[int], train: TrainConfig, optim: OptimConfig) -> dict[str, float]:
    """GiB of the weights, and of what a training keeps of each, by the plans' names.

    frozen: bytes of the weights that are not trained. sizes: of the tensors that are trained.
    """
    trained = sum(sizes)
    return {
        "frozen_weights_gib": frozen / GIB,
        "trained_weights_gib": trained * 4 / GIB,
        "gradients_gib": (max(sizes) if train.fused_backward else trained) * 4 / GIB,
        "optimizer_gib": trained * OPTIMIZERS[optim.kind.name].state_bytes / GIB,
        "ema_gib": trained * 4 / GIB if train.ema_decay else 0.0,
    }


def gathered_gib(module: nn.Module, blocks: Sequence[nn.Module], width: int, reshard: bool = True) -> float:
    """GiB of the weights that sharded training holds whole: the block that computes, the next one, and what is in none.

    width: bytes of a frozen weight; trained ones have four. reshard: blocks are freed after their forward pass.
    """
    counted: dict[int, float] = {}
    taken = []
    for block in reversed(blocks):  # inner blocks first: a weight belongs to the innermost
        taken.append(weight_bytes(block, width, counted))
    own = weight_bytes(module, width, counted)
    held = sum(sorted(taken)[-2:]) if reshard else sum(taken)
    return (own + held) / GIB


def weight_bytes(module: nn.Module, width: int, counted: dict[int, float]) -> float:
    """Bytes of the weights that are not counted yet; they are from now on."""
    total = 0.0
    for parameter in module.parameters():
        if id(parameter) not in counted:
            counted[id(parameter)] = parameter.numel() * (4 if parameter.requires_grad else width)
            total += counted[id(parameter)]
    return total


def planned_gpu(plan: PlanConfig) -> Gpu | None:
    """The GPU that is planned for: ``plan.gpu``, else that of this machine; None for a CPU."""
    if plan.gpu is not None:
        return GPUS[plan.gpu.name]
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    free = torch.cuda.get_device_properties(0).total_memory / GIB
    return replace(find_gpu(name) or Gpu(name, name, free, 0.0, ""), memory_gib=free)

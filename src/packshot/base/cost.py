"""What a pass of a network costs, from shapes alone: FLOPs, and bytes that are alive at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from packshot.config.gpus import GPUS, Gpu, find_gpu
from packshot.config.plan import PlanConfig

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


def planned_gpu(plan: PlanConfig) -> Gpu | None:
    """The GPU that is planned for: ``plan.gpu``, else that of this machine; None for a CPU."""
    if plan.gpu is not None:
        return GPUS[plan.gpu.name]
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    free = torch.cuda.get_device_properties(0).total_memory / GIB
    return replace(find_gpu(name) or Gpu(name, name, free, 0.0, ""), memory_gib=free)

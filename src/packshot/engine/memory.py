"""Switches that trade memory against time: recomputed activations, compiled networks, attention kernels."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel

from packshot.config.schema import AttentionKernel, MixedPrecision, TrainConfig
from packshot.engine.checkpoints import trainable
from packshot.errors import ConfigError

KERNELS: dict[AttentionKernel, SDPBackend] = {
    AttentionKernel.flash: SDPBackend.FLASH_ATTENTION,
    AttentionKernel.efficient: SDPBackend.EFFICIENT_ATTENTION,
    AttentionKernel.cudnn: SDPBackend.CUDNN_ATTENTION,
    AttentionKernel.math: SDPBackend.MATH,
}
# PyTorch runs uncompiled after eight graphs. Each bucket has one, and other things that change a shape have some.
GRAPHS = 64


def return_freed_memory() -> None:
    """Return memory that no tensor uses any longer to the system, and cached blocks to the GPU.

    glibc keeps freed blocks below 32 MiB, and most weights are smaller: 3 GiB of SDXL's text encoders would stay with
    the process. Other C libraries have no ``malloc_trim`` and need none.
    """
    gc.collect()
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def networks(method: torch.nn.Module) -> Iterator[Any]:
    """The networks that gradients pass through: UNet and ControlNets, frozen or not, and text encoders if trained."""
    candidates = list(method.children())
    for child in method.children():
        candidates += child if isinstance(child, torch.nn.ModuleList) else []
    for module in candidates:
        trained_text = hasattr(module, "get_input_embeddings") and trainable(module)
        if hasattr(module, "enable_gradient_checkpointing") or trained_text:
            yield module


def enable_checkpointing(method: torch.nn.Module) -> None:
    """Recompute activations in the backward pass of every network that can (non-reentrant, as accelerate needs)."""
    for network in networks(method):
        if hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        else:  # the text encoders; transformers has renamed the method
            enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        # Only modules in training mode are checkpointed. SDXL's networks have no dropout that this would switch on.
        network.train()


def compile_networks(method: torch.nn.Module, device: torch.device) -> None:
    """``torch.compile`` the networks of a method in place, so that names of parameters and exports stay as they are.

    Each shape of a batch is compiled separately, at the first step that has it.

    Raises:
        ConfigError: this machine cannot compile for ``device``.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler, its headers, Triton or a temporary folder: each fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise ConfigError(
            f"train.compile=true does not work on this machine for {device.type} ({reason[:160]}).",
            "Install g++ (CPU) or Triton, gcc and Python's headers (CUDA), or set train.compile=false.",
        ) from error
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for network in networks(method):
        network.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[object]:
    """A context in which compiled networks run uncompiled: validation has other shapes, and few batches of each."""
    return torch.compiler.set_stance("force_eager")


def attention_kernel(kernel: AttentionKernel) -> Callable[[], AbstractContextManager[object]]:
    """A maker of contexts in which every scaled dot-product attention, also a recomputed one, runs on this kernel.

    diffusers' ``set_attention_backend`` is not used, because the processors of SDXL's UNet ignore it.
    """
    return nullcontext if kernel is AttentionKernel.auto else partial(sdpa_kernel, KERNELS[kernel])


def refuse_unavailable(train: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what this machine, or this number of processes, cannot do.

    Raises:
        ConfigError: the device lacks the attention kernel in the run's precision, or the precision itself; or
            fused_backward with several processes.
    """
    if train.fused_backward and accelerator.num_processes > 1:
        raise ConfigError(
            f"train.fused_backward=true on {accelerator.num_processes} processes: a gradient is freed before the other "
            "processes can add theirs.",
            "Run one process, or set train.fused_backward=false.",
        )
    if train.mixed_precision is MixedPrecision.fp16 and accelerator.device.type == "cpu":
        raise ConfigError("train.mixed_precision=fp16 needs a GPU.", "Set train.mixed_precision=bf16, or no.")
    device = accelerator.device
    size = 64  # the width of an attention head in SDXL
    with accelerator.autocast():  # gives the probe the precision that a projection's output has
        probe = (torch.ones(8, size, device=device) @ torch.eye(size, device=device))[None, None]
    try:
        with attention_kernel(train.attention)():
            F.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError as error:
        raise ConfigError(
            f"train.attention={train.attention} has no kernel for {probe.dtype} on {device.type}.",
            "Set train.attention=auto, the fastest kernel that fits. (flash and cudnn need half precision on a GPU.)",
        ) from error

"""Memory against time: what a network keeps for its backward pass, and which kernels run it."""

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
from packshot.errors import ConfigError

KERNELS: dict[AttentionKernel, SDPBackend] = {
    AttentionKernel.flash: SDPBackend.FLASH_ATTENTION,
    AttentionKernel.efficient: SDPBackend.EFFICIENT_ATTENTION,
    AttentionKernel.cudnn: SDPBackend.CUDNN_ATTENTION,
    AttentionKernel.math: SDPBackend.MATH,
}
# A graph for each bucket, and some for what else a shape depends on; PyTorch gives up after eight and runs uncompiled.
GRAPHS = 64


def return_freed_memory() -> None:
    """Hand what no tensor uses any longer back to the system, and cached blocks back to the GPU.

    glibc keeps freed blocks below 32 MiB, which most weights are: SDXL's text encoders would stay as 3 GiB of the
    process. Other C libraries do not ask.
    """
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _networks(method: torch.nn.Module) -> Iterator[Any]:
    """The UNet and ControlNets of a method, frozen or not: gradients pass through them; text encoders if trained."""
    children = list(method.children())
    for module in [*children, *(m for listed in children if isinstance(listed, torch.nn.ModuleList) for m in listed)]:
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if hasattr(module, "enable_gradient_checkpointing") or (trained and hasattr(module, "get_input_embeddings")):
            yield module


def enable_checkpointing(method: torch.nn.Module) -> None:
    """Recompute activations in the backward pass of every network that can (non-reentrant, as accelerate needs)."""
    for network in _networks(method):
        if hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        else:  # transformers has renamed it
            name = "activation_checkpointing_enable"
            enable = getattr(network, name, None) or network.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        # only modules in training mode are checkpointed; SDXL's networks have no dropout to wake up by that
        network.train()


def compile_networks(method: torch.nn.Module, device: torch.device) -> None:
    """``torch.compile`` the networks of a method where they stand: names of parameters and exports stay as they are.

    Every batch shape is compiled for itself, at the first step that has it.

    Raises:
        ConfigError: this machine cannot compile for ``device``.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # a compiler, its headers, Triton or a temporary folder: each fails in its own way
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise ConfigError(
            f"train.compile=true does not work on this machine for {device.type} ({reason.strip()[:160]}).",
            "Install g++ (CPU) or Triton, gcc and Python's headers (CUDA), or set train.compile=false.",
        ) from error
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for network in _networks(method):
        network.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, compiled networks run as they were written: validation has other shapes, and few of each."""
    return torch.compiler.set_stance("force_eager")


def attention_kernel(kernel: AttentionKernel) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts inside which every scaled dot-product attention, recomputed ones too, runs on this kernel.

    diffusers' ``set_attention_backend`` would not do: the processors of SDXL's UNet ignore it.
    """
    return nullcontext if kernel is AttentionKernel.auto else partial(sdpa_kernel, KERNELS[kernel])


def refuse_unavailable(train: TrainConfig, accelerator: Accelerator) -> None:
    """What only the machine and the number of processes can tell about a config.

    Raises:
        ConfigError: the device has no such attention kernel in the run's precision, or no such precision;
            fused_backward on many processes.
    """
    if train.fused_backward and accelerator.num_processes > 1:
        raise ConfigError(
            f"train.fused_backward=true on {accelerator.num_processes} processes: a gradient is gone before the others "
            "could add theirs.",
            "Run one process, or set train.fused_backward=false.",
        )
    if train.mixed_precision is MixedPrecision.fp16 and accelerator.device.type == "cpu":
        raise ConfigError("train.mixed_precision=fp16 needs a GPU.", "Set train.mixed_precision=bf16, or no.")
    device, size = accelerator.device, 64  # the width of an attention head in SDXL
    with accelerator.autocast():  # in the precision in which a projection's output comes to the attention
        probe = (torch.ones(8, size, device=device) @ torch.eye(size, device=device))[None, None]
    try:
        with attention_kernel(train.attention)():
            F.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError as error:
        raise ConfigError(
            f"train.attention={train.attention} has no kernel for {probe.dtype} on {device.type}.",
            "Set train.attention=auto: the fastest kernel that fits. (flash and cudnn take half precision on a GPU.)",
        ) from error

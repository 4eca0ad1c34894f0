"""Frozen linear layers in four or eight bits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packshot.base.device import own_device
from packshot.config.schema import Quantization
from packshot.errors import ConfigError, first_line

# Bytes of a quantised weight: codes of half a byte, a byte for each 64 of them, four for each 256 of those (nf4, its
# scales quantised again); a byte per weight and four per row (int8).
QUANTIZED_BYTES: dict[Quantization, Callable[[Tensor], float]] = {
    Quantization.nf4: lambda weight: weight.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256)),
    Quantization.int8: lambda weight: weight.numel() + 4 * weight.shape[0],
}


def nf4(linear: torch.nn.Linear, device: str) -> torch.nn.Module:
    """Four-bit normal floats in blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    make: Any = Params4bit  # type checkers take its signature for a tensor's
    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    weight = make(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(device)
    # On CPUs with AVX-512 BF16 it would repack its weights at the first evaluation, for a kernel without a gradient,
    # and fail where the length of a row is not a multiple of the block.
    layer.support_avx512bf16_for_cpu = False
    return layer


def int8(linear: torch.nn.Linear, device: str) -> torch.nn.Module:
    """A byte per weight; activations beyond 6 stay whole (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339)."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    make: Any = Int8Params  # type checkers take its signature for a tensor's
    with torch.device("meta"):
        layer = Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    weight = make(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to(device)
    return layer


QUANTIZERS: dict[Quantization, Callable[[torch.nn.Linear, str], torch.nn.Module]] = {
    Quantization.nf4: nf4,
    Quantization.int8: int8,
}


def quantized(linear: torch.nn.Module, quantization: Quantization, device: str) -> torch.nn.Module:
    """One layer, quantised on a device; tensors without values stay without."""
    assert isinstance(linear, torch.nn.Linear)
    layer = QUANTIZERS[quantization](linear, "meta" if linear.weight.is_meta else device)
    layer.bias = linear.bias
    return layer


def quantize(network: torch.nn.Module, quantization: Quantization, key: str, chosen: Callable[[str], bool]) -> None:
    """Replace those linear layers of a frozen network whose names are ``chosen``.

    One layer at a time goes to the GPU of this process, is quantised there, and stays; the whole one is freed. A CPU
    would need an hour for the largest captioner. Without a GPU the layers stay where they are.

    diffusers' ``BitsAndBytesConfig`` would do it while loading, but refuses machines without a GPU.

    Raises:
        ConfigError: bitsandbytes cannot do it on this machine.
    """
    # It logs at every layer and step that inputs are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    names = []  # not the layers themselves, which would then stay in memory
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and chosen(name):
            names.append(name)
    device = own_device()
    try:
        for name in names:
            network.set_submodule(name, quantized(network.get_submodule(name), quantization, device))
    except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{key}={quantization} does not work on this machine ({reason}).", f"Set {key}=none."
        ) from error


def move_quantized(network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make what bitsandbytes' layers keep outside their parameters follow a move to ``device`` and ``dtype``."""
    for layer in network.modules():
        if hasattr(layer, "compute_dtype"):
            # A four-bit layer would otherwise keep the dtype of its first input for good.
            setattr(layer, "compute_dtype", dtype)  # noqa: B010 (no such attribute on nn.Module)
            setattr(layer, "compute_type_is_set", True)  # noqa: B010
        elif hasattr(layer, "state") and hasattr(layer.weight, "SCB"):
            # An eight-bit layer keeps its codes (CB) and the scales of its rows (SCB) twice.
            for holder in (layer.weight, layer.state):
                move_codes(holder, device)


def move_codes(holder: object, device: torch.device) -> None:
    """Move the codes and scales of an eight-bit layer's weight or state."""
    for name in ("CB", "SCB"):
        tensor = getattr(holder, name)
        setattr(holder, name, None if tensor is None else tensor.to(device))

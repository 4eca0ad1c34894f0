"""The cost of one step, from the shapes alone: TFLOP, and bytes that are alive at its peak; no weights, no data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from packshot.base.cost import GIB, Cost, fused_attention, training_cost
from packshot.base.inpainting import prepare_unet
from packshot.base.load import Parts
from packshot.base.quantize import QUANTIZED_BYTES
from packshot.config.schema import AttentionKernel, Quantization, TrainScript
from packshot.engine.memory import enable_checkpointing
from packshot.engine.processes import DTYPES, planned_precision
from packshot.lists import map_values
from packshot.methods import Method, build_method
from packshot.methods.base import Tensors
from packshot.train.encode import encode_batch


def meta_batch(
    parts: Parts, method: Method, resolution: int, size: int, prompt_chunks: int = 1
) -> tuple[Tensor, Tensor, Tensors]:
    """noisy_BCHW, timesteps_B and the conditioning of a micro-batch, on the meta device."""
    unet = parts.unet.config
    side = latent_side(parts, resolution)
    shapes = {
        "prompt_embeds": (77 * prompt_chunks, unet.cross_attention_dim),
        "pooled_prompt_embeds": (parts.text_encoder_2.config.projection_dim,),
        "time_ids": (6,),
        **method.condition_shapes(resolution),
    }
    batch = map_values(lambda shape: torch.empty(size, *shape, device="meta"), shapes)
    for name in ("input_ids", "input_ids_2"):
        batch[name] = torch.empty(size, 77, dtype=torch.long, device="meta")
    noisy = torch.empty(size, unet.in_channels, side, side, device="meta")
    return noisy, torch.empty(size, dtype=torch.long, device="meta"), batch


def latent_side(parts: Parts, resolution: int) -> int:
    """Latent cells along a side of ``resolution`` px."""
    return resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)


def lower(method: Method, dtype: torch.dtype) -> None:
    """Frozen weights in the dtype of the forward pass; trained ones stay in fp32."""
    for parameter in method.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def measure_step(parts: Parts, method: Method, config: TrainScript, batch_size: int, on_cuda: bool) -> Cost:
    """The cost of forward and backward of one micro-batch, besides weights and gradients.

    on_cuda: whether autocast follows CUDA's rules or those of a CPU.
    """
    train = config.train
    dtype = DTYPES[planned_precision(config.train, on_cuda)]
    lower(method, dtype)
    noisy, timesteps, batch = meta_batch(
        parts, method, config.model.resolution, batch_size, config.objective.prompt_chunks
    )
    known = [*method.parameters(), *method.buffers(), noisy, timesteps, *batch.values()]

    def loss() -> Tensor:
        if method.trains_text:
            prompt_embeds, pooled = method.encode_prompt([batch["input_ids"], batch["input_ids_2"]])
            batch.update({"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled})
        return method.predict(noisy, timesteps, batch).float().square().mean()

    return training_cost(method, known, loss, dtype, on_cuda, train.attention is not AttentionKernel.math)


def measure_encoding(parts: Parts, resolution: int) -> tuple[float, float]:
    """(GiB at the peak of one pass of the fp32 VAE's encoder besides weights, TFLOP of one picture)."""
    size = encode_batch((resolution, resolution))
    pixels = torch.empty(size, parts.vae.config.in_channels, resolution, resolution, device="meta")
    with torch.no_grad(), fused_attention(), Cost([*parts.vae.parameters(), *parts.vae.buffers(), pixels]) as cost:
        parts.vae.encode(pixels)
    return cost.peak / GIB, cost.flops / size / 1e12


def count_parameters(module: nn.Module, trained: bool | None = None) -> int:
    """Parameters of a module; only those that are trained, or only those that are not."""
    return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))


def frozen_bytes(parts: Parts, method: Method, config: TrainScript, width: int) -> float:
    """Bytes of the weights that are not trained: as ``base.load.quantize`` stores them, else ``width`` bytes each.

    Text encoders that are not trained are freed before training starts.
    """
    quantization = config.model.quantization
    quantized = set()
    if quantization is not Quantization.none:
        for name, module in parts.unet.named_modules():
            if "attentions." in name and hasattr(module, "weight") and module.weight.dim() == 2:
                quantized.add(id(module.weight))
    total = 0.0
    for parameter in method.parameters():
        if id(parameter) in quantized and not parameter.requires_grad:
            total += QUANTIZED_BYTES[quantization](parameter)
        elif not parameter.requires_grad:
            total += parameter.numel() * width
    return total


def meta_method(config: TrainScript) -> tuple[Parts, Method]:
    """The base and the method of a config as they are trained, without values."""
    from packshot.base.shapes import meta_parts  # imports every kind of model

    parts = meta_parts(config.model)
    with torch.device("meta"):
        method = build_method(parts, config)
        prepare_unet(parts.unet, config.objective.product_conditioning)
    if config.train.gradient_checkpointing:
        enable_checkpointing(method)
    return parts, method

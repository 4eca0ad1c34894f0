"""``mode=plan``: what a run will cost, from the shapes alone; no weights, no data but their number."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from packshot.base.inpainting import prepare_unet
from packshot.base.load import Parts
from packshot.config.optimizers import OPTIMIZERS
from packshot.config.schema import AttentionKernel, MixedPrecision, Quantization, TrainScript
from packshot.dataset.rows import load_rows
from packshot.engine.memory import enable_checkpointing
from packshot.engine.processes import resolve_precision
from packshot.methods import Method, build_method
from packshot.methods.base import Tensors
from packshot.runs.files import replacing_file
from packshot.runs.folder import log, open_run
from packshot.train.encode import encode_batch

PRECISION_BYTES = {MixedPrecision.no: 4, MixedPrecision.fp16: 2, MixedPrecision.bf16: 2}
# Bytes of a quantised weight: codes of half a byte, a byte for each 64 of them, four for each 256 of those (nf4, its
# scales quantised again); a byte per weight and four per row (int8).
QUANTIZED_BYTES: dict[Quantization, Callable[[Tensor], float]] = {
    Quantization.nf4: lambda weight: weight.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256)),
    Quantization.int8: lambda weight: weight.numel() + 4 * weight.shape[0],
}
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Cost of one process.

    activations_gib: everything alive at the peak of one micro-step besides weights and gradients, in the precision of
        the forward pass. Attention counts as a fused kernel unless ``train.attention=math``; workspaces of kernels and
        fragmentation come on top.
    vae_gib: the VAE, in fp32, where it stays: if pictures are validated or nothing is cached.
    total_gib, encoding_gib: while training; and before it, while the VAE encodes pictures. A device needs the larger.
    """

    trained_parameters: int
    frozen_parameters: int
    frozen_weights_gib: float
    trained_weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    ema_gib: float
    vae_gib: float
    activations_gib: float
    total_gib: float
    encoding_gib: float
    tflop_per_step: float
    samples_per_step: int
    epochs: float
    cache_gib: float


def meta_batch(parts: Parts, method: Method, resolution: int, size: int) -> tuple[Tensor, Tensor, Tensors]:
    """noisy_BCHW, timesteps_B and the conditioning of a micro-batch, on the meta device."""
    unet = parts.unet.config
    side = latent_side(parts, resolution)
    shapes = {
        "prompt_embeds": (77, unet.cross_attention_dim),
        "pooled_prompt_embeds": (parts.text_encoder_2.config.projection_dim,),
        "time_ids": (6,),
        **method.condition_shapes(resolution),
    }
    batch = {name: torch.empty(size, *shape, device="meta") for name, shape in shapes.items()}
    for name in ("input_ids", "input_ids_2"):
        batch[name] = torch.empty(size, 77, dtype=torch.long, device="meta")
    noisy = torch.empty(size, unet.in_channels, side, side, device="meta")
    return noisy, torch.empty(size, dtype=torch.long, device="meta"), batch


def latent_side(parts: Parts, resolution: int) -> int:
    """Latent cells along a side of ``resolution`` px."""
    return resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)


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


def measure_step(parts: Parts, method: Method, config: TrainScript) -> tuple[float, float]:
    """(TFLOP, GiB in fp32 at the peak besides weights and gradients) of forward and backward of one micro-batch."""
    train = config.train
    noisy, timesteps, batch = meta_batch(parts, method, config.model.resolution, train.batch_size)
    kernel = nullcontext() if train.attention is AttentionKernel.math else fused_attention()
    for parameter in method.parameters():
        if parameter.requires_grad:  # gradients are counted by themselves
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    known = [*method.parameters(), *method.buffers(), noisy, timesteps, *batch.values()]
    with kernel, Cost(known) as cost:
        if method.trains_text:
            prompt_embeds, pooled = method.encode_prompt([batch["input_ids"], batch["input_ids_2"]])
            batch |= {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        loss = method.predict(noisy, timesteps, batch).float().square().mean()
        loss.backward()
    return cost.flops / 1e12, cost.peak / GIB


def measure_encoding(parts: Parts, resolution: int) -> float:
    """GiB at the peak of one pass of the fp32 VAE's encoder, besides weights."""
    size = encode_batch((resolution, resolution))
    pixels = torch.empty(size, parts.vae.config.in_channels, resolution, resolution, device="meta")
    with torch.no_grad(), fused_attention(), Cost([*parts.vae.parameters(), *parts.vae.buffers(), pixels]) as cost:
        parts.vae.encode(pixels)
    return cost.peak / GIB


def count_parameters(module: nn.Module, trained: bool | None = None) -> int:
    """Parameters of a module; only those that are trained, or only those that are not."""
    return sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))


def frozen_bytes(parts: Parts, method: Method, config: TrainScript) -> float:
    """Bytes of the weights that are not trained: quantised where ``base.load.quantize`` takes them, else full width.

    Text encoders that are not trained are freed before training starts.
    """
    width = PRECISION_BYTES[resolve_precision(config.train.mixed_precision)]
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


def make_plan(config: TrainScript, samples: int, processes: int = 1) -> Plan:
    """The cost of a training config on ``samples`` samples."""
    parts, method = meta_method(config)
    train = config.train
    sizes = [p.numel() for p in method.parameters() if p.requires_grad]
    trained = sum(sizes)
    tflop, activations = measure_step(parts, method, config)
    vae = count_parameters(parts.vae) * 4 / GIB
    keeps_vae = bool(train.validation_steps) or not config.data.cache
    gib = {
        "frozen_weights_gib": frozen_bytes(parts, method, config) / GIB,
        "trained_weights_gib": trained * 4 / GIB,
        "gradients_gib": (max(sizes) if train.fused_backward else trained) * 4 / GIB,
        "optimizer_gib": trained * OPTIMIZERS[config.optim.kind.name].state_bytes / GIB,
        "ema_gib": trained * 4 / GIB if train.ema_decay else 0.0,
        "vae_gib": vae if keeps_vae else 0.0,
        "activations_gib": activations * PRECISION_BYTES[resolve_precision(train.mixed_precision)] / 4,
    }
    weights = gib["frozen_weights_gib"] + gib["trained_weights_gib"]
    per_step = train.batch_size * train.gradient_accumulation_steps * processes
    # latents (mean and deviation of 4 channels, the product's share) and embeddings, all in fp32
    cached = 9 * latent_side(parts, config.model.resolution) ** 2 + 77 * parts.unet.config.cross_attention_dim
    return Plan(
        trained_parameters=trained,
        frozen_parameters=count_parameters(method, trained=False),
        **gib,
        total_gib=sum(gib.values()),
        encoding_gib=weights + vae + measure_encoding(parts, config.model.resolution),
        tflop_per_step=tflop * train.gradient_accumulation_steps,
        samples_per_step=per_step,
        epochs=train.max_steps * per_step / samples,
        cache_gib=samples * cached * 4 / GIB if config.data.cache else 0.0,
    )


def plan(config: TrainScript, script: str) -> None:
    """Write ``plan.json`` and log it as a table; the first of several processes does so for all of them."""
    if int(os.environ.get("RANK", 0)):
        return
    rows = load_rows(
        "data.train", config.data.train, pictures=("image",), cache=config.data.cache_dir, licenses=config.licenses
    )
    run = open_run(script, config)
    result = make_plan(config, len(rows), processes=int(os.environ.get("WORLD_SIZE", 1)))
    with replacing_file(run.path / "plan.json") as file:
        file.write_text(json.dumps(asdict(result), indent=2) + "\n")
    for name, value in asdict(result).items():
        log.info("%-22s %s", name, f"{value:,}" if isinstance(value, int) else f"{value:,.3f}")
    log.info("Activations are counted from the graph; workspaces of the device come on top.")

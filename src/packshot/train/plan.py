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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from packshot.base.inpainting import prepare_unet
from packshot.base.load import Parts
from packshot.config.optimizers import OPTIMIZERS
from packshot.config.schema import (
    AttentionKernel,
    MixedPrecision,
    Quantization,
    TrainConfig,
    TrainScript,
)
from packshot.dataset.rows import load_rows
from packshot.engine.memory import enable_checkpointing
from packshot.engine.processes import resolve_precision
from packshot.methods import METHODS
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
    """Cost of one process. Activations are what is alive at the peak of one micro-step besides weights and gradients,
    in the precision of the forward pass: what the backward pass needs, what it recomputes, and what is on the way.
    Fused attention kernels are counted unless ``train.attention=math``; their workspaces and
    fragmentation come on top. The VAE, in fp32, stays where pictures are validated or nothing is cached.

    total_gib: while training. encoding_gib: before it, while pictures go through the VAE beside the weights; a device
    needs the larger of the two.
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


def _batch(parts: Parts, method: Any, resolution: int, size: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """noisy_BCHW, timesteps_B and the conditioning of a micro-batch, on the meta device."""
    unet, vae = parts.unet.config, parts.vae.config
    side = resolution // 2 ** (len(vae.block_out_channels) - 1)
    vision = parts.image_encoder.config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    plus = getattr(getattr(method.config, "variant", None), "name", "") == "plus"
    reference = (tokens, vision.hidden_size) if plus else (vision.projection_dim,)
    batch = {
        "prompt_embeds": (77, unet.cross_attention_dim),
        "pooled_prompt_embeds": (parts.text_encoder_2.config.projection_dim,),
        "time_ids": (6,),
        **{f"control_{k}": (3, resolution, resolution) for k in range(len(getattr(method, "controls", ())))},
        "reference": reference,
    }
    meta = {name: torch.empty(size, *shape, device="meta") for name, shape in batch.items()}
    meta |= {name: torch.empty(size, 77, dtype=torch.long, device="meta") for name in ("input_ids", "input_ids_2")}
    noisy = torch.empty(size, unet.in_channels, side, side, device="meta")
    return noisy, torch.empty(size, dtype=torch.long, device="meta"), meta


class _Cost(TorchDispatchMode):
    """FLOPs of operations, and bytes of what they have made and nobody has dropped yet, with their peak.

    PyTorch's FlopCounterMode keeps what checkpointing recomputes alive (its hooks on modules hold the graph).
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.flops = self.bytes = self.peak = 0
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
def _fused_attention() -> Iterator[None]:
    """Attention as a fused kernel does it: of tensors without values PyTorch would keep every score."""
    ordinary: Any = F.scaled_dot_product_attention
    # replaced, not intercepted by a mode: modes are suspended in a backward pass, and recomputation is part of that
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v
    )[0]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ordinary


def _measure(parts: Parts, method: Any, train: TrainConfig, resolution: int) -> tuple[float, float]:
    """(TFLOP, GiB in fp32 at the peak besides weights and gradients) of forward and backward of one micro-batch."""
    noisy, timesteps, batch = _batch(parts, method, resolution, train.batch_size)
    kernel = nullcontext() if train.attention is AttentionKernel.math else _fused_attention()
    for parameter in method.parameters():
        if parameter.requires_grad:  # gradients are counted by themselves
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    known = [*method.parameters(), *method.buffers(), noisy, timesteps, *batch.values()]
    with kernel, _Cost(known) as cost:
        if method.trains_text:
            embeds = method.encode_prompt([batch["input_ids"], batch["input_ids_2"]])
            batch |= dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeds, strict=True))
        loss = method.predict(noisy, timesteps, batch).float().square().mean()
        loss.backward()
    return cost.flops / 1e12, cost.peak / GIB


def _encoding(parts: Parts, resolution: int) -> float:
    """GiB at the peak of one pass of the fp32 VAE's encoder, besides weights."""
    size = encode_batch((resolution, resolution))
    pixels = torch.empty(size, parts.vae.config.in_channels, resolution, resolution, device="meta")
    with torch.no_grad(), _fused_attention(), _Cost([*parts.vae.parameters(), *parts.vae.buffers(), pixels]) as cost:
        parts.vae.encode(pixels)
    return cost.peak / GIB


def _frozen_bytes(parts: Parts, method: Any, config: TrainScript) -> float:
    """Of the weights that are not trained: a byte or less where models.load.quantize takes them, else full width.

    Text encoders that are not trained are gone when training starts.
    """
    width = PRECISION_BYTES[resolve_precision(config.train.mixed_precision)]
    layers = {id(m.weight) for name, m in parts.unet.named_modules() if "attentions." in name and hasattr(m, "weight")}
    matrices = layers if config.model.quantization is not Quantization.none else ()
    return sum(
        QUANTIZED_BYTES[config.model.quantization](parameter)
        if id(parameter) in matrices and parameter.dim() == 2
        else parameter.numel() * width
        for parameter in method.parameters()
        if not parameter.requires_grad
    )


def _keeps_vae(config: TrainScript) -> bool:
    return bool(config.train.validation_steps) or not config.data.cache


def make_plan(config: TrainScript, samples: int, processes: int = 1) -> Plan:
    """The cost of a training config on ``samples`` samples."""
    from packshot.base.shapes import meta_parts  # imports every kind of model

    parts, train = meta_parts(config.model), config.train
    with torch.device("meta"):
        method: Any = METHODS[type(config.method)](parts, config.method)  # type: ignore[attr-defined]
        prepare_unet(parts.unet, config.objective.product_conditioning)
    if train.gradient_checkpointing:
        enable_checkpointing(method)
    sizes = [p.numel() for p in method.parameters() if p.requires_grad]
    trained = sum(sizes)
    frozen = sum(p.numel() for p in method.parameters() if not p.requires_grad)
    tflop, activations = _measure(parts, method, train, config.model.resolution)
    width = PRECISION_BYTES[resolve_precision(train.mixed_precision)]
    side = config.model.resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    vae = sum(p.numel() for p in parts.vae.parameters()) * 4 / GIB
    cells, embeds = 9 * side * side, 77 * parts.unet.config.cross_attention_dim
    gib = {
        "frozen_weights_gib": _frozen_bytes(parts, method, config) / GIB,
        "trained_weights_gib": trained * 4 / GIB,
        "gradients_gib": (max(sizes) if train.fused_backward else trained) * 4 / GIB,
        "optimizer_gib": trained * OPTIMIZERS[config.optim.kind.name].state_bytes / GIB,
        "ema_gib": trained * 4 / GIB if train.ema_decay else 0.0,
        "vae_gib": vae if _keeps_vae(config) else 0.0,
        "activations_gib": activations * width / 4,
    }
    weights = gib["frozen_weights_gib"] + gib["trained_weights_gib"]
    per_step = train.batch_size * train.gradient_accumulation_steps * processes
    return Plan(
        trained_parameters=trained,
        frozen_parameters=frozen,
        **gib,
        total_gib=sum(gib.values()),
        encoding_gib=weights + vae + _encoding(parts, config.model.resolution),
        tflop_per_step=tflop * train.gradient_accumulation_steps,
        samples_per_step=per_step,
        epochs=train.max_steps * per_step / samples,
        cache_gib=samples * (cells + embeds) * 4 / GIB if config.data.cache else 0.0,
    )


def plan(config: TrainScript, script: str) -> None:
    """Write ``plan.json`` and log it as a table; the first of several processes does, for all of them."""
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

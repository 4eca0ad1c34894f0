"""``mode=plan``: what a run will cost, from the shapes alone; no weights, no data but their number."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from packshot.config.schema import MixedPrecision, OptimizerKind, TrainScript
from packshot.core.run import log, open_run
from packshot.data.dataset import load_rows
from packshot.methods import METHODS
from packshot.models.load import Parts
from packshot.models.shapes import meta_parts
from packshot.train.memory import enable_checkpointing

# Optimizer state per trained parameter, bytes (what each library keeps, in fp32 unless its name says otherwise).
STATE_BYTES = {
    OptimizerKind.adamw: 8,
    OptimizerKind.adam8bit: 2,
    OptimizerKind.adafactor: 0,  # one row and one column of each matrix: nothing beside the rest
    OptimizerKind.prodigy: 16,
    OptimizerKind.schedule_free: 8,
    OptimizerKind.lion: 4,
}
PRECISION_BYTES = {MixedPrecision.no: 4, MixedPrecision.fp16: 2, MixedPrecision.bf16: 2}
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Cost of one process. Activations are those that one micro-step saves for its backward pass, in the precision of
    the forward pass; workspaces and fragmentation come on top."""

    trained_parameters: int
    frozen_parameters: int
    frozen_weights_gib: float
    trained_weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    ema_gib: float
    activations_gib: float
    total_gib: float
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
        "control": (3, resolution, resolution),
        "reference": reference,
    }
    meta = {name: torch.empty(size, *shape, device="meta") for name, shape in batch.items()}
    noisy = torch.empty(size, unet.in_channels, side, side, device="meta")
    return noisy, torch.empty(size, dtype=torch.long, device="meta"), meta


def _measure(parts: Parts, method: Any, resolution: int, size: int) -> tuple[float, float]:
    """(TFLOP, GiB of saved activations in fp32) of forward and backward of one micro-batch."""
    noisy, timesteps, batch = _batch(parts, method, resolution, size)
    known = {parameter.untyped_storage()._cdata for parameter in method.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = tensor.numel() * tensor.element_size()
            kept.append(storage)  # a freed storage's address would be taken for another's
        return tensor

    kept: list[Any] = []
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = method.predict(noisy, timesteps, batch).float().square().mean()
        loss.backward()
    return counter.get_total_flops() / 1e12, sum(saved.values()) / GIB


def make_plan(config: TrainScript, samples: int, processes: int = 1) -> Plan:
    """The cost of a training config on ``samples`` samples."""
    parts, train = meta_parts(config.model), config.train
    with torch.device("meta"):
        method: Any = METHODS[type(config.method)](parts, config.method)  # type: ignore[attr-defined]
    if train.gradient_checkpointing:
        enable_checkpointing(method)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in method.parameters() if not p.requires_grad)
    tflop, activations = _measure(parts, method, config.model.resolution, train.batch_size)
    width = PRECISION_BYTES[train.mixed_precision]
    side = config.model.resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    cells, embeds = 9 * side * side, 77 * parts.unet.config.cross_attention_dim
    gib = {
        "frozen_weights_gib": frozen * width / GIB,
        "trained_weights_gib": trained * 4 / GIB,
        "gradients_gib": trained * 4 / GIB,
        "optimizer_gib": trained * STATE_BYTES[config.optim.kind] / GIB,
        "ema_gib": trained * 4 / GIB if train.ema_decay else 0.0,
        "activations_gib": activations * width / 4,
    }
    per_step = train.batch_size * train.gradient_accumulation_steps * processes
    return Plan(
        trained_parameters=trained,
        frozen_parameters=frozen,
        **gib,
        total_gib=sum(gib.values()),
        tflop_per_step=tflop * train.gradient_accumulation_steps,
        samples_per_step=per_step,
        epochs=train.max_steps * per_step / samples,
        cache_gib=samples * (cells + embeds) * 4 / GIB if config.data.cache else 0.0,
    )


def plan(config: TrainScript, script: str) -> None:
    """Write ``plan.json`` and log it as a table."""
    rows = load_rows("data.train", config.data.train)
    run = open_run(script, config)
    result = make_plan(config, len(rows))
    (run.path / "plan.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    for name, value in asdict(result).items():
        log.info("%-22s %s", name, f"{value:,}" if isinstance(value, int) else f"{value:,.3f}")
    log.info("Activations are counted from the graph; workspaces of the device come on top.")

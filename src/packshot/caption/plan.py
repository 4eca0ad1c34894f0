"""``caption_vlm.py mode=plan``: what training or running a captioner will cost, from the shapes alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pkgutil import resolve_name

import torch
from torch import Tensor

from packshot.base.cost import (
    GIB,
    Cost,
    fused_attention,
    gathered_gib,
    planned_gpu,
    state_gib,
    training_cost,
)
from packshot.base.quantize import QUANTIZED_BYTES
from packshot.caption.models import weights
from packshot.caption.models.adapter import loss_per_sample
from packshot.caption.models.shapes import MetaCaptioner, empty_ids
from packshot.config.captioners import CAPTION_TASKS, CAPTIONERS
from packshot.config.gpus import USABLE, Gpu, hours_text, span, verdict_of, verdict_text
from packshot.config.schema import AttentionKernel, CaptionerConfig, CaptionVLM, Quantization
from packshot.dataset.sets import load_training
from packshot.engine.checkpoints import trainable
from packshot.engine.processes import DTYPES, planned_precision, refuse_launcher
from packshot.engine.sharding import Sharding, blocks_of, read_sharding
from packshot.lists import map_values
from packshot.runs.folder import answer, open_run
from packshot.runs.plan_file import answer_figures, write_plan

WRITTEN = 48  # tokens of a caption in the grammar, roughly
# Seconds that PyTorch takes to launch a decoder layer, at best and at worst: an assumption, not measured on a GPU.
LAUNCH = (0.3e-3, 1e-3)


@dataclass(frozen=True)
class CaptionPlan:
    """Cost of one process; of a task that trains nothing, what belongs to training is 0.

    activations_gib: alive at the peak of one micro-batch, or of one batch that is written, besides weights and
        gradients. Of a batch that is written, keys and values of all tokens are part of it.
    tflop: of one optimizer step, or of one batch that is written.
    """

    trained_parameters: int
    frozen_parameters: int
    frozen_weights_gib: float
    trained_weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    ema_gib: float
    gathered_gib: float
    activations_gib: float
    total_gib: float
    tflop: float
    pictures_per_step: int
    steps: int


@dataclass(frozen=True)
class CaptionDecision:
    """What the plan means on a GPU; fields as in ``train.decide.Decision``."""

    gpu: str
    gpu_memory_gib: float
    verdict: str
    largest_batch: int
    seconds_per_step: tuple[float, float]
    hours: tuple[float, float]
    price: tuple[float, float] | None
    change: str

    def sentences(self) -> Iterator[str]:
        """The decision in words."""
        verdict = verdict_text(self.verdict, self.gpu, self.gpu_memory_gib)
        yield f"{verdict}; the largest batch is {self.largest_batch}."
        if self.hours[1]:
            yield f"It takes {hours_text(self.hours)}."
        if self.price:
            yield f"It costs {self.price[0]:.2f} to {self.price[1]:.2f}."
        if self.change:
            yield f"Change first: {self.change}."


def trains(config: CaptionVLM) -> bool:
    """Whether the task trains the captioner."""
    return CAPTION_TASKS[config.task.name].trains


def meta_captioner(config: CaptionVLM) -> MetaCaptioner:
    """The captioner of a config as the task uses it, without values."""
    kind = config.captioner.kind.name
    family = CAPTIONERS[kind]
    base = str(getattr(config.model, kind))
    meta: MetaCaptioner = resolve_name(family.shapes)(base)
    meta.network.requires_grad_(False)
    dtype = getattr(torch, config.captioner.dtype.name)
    for parameter in meta.network.parameters():
        parameter.data = parameter.data.to(dtype)
    if trains(config):
        source = weights.Source(family, base, base)
        with torch.device("meta"):
            tuned = weights.apply_tuning(meta.network, source, config.captioner, meta.cross_layers)
        meta = replace(meta, network=tuned)
        if config.train.gradient_checkpointing:
            meta.network.activation_checkpointing_enable({"use_reentrant": False})
        meta.network.train()
    return meta


def frozen_bytes(meta: MetaCaptioner, captioner: CaptionerConfig) -> float:
    """Bytes of the weights that are not trained, quantised ones as ``base.quantize`` stores them."""
    total = 0.0
    counted: set[int] = set()  # input and output embeddings are one
    for name, module in meta.network.named_modules():
        linear = isinstance(module, torch.nn.Linear) and ".language_model." in name
        quantized = linear and captioner.quantization is not Quantization.none
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            packed = quantized and part == "weight"
            size = parameter.numel() * parameter.itemsize
            total += QUANTIZED_BYTES[captioner.quantization](parameter) if packed else size
    return total


def measure(meta: MetaCaptioner, config: CaptionVLM, size: int, on_cuda: bool) -> Cost:
    """The cost of one micro-batch, or of one batch that is written, besides weights and gradients."""
    written = WRITTEN if trains(config) else config.captioner.max_new_tokens
    batch = meta.batch(size, written)
    known = [*meta.network.parameters(), *meta.network.buffers(), *batch.values()]
    if not trains(config):
        with torch.no_grad(), fused_attention(), Cost(known) as cost:
            meta.network(**in_dtype(batch, meta), use_cache=True)
        return cost

    def loss() -> Tensor:
        logits = meta.network(**batch, use_cache=False).logits
        return loss_per_sample(logits, empty_ids(*logits.shape[:2])).mean()

    fused = config.train.attention is not AttentionKernel.math
    return training_cost(meta.network, known, loss, DTYPES[planned_precision(config.train, on_cuda)], on_cuda, fused)


def in_dtype(batch: dict[str, Tensor], meta: MetaCaptioner) -> dict[str, Tensor]:
    """The batch with its pictures in the network's dtype."""
    dtype = next(meta.network.parameters()).dtype
    return map_values(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)


def make_plan(
    config: CaptionVLM, pictures: int | None, processes: int = 1, sharding: Sharding | None = None
) -> CaptionPlan:
    """The cost of a config. pictures: that are written; None where the task trains."""
    on_cuda = planned_gpu(config.plan) is not None
    meta = meta_captioner(config)
    learns = trains(config)
    size = config.train.batch_size if learns else config.captioner.batch_size
    cost = measure(meta, config, size, on_cuda)
    sizes = list(map(Tensor.numel, trainable(meta.network).values())) if learns else []
    frozen = frozen_bytes(meta, config.captioner)
    state = state_gib(frozen, sizes or [0], config.train, config.optim)
    gathered = 0.0
    if sharding and learns:
        state = map_values(lambda part: part / processes, state)
        width = getattr(torch, config.captioner.dtype.name).itemsize
        gathered = gathered_gib(meta.network, blocks_of(meta.network, sharding), width, sharding.reshard)
    gib = {**state, "gathered_gib": gathered, "activations_gib": cost.peak / GIB}
    micro = config.train.gradient_accumulation_steps if learns else 1
    per_step = size * micro * processes
    return CaptionPlan(
        trained_parameters=sum(sizes),
        frozen_parameters=sum(p.numel() for p in meta.network.parameters() if not p.requires_grad),
        **gib,
        total_gib=sum(gib.values()),
        tflop=cost.flops / 1e12 * micro,
        pictures_per_step=per_step,
        steps=config.train.max_steps if learns else math.ceil((pictures or 0) / per_step),
    )


def seconds_per_step(config: CaptionVLM, result: CaptionPlan, meta: MetaCaptioner, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a step at the highest and at the lowest utilisation.

    A written token waits for the decoder's weights to be read and for its layers to be launched; both come on top of
    the products.
    """
    slow, fast = config.plan.utilisation_low, config.plan.utilisation_high
    products = span(result.tflop, gpu.tflops, fast, slow)
    if trains(config) or not products[1]:
        return products
    read = sum(parameter.numel() * parameter.itemsize for parameter in meta.reader.parameters()) / 1e12
    reading = span(read * WRITTEN, gpu.bandwidth, fast, slow)
    launching = WRITTEN * meta.layers
    return (
        products[0] + reading[0] + launching * LAUNCH[0],
        products[1] + reading[1] + launching * LAUNCH[1],
    )


def decide(config: CaptionVLM, result: CaptionPlan, gpu: Gpu, processes: int) -> CaptionDecision:
    """What a plan means on a GPU."""
    meta = meta_captioner(config)
    seconds = seconds_per_step(config, result, meta, gpu)
    hours = (seconds[0] * result.steps / 3600, seconds[1] * result.steps / 3600)
    price = None
    if config.plan.gpu_hour_price is not None:
        rate = config.plan.gpu_hour_price * processes
        price = (rate * hours[0], rate * hours[1])
    size = config.train.batch_size if trains(config) else config.captioner.batch_size
    larger = measure(meta, config, 2 * size, on_cuda=True).peak / GIB
    each = (larger - result.activations_gib) / size
    room = USABLE * gpu.memory_gib - result.total_gib
    verdict = verdict_of(result.total_gib, gpu)
    return CaptionDecision(
        gpu=gpu.title,
        gpu_memory_gib=gpu.memory_gib,
        verdict=verdict,
        largest_batch=max(0, size + math.floor(room / each)),
        seconds_per_step=seconds,
        hours=hours,
        price=price,
        change=first_change(config) if verdict != "fits" else "",
    )


def first_change(config: CaptionVLM) -> str:
    """The override that saves most memory among those that are not set yet, the cheapest in time first."""
    captioner = config.captioner
    train = config.train
    learns = trains(config)
    plain = CAPTIONERS[captioner.kind.name].presets[captioner.tuning.name].parameters
    weights_free = not learns or not plain
    levers = (
        (learns and not train.gradient_checkpointing, "train.gradient_checkpointing=true"),
        (learns and train.batch_size > 1, "train.batch_size=1 with more train.gradient_accumulation_steps"),
        (learns and bool(plain), "captioner.tuning=language_lora"),
        (weights_free and captioner.dtype.name == "float32", "captioner.dtype=bfloat16"),
        (weights_free and captioner.quantization is Quantization.none, "captioner.quantization=nf4"),
        (not learns and captioner.batch_size > 1, "captioner.batch_size=1"),
    )
    for applies, override in levers:
        if applies:
            return override
    return "a smaller captioner, or a GPU with more memory"


def plan(config: CaptionVLM) -> None:
    """Write ``plan.json`` and print it as a table; the first of several processes does so for all of them."""
    refuse_launcher()
    sharding = read_sharding(config) if trains(config) else None
    if int(os.environ.get("RANK", 0)):
        return
    if config.plan.sharded is not None:
        sharding = Sharding() if config.plan.sharded else None
    pictures = config.plan.images
    if pictures is None:  # of a training: what is written is counted by plan.images
        pictures = len(load_training(config, ("image",), validates=config.train.validation_steps > 0).rows)
    run = open_run("caption_vlm", config)
    processes = config.plan.gpus or int(os.environ.get("WORLD_SIZE", 1))
    result = make_plan(config, pictures, processes, sharding)
    written = asdict(result) | {"pictures": pictures, "processes": processes, "task": config.task.name}
    gpu = planned_gpu(config.plan)
    decided = decide(config, result, gpu, processes) if gpu else None
    if decided:
        written |= asdict(decided)
    write_plan(run, written)
    answer_figures(written)
    answer.info("A caption is counted with %d tokens. Workspaces of the device come on top.", WRITTEN)
    for sentence in decided.sentences() if decided else ():
        answer.info("%s", sentence)

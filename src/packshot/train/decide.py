"""What a plan means on a GPU: whether it fits, how long it takes, what it costs, and what to change first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packshot.base.cost import GIB
from packshot.config.gpus import USABLE, Gpu, hours_text, span, verdict_of, verdict_text
from packshot.config.schema import MixedPrecision, Quantization, TrainScript
from packshot.train.cost import measure_step, meta_method

if TYPE_CHECKING:
    from packshot.train.plan import Plan

# CPU seconds to decode and frame a JPEG of 4000x3000 px with its mask for 1024 px (benchmarks/encoding.py).
DECODING_SECONDS = 0.12


@dataclass(frozen=True)
class Decision:
    """Whether a training fits a GPU, and what it takes there.

    verdict: fits, tight or does not fit. largest_batch: samples per process and micro-step that fit, 0 for none.
    hours: of training, at the highest and at the lowest utilisation; encoding_hours: before it, once. decoders: CPU
    cores that keep one GPU busy meanwhile, at the lowest and at the highest. price: of both; None if none is given.
    change: what to change first, where it does not fit; empty otherwise.
    """

    gpu: str
    gpu_memory_gib: float
    verdict: str
    largest_batch: int
    seconds_per_step: tuple[float, float]
    hours: tuple[float, float]
    encoding_hours: tuple[float, float]
    decoders: tuple[int, int]
    price: tuple[float, float] | None
    change: str

    def sentences(self) -> Iterator[str]:
        """The decision in words."""
        verdict = verdict_text(self.verdict, self.gpu, self.gpu_memory_gib)
        yield f"{verdict}; the largest batch is {self.largest_batch}."
        if self.hours[1]:
            yield f"Training takes {hours_text(self.hours)}."
            low, high = self.decoders
            yield f"Encoding before it takes {hours_text(self.encoding_hours)}."
            yield f"Photographs of 12 MP then keep {low} to {high} CPU cores a GPU busy with decoding (JPEG)."
        if self.price:
            yield f"It costs {self.price[0]:.0f} to {self.price[1]:.0f}."
        if self.change:
            yield f"Change first: {self.change}."


def decide(config: TrainScript, result: Plan, gpu: Gpu, processes: int, sharded: bool = False) -> Decision:
    """What a plan means on a GPU."""
    needed = max(result.total_gib, result.encoding_gib)
    verdict = verdict_of(needed, gpu)
    slow, fast = config.plan.utilisation_low, config.plan.utilisation_high
    steps = config.train.max_steps
    seconds = span(result.tflop_per_step, gpu.tflops, fast, slow)
    # the VAE runs in fp32, whose products (TF32) have half of bf16's peak
    encoding = span(result.encoding_tflop / processes, gpu.tflops / 2, fast, slow)
    hours = (seconds[0] * steps / 3600, seconds[1] * steps / 3600)
    encoding_hours = (encoding[0] / 3600, encoding[1] / 3600)
    price = None
    if config.plan.gpu_hour_price is not None:
        rate = config.plan.gpu_hour_price * processes
        price = (rate * (hours[0] + encoding_hours[0]), rate * (hours[1] + encoding_hours[1]))
    return Decision(
        gpu=gpu.title,
        gpu_memory_gib=gpu.memory_gib,
        verdict=verdict,
        largest_batch=largest_batch(config, result, USABLE * gpu.memory_gib),
        seconds_per_step=seconds,
        hours=hours,
        encoding_hours=encoding_hours,
        price=price,
        decoders=decoders(result.encoded_pictures / processes, encoding),
        change=first_change(config, processes > 1 and not sharded) if verdict != "fits" else "",
    )


def decoders(pictures: float, seconds: tuple[float, float]) -> tuple[int, int]:
    """CPU cores that decode so many pictures while one GPU encodes them, at its lowest and at its highest speed."""
    fast, slow = seconds
    if not fast:
        return 0, 0
    work = pictures * DECODING_SECONDS
    return math.ceil(work / slow), math.ceil(work / fast)


def largest_batch(config: TrainScript, result: Plan, limit: float) -> int:
    """The most samples per micro-step whose activations leave the rest of the plan below ``limit`` GiB.

    Activations grow by the same amount with each sample, which two measurements give.
    """
    size = config.train.batch_size
    parts, method = meta_method(config)
    larger = measure_step(parts, method, config, 2 * size, on_cuda=True).peak / GIB
    each = (larger - result.activations_gib) / size
    room = limit - (result.total_gib - result.activations_gib)
    beyond = (room - result.activations_gib) / each
    return max(0, size + math.floor(beyond))


def first_change(config: TrainScript, can_shard: bool = False) -> str:
    """What saves most memory among what is not set yet, the cheapest in time first. can_shard: there are more GPUs."""
    train = config.train
    trained_whole = not config.can_quantize
    levers = (
        (train.mixed_precision is MixedPrecision.no, "train.mixed_precision=bf16"),
        (not train.gradient_checkpointing, "train.gradient_checkpointing=true"),
        (train.batch_size > 1, "train.batch_size=1 with more train.gradient_accumulation_steps"),
        (trained_whole and config.optim.kind.name == "adamw", "optim=adam8bit"),
        (trained_whole and can_shard, "launching with conf/launch/fsdp.yaml"),
        (trained_whole and not train.fused_backward, "train.fused_backward=true train.max_grad_norm=0"),
        (config.can_quantize and config.model.quantization is Quantization.none, "model.quantization=nf4"),
    )
    for applies, override in levers:
        if applies:
            return override
    return "a smaller model.resolution, or a GPU with more memory"

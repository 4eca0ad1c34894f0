"""``mode=plan``: what a run will cost, from the shapes alone; no weights, no data but their number."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from packshot.base.cost import GIB, gathered_gib, planned_gpu, state_gib
from packshot.base.inpainting import ProductConv
from packshot.base.load import Parts
from packshot.config.schema import TrainScript
from packshot.dataset.sets import load_training
from packshot.engine.checkpoints import trainable
from packshot.engine.packed import ROW
from packshot.engine.processes import DTYPES, planned_precision
from packshot.engine.sharding import Sharding, blocks_of
from packshot.lists import map_values
from packshot.methods import Method
from packshot.runs.folder import answer, log, open_run
from packshot.runs.plan_file import answer_figures, write_plan
from packshot.train.cost import (
    count_parameters,
    frozen_bytes,
    latent_side,
    measure_encoding,
    measure_step,
    meta_method,
)
from packshot.train.decide import decide
from packshot.train.pictures import PLANNED_BYTES


@dataclass(frozen=True)
class Plan:
    """Cost of one process.

    activations_gib: everything alive at the peak of one micro-step besides weights and gradients, as autocast has it
        (norms in fp32 on a GPU, copies of trained weights). Attention counts as a fused kernel unless
        ``train.attention=math``; workspaces of kernels and fragmentation come on top.
    gathered_gib: with sharded training, the weights that are whole while they compute; all that stands above it is then
        the share of one process.
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
    gathered_gib: float
    vae_gib: float
    activations_gib: float
    total_gib: float
    encoding_gib: float
    tflop_per_step: float
    samples_per_step: int
    epochs: float
    cache_gib: float
    encoded_pictures: int
    encoding_tflop: float


def make_plan(
    config: TrainScript, samples: int, processes: int = 1, shown: int | None = None, sharding: Sharding | None = None
) -> Plan:
    """The cost of a training config on ``samples`` samples.

    shown: how many an epoch shows, where sets are repeated; None: each once. sharding: how the processes divide the
    state; None: each has all of it.
    """
    parts, method = meta_method(config)
    train = config.train
    on_cuda = planned_gpu(config.plan) is not None
    width = DTYPES[planned_precision(config.train, on_cuda)].itemsize
    frozen = frozen_bytes(parts, method, config, width)
    cost = measure_step(parts, method, config, train.batch_size, on_cuda)
    sizes = list(map(Tensor.numel, trainable(method).values()))
    vae = count_parameters(parts.vae) * 4 / GIB
    encoding_peak, encoding_tflop = measure_encoding(parts, config.model.resolution)
    keeps_vae = bool(train.validation_steps) or not config.data.cache
    state = state_gib(frozen, sizes, train, config.optim)
    # pictures are encoded before the state is divided
    weights = state["frozen_weights_gib"] + state["trained_weights_gib"]
    gathered = 0.0
    if sharding:
        state = map_values(lambda size: size / processes, state)
        gathered = gathered_gib(method, blocks_of(method, sharding), width, sharding.reshard)
    gib = {
        **state,
        "gathered_gib": gathered,
        "vae_gib": vae if keeps_vae else 0.0,
        "activations_gib": cost.peak / GIB,
    }
    per_step = train.batch_size * train.gradient_accumulation_steps * processes
    pictures = samples * sides(config)
    return Plan(
        trained_parameters=sum(sizes),
        frozen_parameters=count_parameters(method, trained=False),
        **gib,
        total_gib=sum(gib.values()),
        encoding_gib=weights + vae + encoding_peak,
        tflop_per_step=cost.flops / 1e12 * train.gradient_accumulation_steps,
        samples_per_step=per_step,
        epochs=train.max_steps * per_step / (shown or samples),
        cache_gib=samples * cached_bytes(parts, method, config) / GIB if config.data.cache else 0.0,
        encoded_pictures=pictures,
        encoding_tflop=pictures * encoding_tflop,
    )


def cached_bytes(parts: Parts, method: Method, config: TrainScript) -> int:
    """Bytes of one sample in the cache; with ``data.flip`` its pictures count twice.

    Mean and deviation of four latent channels in fp32, as the VAE makes them; the product's share, the held cells and
    those inside the frame as bytes; in the dtype of the frozen encoders the embeddings of the caption, and what the
    method encodes. Where the UNet reads the product, five channels of fp32. The pictures that control maps are drawn
    from, compressed: the one number that depends on what they show.
    """
    cells = latent_side(parts, config.model.resolution) ** 2
    width = DTYPES[planned_precision(config.train, planned_gpu(config.plan) is not None)].itemsize
    total = (4 * 2 * 4 + 3) * cells + 4 * 6 + ROW.itemsize
    if isinstance(parts.unet.conv_in, ProductConv):
        total += 4 * 5 * cells
    if method.encoders:
        for shape in method.condition_shapes(config.model.resolution).values():
            total += width * torch.Size(shape).numel()
    if method.pictures:
        channels = 3 + len({"mask", *method.pictures} - {"image"})
        total += round(PLANNED_BYTES * channels * config.model.resolution**2)
    total *= sides(config)
    if not method.trains_text:
        tokens = 77 * config.objective.prompt_chunks
        total += width * (tokens * parts.unet.config.cross_attention_dim + parts.text_encoder_2.config.projection_dim)
    return total


def sides(config: TrainScript) -> int:
    """How many pictures of a sample are encoded."""
    return 2 if config.data.flip else 1


def plan(config: TrainScript, script: str, sharding: Sharding | None = None) -> None:
    """Write ``plan.json`` and print it as a table; the first of several processes does so for all of them.

    sharding: as the launcher asks for it; ``plan.sharded`` counts if it is set.
    """
    if int(os.environ.get("RANK", 0)):
        return
    samples = config.plan.images
    shown = samples
    sets: list[dict[str, object]] = []
    notes: list[str] = []
    if samples is None:
        data = load_training(config, ("image",), validates=config.train.validation_steps > 0)
        samples = len(data.rows)
        shown = data.shown
        notes = data.notes
        sets = [{"path": one.named.path, "rows": len(one.rows), "shown_per_epoch": one.shown} for one in data.sets]
    run = open_run(script, config)
    processes = config.plan.gpus or int(os.environ.get("WORLD_SIZE", 1))
    if config.plan.sharded is not None:
        sharding = Sharding() if config.plan.sharded else None
    result = make_plan(config, samples, processes, shown, sharding)
    written = asdict(result) | {"samples": samples, "samples_per_epoch": shown, "processes": processes}
    gpu = planned_gpu(config.plan)
    decided = decide(config, result, gpu, processes, sharding is not None) if gpu else None
    if decided:
        written |= asdict(decided)
    write_plan(run, written | {"sets": sets})
    for note in notes:
        log.info("%s", note)
    answer_figures(written)
    answer.info("Activations are counted from the graph; workspaces of the device come on top.")
    for sentence in decided.sentences() if decided else ():
        answer.info("%s", sentence)

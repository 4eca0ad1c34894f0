"""What the three training scripts do: load, encode, fit, export."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator

from packshot.base.adapter_metadata import objective_metadata
from packshot.base.cost import GIB
from packshot.base.inpainting import prepare_unet
from packshot.base.load import Parts, load_parts
from packshot.base.places import find_place
from packshot.config.gpus import USABLE
from packshot.config.schema import (
    AttentionKernel,
    Mode,
    Quantization,
    TrainConfig,
    TrainScript,
    script_of,
)
from packshot.dataset.flips import flip_note
from packshot.dataset.rows import Rows
from packshot.dataset.sets import TrainingData, load_training
from packshot.engine.batches import listed
from packshot.engine.checkpoints import EMA, exported_step, exporting
from packshot.engine.loop import fit
from packshot.engine.memory import compile_networks, enable_checkpointing, refuse_unavailable
from packshot.engine.processes import (
    DTYPES,
    Session,
    announce,
    refuse_launcher,
    resolve_precision,
    start,
    translate_lost_process,
)
from packshot.engine.sharding import Sharding, read_sharding
from packshot.errors import ConfigError
from packshot.methods import build_method, method_class
from packshot.methods.base import Exported
from packshot.runs.folder import answer, log
from packshot.runs.licenses import named_weights, refuse_weights
from packshot.runs.tracking import Input, finishing
from packshot.train.card import write_card
from packshot.train.check.findings import small_buckets
from packshot.train.check.run import check
from packshot.train.decide import first_change
from packshot.train.encode import Encoder
from packshot.train.examples import Examples
from packshot.train.plan import make_plan, plan
from packshot.train.task import DiffusionTask
from packshot.train.validation import LOSS_SAMPLES


def train(config: TrainScript) -> None:
    """Entry point of the training scripts: load data and models, build the task, run the mode."""
    refuse_weights(config)
    refuse_launcher()
    sharding = read_sharding(config)
    script = script_of(config)
    if config.mode is Mode.plan:
        plan(config, script, sharding)
        return
    refuse_missing_weights(config)
    read = method_class(config).pictures_of(config.method)
    pictures = ("image", "mask", *read)
    data = load_training(config, pictures, read, validates=config.train.validation_steps > 0)
    warn_of_memory(config, len(data.rows), sharding)
    parts = load_parts(config.model, loading_dtype(config))
    session = start(script, config, config.train, resumable=False, sharding=sharding)
    with finishing(session.tracker):
        announce(session, config.train)
        for note in data.notes if session.run else ():
            log.info("%s", note)
        task, examples = build_task(config, parts, data.rows, data.validation, session.accelerator)
        if config.data.flip and session.run:
            log.info("%s", flip_note(examples.flips))
        with translate_lost_process(session.accelerator):
            if config.mode is Mode.check:
                check(session, task, examples, config, data.order)
            else:
                fit_and_export(session, task, examples, data, config)


def refuse_missing_weights(config: TrainScript) -> None:
    """Raises ConfigError for the first weights that are neither on the disk nor named as on the hub."""
    for key, source in named_weights(config):
        find_place(key, source)


def warn_of_memory(config: TrainScript, samples: int, sharding: Sharding | None = None) -> None:
    """Compare the plan with the free memory of the GPU, before anything is loaded or encoded.

    A warning and no refusal: what is planned leaves out workspaces of kernels, and other processes may end meanwhile.
    """
    if not torch.cuda.is_available() or int(os.environ.get("RANK", 0)):
        return
    processes = int(os.environ.get("WORLD_SIZE", 1))
    result = make_plan(config, samples, processes, sharding=sharding)
    needed = max(result.total_gib, result.encoding_gib)
    free = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[0] / GIB
    log.info("planned memory: %.1f GiB, free: %.1f GiB", needed, free)
    if needed > USABLE * free:
        log.warning("this training may not fit; change first: %s", first_change(config, processes > 1 and not sharding))


def loading_dtype(config: TrainScript) -> torch.dtype:
    """What frozen networks are loaded in: the forward pass's dtype, unless something starts from their exact values."""
    if method_class(config).copies_base or config.model.quantization is not Quantization.none:
        return torch.float32
    return DTYPES[resolve_precision(config.train.mixed_precision)]


def build_task(
    config: TrainScript, parts: Parts, rows: Rows, validation: Rows, accelerator: Accelerator
) -> tuple[DiffusionTask, Examples]:
    """The task of a training config, on its device, and the samples it is trained on.

    New weights are drawn from run.seed: the same on every process.

    Raises:
        ConfigError: the machine cannot do what the config asks for.
    """
    if not config.data.cache and accelerator.device.type != "cpu":
        refuse_encoding_while_training(config, accelerator.device.type)
    refuse_unavailable(config.train, accelerator)  # fit asks too, but after the data has been encoded
    torch.manual_seed(config.run.seed)
    method = build_method(parts, config)
    prepare_unet(parts.unet, config.objective.product_conditioning)
    if config.train.gradient_checkpointing:
        enable_checkpointing(method)
    encoder = Encoder(parts, method, config.model.resolution, config.data, config.objective.prompt_chunks)
    folder = Path(config.data.cache_dir) if config.data.cache else None
    data = config.data
    examples = Examples(rows, encoder, folder, flip=data.flip, smallest_bucket=data.smallest_bucket)
    held_out = Examples(validation, encoder, folder, max(LOSS_SAMPLES, config.train.validation_samples))
    task = DiffusionTask(method, parts, config, held_out)
    place(task, parts, accelerator, config.train)
    return task, examples


def refuse_encoding_while_training(config: TrainScript, device: str) -> None:
    """Raises ConfigError for settings under which samples cannot be encoded on a GPU at each access."""
    if config.data.num_workers:
        raise ConfigError(
            f"data.num_workers={config.data.num_workers} with data.cache=false: loader processes are forked, and a "
            f"forked process cannot encode on {device}.",
            "Set data.num_workers=0 (a thread encodes), or data.cache=true.",
        )
    if config.train.attention is not AttentionKernel.auto:
        raise ConfigError(
            f"train.attention={config.train.attention} with data.cache=false: the kernel is chosen for the whole "
            "process, in which the VAE encodes at the same time, and for that there is only the plain one.",
            "Set train.attention=auto, or data.cache=true.",
        )


def place(task: DiffusionTask, parts: Parts, accelerator: Accelerator, train: TrainConfig) -> None:
    """Frozen weights in the mixed-precision dtype, trained ones in fp32, all on the device."""
    device = accelerator.device
    dtype = DTYPES[resolve_precision(train.mixed_precision)]
    trained = {id(p): p.data for p in task.parameters() if p.requires_grad}
    parts.to(device, dtype)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data = trained[id(parameter)].to(device)
        elif parameter.is_floating_point():  # networks of the method's own that are not trained
            parameter.data = parameter.data.to(device, dtype)
    task.alphas_cumprod_T = task.alphas_cumprod_T.to(accelerator.device)


def say_buckets(examples: Examples, config: TrainScript, processes: int) -> None:
    """Name buckets too small for a step, and how many samples a closed bucket sends to another."""
    if examples.moved:
        smallest = f"data.smallest_bucket={config.data.smallest_bucket}"
        log.info("%d of %d samples leave a bucket that %s closes", examples.moved, examples.whole, smallest)
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps
    for finding in small_buckets(examples, per_step * processes):
        log.warning("%s (data.smallest_bucket closes small ones)", finding.says)


def fit_and_export(
    session: Session, task: DiffusionTask, examples: Examples, data: TrainingData, config: TrainScript
) -> None:
    """``mode=train``: encode, train to ``train.max_steps``, export."""
    if config.train.compile:
        compile_networks(task.method, session.accelerator.device)
    if session.run:
        say_buckets(examples, config, session.accelerator.num_processes)
    examples.fill(session.accelerator)
    if config.train.validation_steps:
        task.validator.fill(session.accelerator)
    if config.data.cache:
        examples.encoder.release()
    if session.tracker:
        session.tracker.inputs([*set_inputs(data), Input("model", "model.base", config.model.base)])
    ema = fit(task, listed(examples, data.order), config, session)
    if session.run:
        export(session, task, ema, data, config)


def set_inputs(data: TrainingData) -> list[Input]:
    """The sets of ``data.train`` as a tracker's inputs: under the key, or with their number where there are several."""
    inputs = []
    for number, one in enumerate(data.sets):
        key = "data.train" if len(data.sets) == 1 else f"data.train[{number}]"
        inputs.append(Input("dataset", key, one.named.path, one.rows.fingerprint()))
    return inputs


def export(session: Session, task: DiffusionTask, ema: EMA | None, data: TrainingData, config: TrainScript) -> None:
    """``<run>/export``: the adapter (its moving average, if kept), its config, its data's identity and a model card."""
    method = task.method
    method.export_dtype = getattr(torch, config.export.dtype.name)
    if ema:
        ema.swap(task)
    step = exported_step(session.path, config.train)
    exported = Exported(config, task.prediction_type, len(data.rows), step)
    with exporting(session.path) as folder:
        method.export(folder, objective_metadata(config.objective))
        for layout, write in method.layouts.items():
            if getattr(config.export, layout):
                write(folder, exported)
        made_from = write_card(folder, session.path, data.rows, config, method.used_as, data.records())
    if session.tracker:
        session.tracker.artifact("adapter", session.path / "export", made_from)
    answer.info("exported step %d to %s", made_from["step"], session.path / "export")

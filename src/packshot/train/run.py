"""What the three training scripts do: load, encode, fit, export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from packshot.base.adapter_metadata import objective_metadata
from packshot.base.inpainting import prepare_unet
from packshot.base.load import Parts, load_parts
from packshot.config.schema import SCRIPTS, AttentionKernel, MixedPrecision, Mode, TrainConfig, TrainScript
from packshot.dataset.rows import Rows, load_rows
from packshot.engine.checkpoints import EMA, exporting
from packshot.engine.loop import fit
from packshot.engine.memory import compile_networks, enable_checkpointing, refuse_unavailable
from packshot.engine.processes import (
    Session,
    announce,
    refuse_launcher,
    resolve_precision,
    start,
    translate_lost_process,
)
from packshot.errors import ConfigError
from packshot.methods import METHODS
from packshot.runs.folder import log
from packshot.runs.licenses import refuse_weights
from packshot.train.card import write_card
from packshot.train.check.run import check
from packshot.train.encode import Encoder, Examples
from packshot.train.plan import plan
from packshot.train.task import DiffusionTask
from packshot.train.validation import LOSS_SAMPLES

PICTURES = ("image", "mask", "depth", "shadow")  # all that training may look at
DTYPES = {MixedPrecision.no: torch.float32, MixedPrecision.fp16: torch.float16, MixedPrecision.bf16: torch.bfloat16}


def train(config: TrainScript) -> None:
    """Entry point of train_lora.py, train_ip_adapter.py and train_controlnet.py."""
    refuse_weights(config)
    refuse_launcher()
    script = next(name for name, schema in SCRIPTS.items() if schema is type(config))
    MODES[config.mode](config, script)


def _with_task(work: Callable[[Session, DiffusionTask, Examples, Any], None]) -> Callable[[TrainScript, str], None]:
    """A mode that needs models and data: loads them, and closes the tracker whatever happens."""

    def mode(config: TrainScript, script: str) -> None:
        load = partial(load_rows, pictures=PICTURES, cache=config.data.cache_dir, licenses=config.licenses)
        rows = load("data.train", config.data.train)
        validation = load("data.validation", config.data.validation)
        parts = load_parts(config.model)
        session = start(script, config, config.train, resumable=False)
        announce(session, config.train)
        task, examples = build_task(config, parts, rows, validation, session.accelerator)
        try:
            rows.refuse_without("data.train", task.method.pictures)
            validation.refuse_without("data.validation", task.method.pictures)
            with translate_lost_process(session.accelerator):
                work(session, task, examples, config)
        finally:
            if session.tracker:
                session.tracker.finish()

    return mode


def build_task(
    config: Any, parts: Parts, rows: Rows, validation: Rows, accelerator: Accelerator
) -> tuple[DiffusionTask, Examples]:
    """The task of a training config, on its device, and the samples it is trained on.

    New weights are drawn from run.seed: the same on every process.

    Raises:
        ConfigError: the machine cannot do what the config asks for.
    """
    if not config.data.cache and accelerator.device.type != "cpu":
        _refuse_encoding_beside_training(config, accelerator.device.type)
    refuse_unavailable(config.train, accelerator)  # fit asks too, but after the data has been encoded
    torch.manual_seed(config.run.seed)
    method: Any = METHODS[type(config.method)](parts, config.method)
    prepare_unet(parts.unet, config.objective.product_conditioning)
    if config.train.gradient_checkpointing:
        enable_checkpointing(method)
    encoder = Encoder(parts, method, config.model.resolution, config.data)
    folder = Path(config.data.cache_dir) if config.data.cache else None
    examples = Examples(rows, encoder, folder)
    held_out = Examples(validation, encoder, folder, max(LOSS_SAMPLES, config.train.validation_samples))
    task = DiffusionTask(method, parts, config, held_out)
    _place(task, parts, accelerator, config.train)
    return task, examples


def _refuse_encoding_beside_training(config: Any, device: str) -> None:
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


def _place(task: DiffusionTask, parts: Any, accelerator: Accelerator, train: TrainConfig) -> None:
    """Frozen weights in the mixed-precision dtype, trained ones in fp32, all on the device."""
    device, dtype = accelerator.device, DTYPES[resolve_precision(train.mixed_precision)]
    trained = {id(p): p.data for p in task.parameters() if p.requires_grad}
    parts.to(device, dtype)
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.data = trained[id(parameter)].to(device)
        elif parameter.is_floating_point():  # networks of the method's own that are not trained
            parameter.data = parameter.data.to(device, dtype)
    task.alphas_cumprod_T = task.alphas_cumprod_T.to(accelerator.device)


def _train(session: Session, task: DiffusionTask, examples: Examples, config: TrainScript) -> None:
    if config.train.compile:
        compile_networks(task.method, session.accelerator.device)
    examples.fill(session.accelerator)
    if config.train.validation_steps:
        task.validator.fill(session.accelerator)
    if config.data.cache:
        examples.encoder.release()
    if session.tracker:
        rows = examples.rows
        session.tracker.record({"base": config.model.base, "data": rows.path, "data_sha256": rows.fingerprint()})
    ema = fit(task, examples, config, session)
    if session.run:
        export(session, task, task.method, ema, examples.rows, config)


def export(session: Session, module: torch.nn.Module, exporter: Any, ema: EMA | None, rows: Rows, config: Any) -> None:
    """``<run>/export``: the adapter (its moving average, if kept), its config, its data's identity and a model card."""
    if ema:
        ema.swap(module)
    with exporting(session.path) as folder:
        exporter.export(folder, objective_metadata(config.objective))
        if getattr(getattr(config, "export", None), "kohya", False):
            exporter.export_kohya(folder)
        made_from = write_card(folder, session.path, rows, config)
    if session.tracker:
        session.tracker.artifact("adapter", session.path / "export", made_from)
    log.info("exported step %d to %s", made_from["step"], session.path / "export")


MODES: dict[Mode, Callable[[TrainScript, str], None]] = {
    Mode.train: _with_task(_train),
    Mode.plan: plan,
    Mode.check: _with_task(check),
}

"""``task=train``: fine-tune a captioner with the shared training loop."""

from __future__ import annotations

from pathlib import Path

import torch

from packshot.caption.data import PICTURES
from packshot.caption.models.adapter import Adapter
from packshot.caption.models.load import base_of, load_adapter, writing
from packshot.caption.scores import constant_caption
from packshot.caption.task import CaptioningTask
from packshot.config.schema import CaptionVLM
from packshot.dataset.rows import Rows
from packshot.dataset.sets import TrainingData, load_training
from packshot.engine.batches import listed
from packshot.engine.checkpoints import EMA, exported_step, exporting, weights_line
from packshot.engine.loop import fit
from packshot.engine.processes import announce, refuse_launcher, start, translate_lost_process
from packshot.engine.sharding import read_sharding
from packshot.errors import ConfigError
from packshot.lists import map_values
from packshot.runs.folder import answer, log, read_metrics
from packshot.runs.markdown import markdown_table
from packshot.runs.provenance import provenance_lines, write_provenance


def train(config: CaptionVLM) -> None:
    """Fine-tune the captioner on ``data.train``; writes ``export/``."""
    refuse_launcher()
    sharding = read_sharding(config)
    data = load_training(config, PICTURES, validates=config.train.validation_steps > 0)
    rows = data.rows
    torch.manual_seed(config.run.seed)  # the start of a LoRA's weights
    adapter = load_adapter(config.model, config.captioner, trainable=True)
    refuse_long_captions(adapter, rows, config.captioner.max_new_tokens)
    session = start("caption_vlm", config, config.train, resumable=False, sharding=sharding)
    announce(session, config.train)
    for note in data.notes if session.run else ():
        log.info("%s", note)
    if config.train.gradient_checkpointing:
        adapter.model.activation_checkpointing_enable({"use_reentrant": False})
    adapter.model.to(session.accelerator.device)
    task = CaptioningTask(
        adapter,
        writing(adapter, config.captioner),
        data.validation,
        constant_caption(rows.texts),
        config.train.validation_samples,
        config.run.seed,
    )
    try:
        with translate_lost_process(session.accelerator):
            ema = fit(task, listed(rows, data.order), config, session)
            if session.run:
                export(session.path, task, ema, data, config)
    finally:
        session.finish()


def refuse_long_captions(adapter: Adapter, rows: Rows, longest: int) -> None:
    """Raises ConfigError for the first caption with more tokens than the captioner may write."""
    for sample, text in zip(rows.ids, rows.texts, strict=True):
        length = adapter.caption_length(text)
        if length > longest:
            raise ConfigError(
                f"data.train: the caption of sample {sample} has {length} tokens, more than "
                f"captioner.max_new_tokens={longest}: it could be learned but never written.",
                "Raise captioner.max_new_tokens or shorten the caption.",
            )


def export(run: Path, task: CaptioningTask, ema: EMA | None, data: TrainingData, config: CaptionVLM) -> None:
    """``export/``: model (its moving average, if kept) and processor, config, identity of the data, model card."""
    if ema:
        ema.swap(task)
    with exporting(run) as folder:
        task.adapter.save(folder)
        lines = provenance_lines(write_provenance(folder, data.rows, config, data.records()))
        (folder / "README.md").write_text(card(run, config, lines))
    answer.info("exported to %s", run / "export")


def last_validation(run: Path, step: int) -> dict[str, float]:
    """The figures of the newest validation until a step; empty if there was none."""
    for line in reversed(read_metrics(run)):
        if "soft_f1" in line and line["step"] <= step:
            return line
    return {}


def card(run: Path, config: CaptionVLM, data: list[str]) -> str:
    """The model card. data: its lines about the data."""
    captioner = config.captioner
    table = ["No validation was run."]
    figures = last_validation(run, exported_step(run, config.train))
    if figures:
        table = markdown_table(("figure", "value"), map_values("{:.4g}".format, figures).items())[:-1]
    lines = [
        f"# {captioner.kind} captioner trained by Packshot",
        "",
        'It describes the scene around a product in the caption grammar and calls the product "an object".',
        "",
        f"- base: `{base_of(config.model, captioner)}`, tuning: {captioner.tuning}",
        f"- prompt: `{captioner.prompt}`",
        *data,
        weights_line(run, config.train),
        "",
        "Last validation, on held-out samples. `soft_f1_constant_caption` and `soft_f1_shuffled_images` are the scores",
        "of one constant caption and of the captions of other images. A captioner that looks at its image lies above.",
        "",
        *table,
        "",
        "Use: `python caption_vlm.py task=caption captioner.adapter=<this folder> data.input=<dataset>`",
    ]
    return "\n".join(lines) + "\n"

"""What caption_vlm.py does: ``task=train``, ``task=evaluate``, ``task=caption``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from packshot.caption import bulk
from packshot.caption.captioner import Captioner, caption_rows, load_adapter, load_captioner
from packshot.caption.data import shard_files
from packshot.caption.evaluate import constant_caption, soft_f1, with_baselines, worst_page
from packshot.caption.task import CaptioningTask
from packshot.config.schema import CaptionTask, CaptionVLM
from packshot.core.errors import ConfigError
from packshot.core.progress import progress
from packshot.core.run import log
from packshot.core.storage import folder_hash, replacing_file, resolve
from packshot.data.dataset import Rows, load_rows
from packshot.train.card import exported, weights_line, write_provenance
from packshot.train.loop import fit
from packshot.train.session import Session, start
from packshot.train.state import EMA, exporting

PICTURES = ("image", "mask")  # all that a captioner looks at
WORST = 32


def run(config: CaptionVLM) -> None:
    """Entry point of caption_vlm.py.

    Raises:
        ConfigError: a path, a dataset or a model that the config names cannot be used.
        PackshotError: training diverged, or no image could be captioned.
    """
    TASKS[config.task](config)


# ---- train ----


def train(config: CaptionVLM) -> None:
    """Fine-tune the captioner on ``data.train``; writes ``export/``."""
    rows = load_rows("data.train", config.data.train, pictures=PICTURES, spool=config.data.cache_dir)
    validation = load_rows("data.validation", config.data.validation, pictures=PICTURES, spool=config.data.cache_dir)
    torch.manual_seed(config.run.seed)  # the start of a LoRA's weights
    adapter = load_adapter(config.model, config.captioner, trainable=True)
    _refuse_long_captions(adapter, rows, config.captioner.max_new_tokens)
    session = start("caption_vlm", config, config.train)
    if config.train.gradient_checkpointing:
        adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter.model.to(session.accelerator.device)
    captioner = Captioner(adapter, config.captioner.batch_size)
    pictures, seed = config.train.validation_samples, config.run.seed
    task = CaptioningTask(captioner, validation, constant_caption(rows.texts), pictures, seed)
    try:
        ema = fit(task, rows, config, session)
        if session.run:
            _export(session, task, ema, rows, config)
    finally:
        _finish(session)


def _refuse_long_captions(adapter: Any, rows: Rows, longest: int) -> None:
    for sample, text in zip(rows.ids, rows.texts, strict=True):
        if (length := adapter.caption_length(text)) > longest:
            raise ConfigError(
                f"data.train: the caption of sample {sample} has {length} tokens, more than "
                f"captioner.max_new_tokens={longest}: it could be learned but never written.",
                "Raise captioner.max_new_tokens or shorten the caption.",
            )


def _export(session: Session, task: CaptioningTask, ema: EMA | None, rows: Rows, config: CaptionVLM) -> None:
    """``export/``: model (its moving average, if kept) and processor, config, identity of the data, model card."""
    if ema:
        ema.swap(task)
    with exporting(session.path) as folder:
        task.adapter.save(folder)
        data = write_provenance(folder, rows, config)
        (folder / "README.md").write_text(_card(session.path, config, data))
    log.info("exported to %s", session.path / "export")


def _last_validation(metrics: Path, step: int) -> dict[str, float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next((line for line in reversed(lines) if "soft_f1" in line and line["step"] <= step), {})


def _card(run: Path, config: CaptionVLM, data: dict[str, Any]) -> str:
    figures = _last_validation(run / "metrics.jsonl", exported(run, config)[0])
    measured = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    table = ["| figure | value |", "|---|---|", *measured] if measured else ["No validation was run."]
    lines = [
        f"# {config.captioner.kind} captioner trained by Packshot",
        "",
        'It describes the scene around a product in the caption grammar and calls the product "an object".',
        "",
        f"- base: `{config.model.florence2}`, tuning: {config.captioner.tuning}",
        f"- prompt: `{config.captioner.prompt}`",
        f"- data: `{data['path']}`, {data['rows']} samples, manifest sha256 `{data['sha256']}`",
        f"- licences of the data: {', '.join(data['licenses']) or 'not recorded'}",
        weights_line(run, config),
        "",
        "Last validation, on held-out samples. `soft_f1_constant_caption` and `soft_f1_shuffled_images` are what one",
        "constant caption and the captions of other images score; only what lies above them was seen in the image.",
        "",
        *table,
        "",
        "Use: `python caption_vlm.py task=caption captioner.adapter=<this folder> data.input=<dataset>`",
    ]
    return "\n".join(lines) + "\n"


# ---- evaluate ----


def evaluate(config: CaptionVLM) -> None:
    """Score the captioner on ``data.validation``; writes ``scores.json`` and ``worst.html``."""
    rows = load_rows("data.validation", config.data.validation, pictures=PICTURES, spool=config.data.cache_dir)
    if len(rows) < 2:
        raise ConfigError(f"data.validation={config.data.validation} has one row.", "The baselines need two or more.")
    known = load_rows("data.train", config.data.train, pictures=PICTURES, spool=config.data.cache_dir)
    captioner = load_captioner(config.model, config.captioner)
    session = start("caption_vlm", config, config.train)
    try:
        indices = list(range(len(rows)))
        captions = caption_rows(captioner, rows, indices, session.accelerator)
        if not session.run or not session.tracker:
            return
        truths = [rows[index]["scene"] for index in indices]
        scores = with_baselines(captions, truths, constant_caption(known.texts), config.run.seed)
        identity = {"samples": len(rows), "data": rows.path, "manifest_sha256": rows.fingerprint()}
        with replacing_file(session.path / "scores.json") as file:
            file.write_text(json.dumps({**identity, **scores}, indent=2) + "\n")
        worst = sorted(indices, key=lambda i: soft_f1(captions[i].text, truths[i]))[:WORST]
        samples = [rows[index] for index in worst]
        worst_page(
            session.path / "worst.html",
            [sample["image"] for sample in samples],
            [str(sample["id"])[:16] for sample in samples],
            [captions[index] for index in worst],
            [truths[index] for index in worst],
        )
        _report(session, scores)
    finally:
        _finish(session)


def _report(session: Session, scores: dict[str, Any]) -> None:
    assert session.run is not None  # evaluate() calls this on the main process
    assert session.tracker is not None
    figures = {
        f"{name}/{figure}": value
        for name, table in {"captioner": scores["captioner"], **scores["baselines"]}.items()
        for figure, value in {**table, "soft_f1": table["mean"]["soft"], "exact": table["mean"]["exact"]}.items()
        if isinstance(value, float)
    }
    session.run.metrics({"step": 0, **figures})
    session.tracker.log(figures, 0)
    for name, table in {"captioner": scores["captioner"], **scores["baselines"]}.items():
        log.info(
            "%-17s soft F1 %.3f  exact %.3f  in the grammar %.3f  naming the product %.3f",
            name, table["mean"]["soft"], table["mean"]["exact"], table["parse_rate"], table["leakage_rate"],
        )  # fmt: skip


# ---- caption ----


def caption(config: CaptionVLM) -> None:
    """Caption the dataset ``data.input``; writes its shards, captioned, and ``captions.json``."""
    files = shard_files("data.input", config.data.input)
    if config.run.dir and Path(config.run.dir).resolve() == files[0].parent.resolve():
        raise ConfigError(f"run.dir={config.run.dir} is data.input itself.", "Captions go to a folder of their own.")
    captioner = load_captioner(config.model, config.captioner)
    session = start("caption_vlm", config, config.train)
    rank, world = session.accelerator.process_index, session.accelerator.num_processes
    identity = _identity(config)
    try:
        mine, figures = files[rank::world], []
        with progress("captioning", len(mine), show=session.run is not None) as advance:
            for file in mine:
                figures.append((file.name, bulk.caption_shard(file, session.path / file.name, captioner, identity)))
                advance(errors=sum(counts["errors"] for _, counts in figures))
        figures = gather_object(figures)
        if session.run and session.tracker:
            for step, (name, counts) in enumerate(sorted(figures)):
                session.run.metrics({"step": step, "shard": name, **counts})
                session.tracker.log(counts, step)
            _summarise(session, files)
    finally:
        _finish(session)


def _identity(config: CaptionVLM) -> str:
    """Everything that a caption depends on besides its image, as text."""
    source = config.captioner.adapter or config.model.florence2
    weights = folder_hash(resolve(source)) if resolve(source).is_dir() else source
    chosen = config.captioner
    settings = {"prompt": chosen.prompt, "product_box": chosen.product_box, "max_new_tokens": chosen.max_new_tokens}
    return json.dumps({"weights": weights, "base": config.model.florence2, **settings}, sort_keys=True)


def _summarise(session: Session, files: list[Path]) -> None:
    summary = bulk.summary(session.path, files)
    with replacing_file(session.path / "captions.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")
    log.info("%d of %d rows have a caption", summary["captioned"], summary["rows"])
    for reason, count in summary["errors"].items():
        log.warning("%d rows without: %s", count, reason)
    if summary["errors"]:
        log.info("run.resume=true tries these rows again; their column caption_error says why")


def _finish(session: Session) -> None:
    if session.tracker:
        session.tracker.finish()


TASKS: dict[CaptionTask, Callable[[CaptionVLM], None]] = {
    CaptionTask.train: train,
    CaptionTask.evaluate: evaluate,
    CaptionTask.caption: caption,
}

"""What caption_vlm.py does: ``task=train``, ``evaluate``, ``caption``, ``review``, ``correct``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate.utils import gather_object

from packshot.caption import write
from packshot.caption.cider import cider
from packshot.caption.data import shard_files
from packshot.caption.evaluate import (
    confusion,
    confusion_page,
    constant_caption,
    leakage,
    measure,
    soft_f1,
    with_baselines,
    worst_page,
    written,
)
from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import (
    base_of,
    caption_rows,
    identity,
    load_adapter,
    load_captioner,
    unconstrained,
    writing,
)
from packshot.caption.review import doubtful, read_corrections, write_review
from packshot.caption.task import CaptioningTask
from packshot.config.schema import CaptionTask, CaptionVLM
from packshot.dataset import corrections
from packshot.dataset.rows import Rows, license_names, load_rows
from packshot.engine.checkpoints import EMA, exporting
from packshot.engine.loop import fit
from packshot.engine.processes import Session, announce, refuse_launcher, start, translate_lost_process
from packshot.errors import ConfigError
from packshot.runs.files import readable, replacing_file
from packshot.runs.folder import log, read_metrics
from packshot.runs.licenses import refuse_rows, refuse_weights
from packshot.runs.progress import progress
from packshot.train.card import exported, weights_line, write_provenance

PICTURES = ("image", "mask")  # all that a captioner looks at
WORST = 32
PATIENCE = 30 * 24 * 3600  # seconds; a launcher ends the others anyway when one process has failed


def run(config: CaptionVLM) -> None:
    """Entry point of caption_vlm.py.

    Raises:
        ConfigError: a path, a dataset or a model that the config names cannot be used.
        PackshotError: training diverged, or no image could be captioned.
    """
    refuse_weights(config)
    TASKS[config.task](config)


# ---- train ----


def train(config: CaptionVLM) -> None:
    """Fine-tune the captioner on ``data.train``; writes ``export/``."""
    refuse_launcher()
    load = partial(load_rows, pictures=PICTURES, cache=config.data.cache_dir, licenses=config.licenses)
    rows, validation = load("data.train", config.data.train), load("data.validation", config.data.validation)
    torch.manual_seed(config.run.seed)  # the start of a LoRA's weights
    adapter = load_adapter(config.model, config.captioner, trainable=True)
    _refuse_long_captions(adapter, rows, config.captioner.max_new_tokens)
    session = start("caption_vlm", config, config.train, resumable=False)
    announce(session, config.train)
    if config.train.gradient_checkpointing:
        adapter.model.activation_checkpointing_enable({"use_reentrant": False})
    adapter.model.to(session.accelerator.device)
    pictures, seed, captioner = config.train.validation_samples, config.run.seed, writing(adapter, config.captioner)
    task = CaptioningTask(adapter, captioner, validation, constant_caption(rows.texts), pictures, seed)
    try:
        with translate_lost_process(session.accelerator):
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


def _last_validation(run: Path, step: int) -> dict[str, float]:
    return next((line for line in reversed(read_metrics(run)) if "soft_f1" in line and line["step"] <= step), {})


def _card(run: Path, config: CaptionVLM, data: dict[str, Any]) -> str:
    figures = _last_validation(run, exported(run, config)[0])
    measured = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    table = ["| figure | value |", "|---|---|", *measured] if measured else ["No validation was run."]
    lines = [
        f"# {config.captioner.kind} captioner trained by Packshot",
        "",
        'It describes the scene around a product in the caption grammar and calls the product "an object".',
        "",
        f"- base: `{base_of(config.model, config.captioner)}`, tuning: {config.captioner.tuning}",
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
    load = partial(load_rows, pictures=PICTURES, cache=config.data.cache_dir, licenses=config.licenses)
    rows = load("data.validation", config.data.validation)
    if len(rows) < 2:
        raise ConfigError(f"data.validation={config.data.validation} has one row.", "The baselines need two or more.")
    known = load("data.train", config.data.train)
    captioner = load_captioner(config.model, config.captioner)
    session = start("caption_vlm", config, replace(config.train, process_timeout=PATIENCE))
    try:
        indices = list(range(len(rows)))
        captions = caption_rows(captioner, rows, indices, session.accelerator)
        free = caption_rows(unconstrained(captioner), rows, indices, session.accelerator)
        if not session.run or not session.tracker:
            return
        scores, worst = _scores(rows, captions, free, known.texts, config.run.seed)
        named = {"samples": len(rows), "data": rows.path, "manifest_sha256": rows.fingerprint()}
        with replacing_file(session.path / "scores.json") as file:
            file.write_text(json.dumps({**named, **scores}, indent=2) + "\n")
        confusion_page(session.path / "confusion.html", scores["confusion"], scores["captioner"]["captions"])
        samples = [rows[index] for index in worst]
        worst_page(
            session.path / "worst.html",
            [sample["image"] for sample in samples],
            [str(sample["id"])[:16] for sample in samples],
            [captions[index] for index in worst],
            [sample["scene"] for sample in samples],
        )
        _report(session, scores)
    finally:
        _finish(session)


def _scores(
    rows: Rows, captions: list[Caption], free: list[Caption], texts: list[str], seed: int
) -> tuple[dict[str, Any], list[int]]:
    """What ``scores.json`` says of the captions, held to the grammar and free, and the rows with the worst of them."""
    samples = [rows.read(index, ()) for index in range(len(rows))]
    truths, products = [sample["scene"] for sample in samples], [_category(sample) for sample in samples]
    kept, errors = written(captions)
    free_kept, free_errors = written(free)

    def of(items: list[Any], indices: list[int]) -> list[Any]:
        return [items[index] for index in indices]

    said, true = of(captions, kept), of(truths, kept)
    scores = with_baselines(said, true, constant_caption(texts), seed)
    scores["captioner"]["leakage"] = leakage(said, of(products, kept))
    scores["captioner"]["cider"] = cider([c.text for c in said], [t.render() for t in true], texts)
    said_free = of(free, free_kept)
    scores["unconstrained"] = {
        **measure(said_free, of(truths, free_kept)),
        "leakage": leakage(said_free, of(products, free_kept)),
    }
    scores["errors"] = {"captioner": errors, "unconstrained": free_errors}
    scores["confusion"] = confusion(said, true)
    return scores, sorted(kept, key=lambda i: soft_f1(captions[i].text, truths[i]))[:WORST]


def _category(sample: dict[str, Any]) -> str:
    """What kind of product a sample shows: its column ``category``, or the name that its product's id begins with."""
    named = sample.get("category") or str(sample.get("product_id") or "").split(".")[0]
    return named if named and not any(char.isdigit() for char in named) else "other"


def _report(session: Session, scores: dict[str, Any]) -> None:
    assert session.run is not None  # evaluate() calls this on the main process
    assert session.tracker is not None
    figures = {
        f"{name}/{figure}": value
        for name, table in _tables(scores).items()
        for figure, value in {**table, "soft_f1": table["mean"]["soft"], "exact": table["mean"]["exact"]}.items()
        if isinstance(value, float)
    }
    session.run.metrics({"step": 0, **figures})
    session.tracker.log(figures, 0)
    for name, errors in scores["errors"].items():
        for error, count in errors.items():
            log.warning("%s: %d pictures have no caption and are not scored (%s)", name, count, error)
    for name, table in _tables(scores).items():
        log.info(
            "%-17s soft F1 %.3f  exact %.3f  in the grammar %.3f  naming the product %.3f",
            name, table["mean"]["soft"], table["mean"]["exact"], table["parse_rate"], table["leakage_rate"],
        )  # fmt: skip


def _tables(scores: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: scores[name] for name in ("captioner", "unconstrained")} | scores["baselines"]


# ---- caption ----


def caption(config: CaptionVLM) -> None:
    """Caption the dataset ``data.input``; writes its shards, captioned, and ``captions.json``."""
    files = shard_files("data.input", config.data.input)
    if config.run.dir and Path(config.run.dir).resolve() == files[0].parent.resolve():
        raise ConfigError(f"run.dir={config.run.dir} is data.input itself.", "Captions go to a folder of their own.")
    refuse_rows(config.licenses, "data.input", str(config.data.input), _licenses(files))
    captioner = load_captioner(config.model, config.captioner)
    # The first process to be done waits for the last, which may have hours of shards before it.
    session = start("caption_vlm", config, replace(config.train, process_timeout=PATIENCE))
    rank, world = session.accelerator.process_index, session.accelerator.num_processes
    named = _identity(config)
    try:
        mine, figures = files[rank::world], []
        total = sum(pq.read_metadata(file).num_rows for file in mine)
        with progress("captioning", total, show=session.run is not None) as advance:
            for file in mine:
                counts = write.caption_shard(file, session.path / file.name, captioner, named, advance)
                figures.append((file.name, counts))
        figures = gather_object(figures)
        if session.run and session.tracker:
            for step, (name, counts) in enumerate(sorted(figures)):
                session.run.metrics({"step": step, "shard": name, **counts})
                session.tracker.log(counts, step)
            _summarise(session, files)
    finally:
        _finish(session)


def _licenses(files: list[Path]) -> set[str]:
    found: set[str] = set()
    for file in files:
        with pq.ParquetFile(file) as opened:
            found |= set(license_names(opened.read(["license"])))  # no column at all where there is none
    return found


def _identity(config: CaptionVLM) -> str:
    """Everything that a caption depends on besides its image, as text."""
    return json.dumps(identity(config.model, config.captioner), sort_keys=True)


def _summarise(session: Session, files: list[Path]) -> None:
    summary = write.summary(session.path, files)
    with replacing_file(session.path / "captions.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")
    log.info("%d of %d rows have a caption", summary["captioned"], summary["rows"])
    for reason, count in summary["errors"].items():
        log.warning("%d rows without: %s", count, reason)
    if summary["errors"]:
        log.info("run.resume=true tries these rows again; their column caption_error says why")


# ---- review and correct ----


def review(config: CaptionVLM) -> None:
    """Write the doubtful captions of ``data.input`` to ``review.csv`` and ``review.html``."""
    shard_files("data.input", config.data.input)
    rows = load_rows("data.input", str(config.data.input), captions=False, pictures=PICTURES)
    session = start("caption_vlm", config, config.train)
    try:
        if session.run:
            samples = doubtful(rows, config.data.review)
            write_review(session.path, samples, rows.path)
            log.info("%d captions to review in %s", len(samples), session.path / "review.html")
    finally:
        _finish(session)


def correct(config: CaptionVLM) -> None:
    """Take the corrections of ``data.corrections`` over into the dataset ``data.input``."""
    folder = shard_files("data.input", config.data.input)[0].parent
    if config.data.corrections is None:
        raise ConfigError("task=correct needs data.corrections.", "Name the review.csv that you have edited.")
    table = readable("data.corrections", config.data.corrections)
    rows = load_rows("data.input", str(config.data.input), captions=False, pictures=PICTURES)
    found = read_corrections(table, set(rows.ids))
    log.info("%d corrections taken over, %d in %s", len(found), corrections.add(folder, found), folder)


def _finish(session: Session) -> None:
    if session.tracker:
        session.tracker.finish()


TASKS: dict[CaptionTask, Callable[[CaptionVLM], None]] = {
    CaptionTask.train: train,
    CaptionTask.evaluate: evaluate,
    CaptionTask.caption: caption,
    CaptionTask.review: review,
    CaptionTask.correct: correct,
}

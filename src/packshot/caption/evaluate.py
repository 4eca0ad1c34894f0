"""``task=evaluate``: score a captioner on held-out samples."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packshot.caption.cider import cider
from packshot.caption.data import PATIENCE, PICTURES
from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import caption_rows
from packshot.caption.models.load import load_captioner
from packshot.caption.score_pages import article, confusion_page, worst_page
from packshot.caption.scores import (
    Figures,
    confusion,
    constant_caption,
    leakage,
    measure,
    soft_f1,
    with_baselines,
    without_errors,
)
from packshot.config.schema import CaptionVLM
from packshot.dataset.rows import Rows
from packshot.dataset.sets import load_training
from packshot.engine.processes import Session, start
from packshot.engine.task import Sample
from packshot.errors import ConfigError
from packshot.lists import column, pick
from packshot.runs.files import replacing_file
from packshot.runs.folder import answer, log
from packshot.scene import Scene

WORST = 32  # captions on the page of the worst


def evaluate(config: CaptionVLM) -> None:
    """Score the captioner on ``data.validation``; writes ``scores.json``, ``confusion.html`` and ``worst.html``."""
    data = load_training(config, PICTURES)
    rows = data.validation
    if len(rows) < 2:
        raise ConfigError(f"data.validation={rows.path} has one row.", "The baselines need two or more.")
    captioner = load_captioner(config.model, config.captioner)
    session = start("caption_vlm", config, replace(config.train, process_timeout=PATIENCE))
    try:
        indices = list(range(len(rows)))
        captions = caption_rows(captioner, rows, indices, session.accelerator)
        free = caption_rows(captioner.unconstrained(), rows, indices, session.accelerator)
        if session.run:
            write_scores(session, rows, captions, free, data.rows.texts, config.run.seed)
    finally:
        session.finish()


@dataclass(frozen=True)
class Scored:
    """The captions of one kind that have no error, with the truth and the category of product of their samples.

    indices: their rows. errors: counts of the others' errors.
    """

    indices: list[int]
    captions: list[Caption]
    truths: list[Scene]
    products: list[str]
    errors: dict[str, int]

    @classmethod
    def select(cls, captions: Sequence[Caption], samples: Sequence[Sample]) -> Scored:
        """captions, samples: of all rows."""
        kept, errors = without_errors(captions)
        chosen = pick(samples, kept)
        return cls(kept, pick(captions, kept), column(chosen, "scene"), list(map(category, chosen)), errors)


def write_scores(
    session: Session, rows: Rows, captions: list[Caption], free: list[Caption], known: list[str], seed: int
) -> None:
    """``scores.json``, the pages, and the figures on screen and tracker.

    captions, free: written with the configured constraint and without. known: the training captions.
    """
    samples = [rows.read(index, ()) for index in range(len(rows))]
    scored = Scored.select(captions, samples)
    scored_free = Scored.select(free, samples)
    compared = with_baselines(scored.captions, scored.truths, constant_caption(known), seed)
    unconstrained = measure(scored_free.captions, scored_free.truths)
    references = list(map(Scene.render, scored.truths))
    similarity = cider([caption.text for caption in scored.captions], references, known)
    confusions = confusion(scored.captions, scored.truths)
    scores = {
        "samples": len(rows),
        "data": rows.path,
        "manifest_sha256": rows.fingerprint(),
        "captioner": {
            **compared["captioner"],
            "leakage": leakage(scored.captions, scored.products),
            "cider": similarity,
        },
        "baselines": compared["baselines"],
        "unconstrained": {**unconstrained, "leakage": leakage(scored_free.captions, scored_free.products)},
        "errors": {"captioner": scored.errors, "unconstrained": scored_free.errors},
        "confusion": confusions,
    }
    with replacing_file(session.path / "scores.json") as file:
        file.write_text(json.dumps(scores, indent=2) + "\n")
    confusion_page(session.path / "confusion.html", confusions, len(scored.captions))
    worst_captions(session.path / "worst.html", rows, scored)
    report_errors("captioner", scored.errors)
    report_errors("unconstrained", scored_free.errors)
    tables: dict[str, Figures] = {"captioner": compared["captioner"], "unconstrained": unconstrained}
    tables |= compared["baselines"]  # type: ignore[typeddict-item]
    session.report(0, {**figures(tables), "captioner/cider": similarity})


def worst_captions(file: Path, rows: Rows, scored: Scored) -> None:
    """The page of the ``WORST`` captions, the worst first."""
    found = list(zip(scored.indices, scored.captions, scored.truths, strict=True))
    articles: list[str] = []
    for index, caption, truth in sorted(found, key=lambda one: soft_f1(one[1].text, one[2]))[:WORST]:
        articles.append(article(rows[index]["image"], rows.ids[index][:16], caption, truth))
    worst_page(file, articles)


def category(sample: Sample) -> str:
    """The kind of product of a sample: its column ``category``, or the start of its product's id."""
    name = sample.get("category") or str(sample.get("product_id") or "").split(".")[0]
    return name if name and not re.search(r"\d", name) else "other"


def report_errors(name: str, errors: dict[str, int]) -> None:
    """Log the pictures without a caption."""
    for error, count in errors.items():
        log.warning("%s: %d pictures have no caption and are not scored (%s)", name, count, error)


def figures(tables: dict[str, Figures]) -> dict[str, float]:
    """The figures of every set of captions for the tracker; the main ones are printed."""
    found: dict[str, float] = {}
    for name, table in tables.items():
        found[f"{name}/soft_f1"] = table["mean"]["soft"]
        found[f"{name}/exact"] = table["mean"]["exact"]
        for rate in ("parse_rate", "leakage_rate", "truncated_rate"):
            found[f"{name}/{rate}"] = table[rate]
        answer.info(
            "%-17s soft F1 %.3f  exact %.3f  in the grammar %.3f  naming the product %.3f",
            name, table["mean"]["soft"], table["mean"]["exact"], table["parse_rate"], table["leakage_rate"],
        )  # fmt: skip
    return found

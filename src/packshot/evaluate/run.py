"""evaluate.py: compares generate.py runs with each other, or anybody's pictures with the truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from packshot.config.mask_models import reads_onnx
from packshot.config.schema import Evaluate, Generate, SceneConfig, Suite, TrackerKind, TrackingConfig
from packshot.evaluate.adherence import adherence, prompts_of
from packshot.evaluate.preservation import preservation, segmenter
from packshot.evaluate.report import write_report
from packshot.evaluate.samples import (
    HARD_PASTE,
    NOISE_FLOOR,
    FinishedRun,
    Json,
    load_sample,
    open_runs,
    picture_and_matte,
    without_nan,
)
from packshot.evaluate.trial import evaluate_items
from packshot.generate.run import generate
from packshot.imaging.outline import EXTENSION_TOLERANCE
from packshot.lists import by_name, map_values
from packshot.runs.files import replacing_file
from packshot.runs.folder import Run, answer, log, open_run, start_log
from packshot.runs.progress import progress
from packshot.runs.tracking import open_tracker

DEFINITIONS = {
    "core_max_abs_diff": "Largest RGB difference to the photo on the core (matte 255, eroded by 1 px); 0 is identity.",
    "core_identical_share": "Share of core pixels that equal the photo byte for byte; the lowest picture counts.",
    "edge_halo_p50": "Median CIEDE2000 on the soft edge (0 < alpha < 1) of a synthetic photo whose true composite is "
    "known, with the right alpha; lower is better.",
    "edge_halo_p95": "95th percentile of the same.",
    "extension": "E_obj: area of the object found outside the dilated keep mask, relative to the product's area.",
    "loss": "L_obj: product area, less a rim, where no object is found, relative to the product's area; "
    "GrabCut is seeded with the inner part, so it can only find losses near the outline.",
    "expansion": "Published formula, unsigned: area(object ∪ keep mask) - area(keep mask), as a share of the picture.",
    "iou": "Overlap of the object found and the keep mask, as a share of their union; 1 is the product as it is.",
    "extended": f"Extension rate: share of pictures whose E_obj exceeds its noise floor by {EXTENSION_TOLERANCE:g}.",
}
# What is drawn when no runs are named.
BASE = "base"
BASE_PRODUCTS = "data/products"
BASE_SCENE = SceneConfig(
    surface="a white marble table", background="a pink wall", lighting="soft light from the left side"
)
# How a measure is combined over pictures; the others by their mean. For identity the worst picture counts.
COMBINE: dict[str, Callable[[list[float]], float]] = {"core_max_abs_diff": max, "core_identical_share": min}


def evaluate(config: Evaluate) -> None:
    """Write ``report.json`` and ``report.html``. Without ``runs``, the base draws the shipped products first.

    With ``items``, ``runs`` are pictures of any system (see :func:`packshot.evaluate.trial.evaluate_items`).

    Raises:
        ConfigError: generate.py did not write a folder in ``runs``.
        PackshotError: a file of a run is missing or damaged.
    """
    if config.items:
        for line in evaluate_items(config):
            answer.info("%s", line)
        return
    runs = open_runs(config.runs) if config.runs else []
    run = open_run("evaluate", config)
    runs = runs or open_runs([draw_base(config, run)])
    tracker = open_tracker(run, config, "evaluate")
    report: Json = {"runs": map_values(lambda finished: str(finished.path), by_name(runs)), "definitions": DEFINITIONS}
    if config.suite in (Suite.full, Suite.preservation):
        report["preservation"] = score_preservation(config, runs, run.path)
    if config.suite in (Suite.full, Suite.scene):
        report["scene"] = {}
        for finished in runs:
            read = partial(picture_and_matte, finished)
            report["scene"][finished.name] = adherence(prompts_of(finished), read, config.model, config.captioner)
    with replacing_file(run.path / "report.json") as file:
        file.write_text(json.dumps(without_nan(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(run.path, report, runs)
    figures = flat_figures(report)
    run.metrics({"step": 0, **without_nan(figures)})
    tracker.log({key: value for key, value in figures.items() if math.isfinite(value)}, 0)
    tracker.finish()
    answer.info("report: %s", run.path / "report.html")


def draw_base(config: Evaluate, run: Run) -> str:
    """Draw the shipped products with the base alone, into ``base`` of the run folder; returns that folder.

    A first adapter is compared with these pictures, and they need nothing that is not shipped.
    """
    folder = run.path / BASE
    log.info("runs is empty: the base draws the shipped products; 'runs=[<folder>]' scores pictures of your own")
    request = Generate(
        run=replace(config.run, dir=str(folder)),
        model=config.model,
        matte=config.matte,
        tracking=TrackingConfig(kind=TrackerKind.none),
        product=BASE_PRODUCTS,
        scene=BASE_SCENE,
        num_images=1,
        num_inference_steps=15,
    )
    generate(request)
    start_log(run.path / "log.txt")  # generate() has moved the log to its own folder
    return str(folder)


def score_preservation(config: Evaluate, runs: list[FinishedRun], folder: Path) -> Json:
    """Tables per system, with the raw decodes and the noise floor apart.

    The hard paste and the noise floor are made from the layers of the first run.
    """
    segment = segmenter(config.matte)
    pictures: dict[str, dict[str, dict[str, float]]] = {}
    for finished in runs:
        with progress(f"pictures of {finished.name}", total=len(finished.certificates)) as advance:
            for stem in finished.certificates:
                measured = preservation(load_sample(finished, stem), segment)
                rows = {finished.name: measured.ours, f"{finished.name}, raw decode": measured.raw}
                if finished is runs[0]:
                    rows |= {HARD_PASTE: measured.hard_paste, NOISE_FLOOR: measured.noise_floor}
                    Image.fromarray(measured.hard_paste_HW3).save(folder / f"hard-paste-{stem}.png")
                for system, row in rows.items():
                    pictures.setdefault(system, {})[stem] = row
                advance()
    return {
        "segmenter": config.matte.model if reads_onnx(config.matte.model) else "GrabCut seeded by the keep mask",
        "systems": map_values(lambda rows: summary(list(rows.values())), pictures),
        "pictures": pictures,
    }


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """One number per measure over pictures; pictures for which it is undefined are left out."""
    defined: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            values = defined.setdefault(key, [])
            if math.isfinite(value):
                values.append(value)
    result: dict[str, float] = {}
    for key, values in defined.items():
        combine = COMBINE.get(key, np.mean)
        result[key] = float(combine(values)) if values else math.nan
    return result


def flat_figures(report: Json) -> dict[str, float]:
    """The tables as ``{"preservation/<system>/<measure>": number, "scene/<run>/<slot>": number}``."""
    figures: dict[str, float] = {}
    for system, row in report.get("preservation", {}).get("systems", {}).items():
        for key, value in row.items():
            figures[f"preservation/{system}/{key}"] = value
    for name, scored in report.get("scene", {}).items():
        for slot, value in scored.get("scores", {}).items():
            figures[f"scene/{name}/{slot}"] = value
    return figures

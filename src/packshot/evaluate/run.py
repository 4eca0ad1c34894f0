"""evaluate.py: one or two generate.py runs, and the hard paste of the same layers, side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.config.schema import Evaluate, Generate, SceneConfig, Suite, TrackerKind, TrackingConfig
from packshot.evaluate.adherence import adherence
from packshot.evaluate.preservation import preservation, segmenter
from packshot.evaluate.report import write_report
from packshot.evaluate.samples import HARD_PASTE, NOISE_FLOOR, RunFolder, load_sample, open_runs
from packshot.generate.run import generate
from packshot.imaging.outline import EXTENSION_TOLERANCE
from packshot.runs.files import replacing_file
from packshot.runs.folder import Run, log, open_run, start_log
from packshot.runs.progress import progress
from packshot.runs.tracking import open_tracker

DEFINITIONS = {
    "core_max_abs_diff": "Largest RGB difference to the photo on the core (matte 255, eroded by 1 px); 0 is identity.",
    "core_identical_share": "Share of core pixels that equal the photo byte for byte; the lowest picture counts.",
    "edge_halo_p50": "Median CIEDE2000 on the soft edge (0 < alpha < 1) of a made-up photo whose true composite is "
    "known, the right alpha given; lower is better.",
    "edge_halo_p95": "95th percentile of the same.",
    "extension": "E_obj: area of the object found outside the dilated keep mask, relative to the product's area.",
    "loss": "L_obj: product area, less a rim, where no object is found, relative to the product's area; "
    "GrabCut is told the inner part, so with it only losses near the outline can show.",
    "expansion": "Published formula, unsigned: area(object ∪ keep mask) - area(keep mask), as a share of the picture.",
    "iou": "Overlap of the object found and the keep mask, as a share of their union; 1 is the product as it is.",
    "extended": f"Extension rate: share of pictures whose E_obj exceeds its noise floor by {EXTENSION_TOLERANCE:g}.",
}
# What is drawn when no runs are named.
BASE, BASE_PRODUCTS = "base", "data/products"
BASE_SCENE = SceneConfig(
    surface="a white marble table", background="a pink wall", lighting="soft light from the left side"
)
# The worst picture counts for identity, the mean for everything else.
_WORST: dict[str, Callable[[list[float]], float]] = {"core_max_abs_diff": max, "core_identical_share": min}


def evaluate(config: Evaluate) -> None:
    """Write ``report.json`` and ``report.html``. Without ``runs``, the base's pictures of the shipped products count.

    Raises:
        ConfigError: a folder in ``runs`` is none that generate.py wrote.
        PackshotError: a file of a run is missing or damaged.
    """
    runs = open_runs(config.runs) if config.runs else []
    run = open_run("evaluate", config)
    runs = runs or open_runs([draw_base(config, run)])
    tracker = open_tracker(run, config, "evaluate")
    report: dict[str, Any] = {"runs": {r.name: str(r.path) for r in runs}, "definitions": DEFINITIONS}
    if config.suite in (Suite.full, Suite.preservation):
        report["preservation"] = score_preservation(config, runs, run.path)
    if config.suite in (Suite.full, Suite.scene):
        report["scene"] = {r.name: adherence(r, config.model, config.captioner) for r in runs}
    with replacing_file(run.path / "report.json") as file:
        file.write_text(json.dumps(without_nan(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(run.path, report, runs)
    figures = flat_figures(report)
    run.metrics({"step": 0, **without_nan(figures)})
    tracker.log({key: value for key, value in figures.items() if math.isfinite(value)}, 0)
    tracker.finish()
    log.info("report: %s", run.path / "report.html")


def draw_base(config: Evaluate, run: Run) -> str:
    """Draw the shipped products by the base alone, into ``base`` of the run folder; returns that folder.

    It is what a first run has to be compared with, and needs nothing that is not shipped.
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
    start_log(run.path / "log.txt")  # the drawing kept a log of its own
    return str(folder)


def score_preservation(config: Evaluate, runs: list[RunFolder], folder: Path) -> dict[str, Any]:
    """Tables per system, with the raw decodes and the noise floor apart. The hard paste is made of the first run."""
    segment = segmenter(config.matte)
    pictures: dict[str, dict[str, dict[str, float]]] = {}
    with progress("pictures", total=sum(len(r.certificates) for r in runs)) as advance:
        for number, source in enumerate(runs):
            for stem in source.certificates:
                sample = load_sample(source, stem)
                measured = preservation(sample, segment)
                pictures.setdefault(source.name, {})[stem] = measured["ours"]
                pictures.setdefault(f"{source.name}, raw decode", {})[stem] = measured["raw"]
                if number == 0:
                    pictures.setdefault(HARD_PASTE, {})[stem] = measured["hard_paste"]
                    pictures.setdefault(NOISE_FLOOR, {})[stem] = measured["noise_floor"]
                    Image.fromarray(measured["hard_paste_picture"]).save(folder / f"hard-paste-{stem}.png")
                advance()
    return {
        "segmenter": config.matte.onnx or "GrabCut seeded by the keep mask",
        "systems": {name: summary(list(rows.values())) for name, rows in pictures.items()},
        "pictures": pictures,
    }


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """One number per measure over pictures; pictures where it is undefined are left out."""
    result = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row and math.isfinite(row[key])]
        result[key] = float(_WORST.get(key, np.mean)(values)) if values else float("nan")
    return result


def without_nan(value: Any) -> Any:
    """JSON knows no NaN: an undefined number becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flat_figures(report: dict[str, Any]) -> dict[str, float]:
    """The tables as ``{"preservation/<system>/<measure>": number, "scene/<run>/<slot>": number}``."""
    figures = {}
    for system, row in report.get("preservation", {}).get("systems", {}).items():
        figures |= {f"preservation/{system}/{key}": value for key, value in row.items()}
    for name, scored in report.get("scene", {}).items():
        figures |= {f"scene/{name}/{slot}": value for slot, value in scored.get("scores", {}).items()}
    return figures

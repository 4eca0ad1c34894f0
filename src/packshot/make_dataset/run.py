"""``build_data.py``: from a source to a dataset in the run folder."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from packshot.config.schema import BuildData, BuildTask
from packshot.errors import PackshotError
from packshot.lists import map_values
from packshot.make_dataset.kinds import RECIPES, Recipe
from packshot.make_dataset.output import reason_counts, rejected_rows, write_extras
from packshot.make_dataset.report import write_report
from packshot.make_dataset.review import review_masks
from packshot.pipeline import run_steps
from packshot.pipeline.shards import split
from packshot.runs.folder import answer, default_dir, log, open_run
from packshot.runs.licenses import refuse_weights
from packshot.runs.tracking import open_tracker


def build(config: BuildData) -> None:
    """Do ``config.task``: build ``config.dataset`` from ``config.source`` into the run folder, or review its masks.

    A build resumes to the same bytes.

    Raises:
        ConfigError: nothing to build from, an unusable model, or a run folder or render.folder in use.
        PackshotError: not one image was accepted, or a worker died.
    """
    if config.task is BuildTask.review_masks:
        review_masks(config)
        return
    recipe = RECIPES[config.dataset]
    with recipe.hold(config):
        build_held(config, recipe)


def build_held(config: BuildData, recipe: Recipe) -> None:
    """:func:`build` once shared folders are held."""
    refuse_weights(config)
    recipe.refuse(config)
    folder = Path(config.run.dir or default_dir("build_data"))
    config = replace(config, run=replace(config.run, dir=str(folder)))
    downloads = Path(config.source.downloads or folder / "downloads")
    items, notes = recipe.items(config, str(downloads.absolute()))
    run = open_run("build_data", config)
    for note in notes:
        log.info(note)
    steps = recipe.steps(config, run.path, items)
    tracker = open_tracker(run, config, "build_data")
    started = time.monotonic()
    shards = split(items, config.shard_size)
    note_idle_workers(config, len(shards))
    report = run_steps(run.path, shards, recipe.fingerprints, steps, config.executor)
    recipe.finish(config, run.path)
    figures = write_extras(report, steps, config.dataset.name, recipe.settings(config), recipe.sheet, len(items))
    page = write_report(report, config.dataset.name, rejected_rows(report, steps), items)
    if report.worked:
        line = {"step": 0, **figures, "seconds": round(time.monotonic() - started, 1)}
        run.metrics(line)
        tracker.log(map_values(float, line), 0)
    else:
        log.info("everything was done already")
    for note in [*recipe.notes(config, report), *reason_counts(report, steps, config)]:
        answer.info(note)
    answer.info("look at %s", page)
    answer.info(
        "%(accepted)d of %(images)d images accepted, %(needs_review)d kept that need review, %(rejected)d rejected",
        figures,
    )
    sheet = run.path / "contact_sheet.png"
    if sheet.exists():
        tracker.images("contact_sheet", [sheet], ["first images"], 0)
    tracker.finish()
    if figures["rejected"] == figures["images"]:
        raise PackshotError(
            f"None of the {len(items)} images {recipe.what(config)} was accepted.",
            f"{run.path / 'rejected.parquet'} names the reason for each.",
        )


def note_idle_workers(config: BuildData, shards: int) -> None:
    """Log that there are fewer shards than workers."""
    if shards < config.executor.workers:
        log.info(
            "shard_size=%d makes %d shards: no more of executor.workers=%d have work",
            config.shard_size,
            shards,
            config.executor.workers,
        )

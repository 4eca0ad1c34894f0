"""evaluate.py items=...: anybody's pictures, measured against photograph, mask and, where it is known, the truth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from PIL import Image

from packshot.config.schema import Evaluate, Suite
from packshot.evaluate.adherence import adherence, names_a_slot, slot_means
from packshot.evaluate.features import Embed
from packshot.evaluate.intervals import Comparison, Estimate, compare, estimate, finite
from packshot.evaluate.items import Item, by_ids, open_items
from packshot.evaluate.measures import MEASURES, floor_of, measure_all, open_trial
from packshot.evaluate.preservation import segmenter
from packshot.evaluate.results import System, open_systems
from packshot.evaluate.samples import Json, without_nan
from packshot.evaluate.sets import DEFINITIONS, Seen, distances, embeddings, item_measures, mean_or_nan, wanted_pictures
from packshot.evaluate.trial_report import write_trial_report
from packshot.imaging.outline import Segment
from packshot.lists import map_values
from packshot.runs.files import readable, replacing_file
from packshot.runs.folder import log, open_run
from packshot.runs.progress import progress
from packshot.runs.tracking import open_tracker
from packshot.scene import Scene

LARGER_IS_BETTER = ("diversity", "reference_choice", "clip_text", "product_similarity", "slot_adherence")
ADHERENCE = "Soft agreement of a captioner's words with the slots that were asked for, 0 to 1, by the named captioner."


@dataclass
class Scored:
    """One system's figures. by_item: measure, then item; by_set: measures of the whole set."""

    system: System
    by_item: dict[str, dict[str, float]]
    by_set: dict[str, float]
    scene: Json

    def estimates(self) -> dict[str, Estimate]:
        """Mean and interval of every measure that is defined for an item."""
        found = {}
        for name, values in self.by_item.items():
            known = estimate(values)
            if known:
                found[name] = known
        return found


def evaluate_items(config: Evaluate) -> list[str]:
    """Write ``report.json`` and ``report.html`` for the systems in ``runs``; returns what they state, in lines.

    Raises:
        ConfigError: items or runs cannot be read.
        PackshotError: a picture is damaged.
    """
    place = readable("items", config.items or "")
    run = open_run("evaluate", config)
    items = open_items(place, run.path / "items")
    systems = open_systems(config.runs, items)
    tracker = open_tracker(run, config, "evaluate")
    segment = segmenter(config.matte)
    embeds = embeddings(config.model, config.scores) if config.suite is not Suite.preservation else {}
    floors = {item.id: floor_of(item, segment) for item in items} if config.suite is not Suite.scene else {}
    scored = []
    for system in systems:
        scored.append(score_system(config, system, items, segment, floors, embeds))
    report = report_of(config, items, scored)
    with replacing_file(run.path / "report.json") as file:
        file.write_text(json.dumps(without_nan(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_trial_report(run.path, report, items, systems)
    figures = flat(scored)
    run.metrics({"step": 0, **without_nan(figures)})
    tracker.log(finite(figures), 0)
    tracker.finish()
    lines = []
    for one in scored:
        means = {name: round(known.mean, 4) for name, known in one.estimates().items() if name in MEASURES}
        lines.append(f"{one.system.name}, {len(one.system.pictures)} items: {means}")
    return [*lines, f"report: {run.path / 'report.html'}"]


def score_system(
    config: Evaluate,
    system: System,
    items: list[Item],
    segment: Segment,
    floors: Mapping[str, float],
    embeds: Mapping[str, Embed],
) -> Scored:
    """Measure all pictures of one system. floors: by item; empty where the product is not measured."""
    by_id = by_ids(items)
    measured: dict[str, dict[str, list[float]]] = {}
    seen: list[Seen] = []
    empty: list[str] = []
    with progress(f"pictures of {system.name}", total=sum(map(len, system.pictures.values()))) as advance:
        for name in sorted(system.pictures):
            for picture in system.pictures[name]:
                trial = open_trial(by_id[name], picture, segment, floors.get(name, 0.0))
                seen.append(Seen(trial.item, picture, trial.picture_HW3, trial.matte_HW))
                if not trial.core_HW.any():
                    empty.append(picture.file.name)
                for measure, value in (measure_all(trial) if floors else {}).items():
                    measured.setdefault(measure, {}).setdefault(name, []).append(value)
                advance()
    if empty:
        log.warning(
            "%s: %d pictures have no pixel of the product's core, such as %s, so most measures leave them out; compare "
            "their size and their box with the photographs",
            system.path,
            len(empty),
            empty[0],
        )
    by_item = {}
    for measure, values in measured.items():
        by_item[measure] = map_values(mean_or_nan, values)
    scored = Scored(system, by_item, {}, {})
    if config.suite is not Suite.preservation:
        scored.by_item |= item_measures(seen, embeds, config.scores)
        scored.by_set = distances(seen, wanted_pictures(items), embeds)
        score_scene(config, scored, seen)
    return scored


def score_scene(config: Evaluate, scored: Scored, seen: list[Seen]) -> None:
    """Enter what a captioner reads in the pictures: slot scores of the set, and their mean by item."""
    shown = dict(zip(map(str, range(len(seen))), seen, strict=True))

    def read(name: str) -> tuple[Image.Image, Image.Image]:
        return Image.fromarray(shown[name].image_HW3), Image.fromarray(shown[name].matte_HW)

    prompts = {}
    for name, one in shown.items():
        prompts[name] = one.item.text
    scored.scene = adherence(prompts, read, config.model, config.captioner)
    values: dict[str, list[float]] = {}
    for name, text in scored.scene.get("captions", {}).items():
        asked = Scene.parse(prompts[name]).scene
        if names_a_slot(asked):
            mean = slot_means([Scene.parse(text).scene], [asked])["mean"]
            values.setdefault(shown[name].item.id, []).append(mean)
    if values:
        scored.by_item["slot_adherence"] = map_values(mean_or_nan, values)


def is_lower_better(measure: str) -> bool | None:
    """The direction of a measure, of one picture or of a set; None where it has none."""
    if measure in MEASURES:
        return MEASURES[measure].lower_is_better
    return not measure.startswith(LARGER_IS_BETTER)


def definition(measure: str) -> str:
    """What a measure's name means."""
    if measure in MEASURES:
        return MEASURES[measure].about
    return DEFINITIONS.get(measure.partition(",")[0], ADHERENCE)


def report_of(config: Evaluate, items: list[Item], scored: list[Scored]) -> Json:
    """The content of report.json."""
    systems: Json = {}
    for one in scored:
        systems[one.system.name] = {
            "path": str(one.system.path),
            "pictures": sum(map(len, one.system.pictures.values())),
            "missing": [item.id for item in items if item.id not in one.system.pictures],
            "measures": map_values(asdict, one.estimates()),
            "set": one.by_set,
            "scene": one.scene,
            "by_item": one.by_item,
        }
    measures: dict[str, None] = {}
    for one in scored:
        measures |= dict.fromkeys([*one.by_item, *one.by_set])
    return {
        "items": {"path": config.items, "count": len(items)},
        "segmenter": config.matte.model,
        "captioner": config.captioner.adapter or config.captioner.kind.name,
        "definitions": dict(zip(measures, map(definition, measures), strict=True)),
        "lower_is_better": dict(zip(measures, map(is_lower_better, measures), strict=True)),
        "systems": systems,
        "comparisons": comparisons(scored),
    }


def comparisons(scored: list[Scored]) -> Json:
    """The first system against each other one, by measure."""
    found: Json = {}
    for other in scored[1:]:
        rows: dict[str, Comparison] = {}
        for measure, values in scored[0].by_item.items():
            direction = is_lower_better(measure)
            if direction is None:
                continue
            compared = compare(values, other.by_item.get(measure, {}), direction)
            if compared:
                rows[measure] = compared
        found[f"{scored[0].system.name} against {other.system.name}"] = map_values(asdict, rows)
    return found


def flat(scored: list[Scored]) -> dict[str, float]:
    """``{"<system>/<measure>": number}`` for metrics and trackers."""
    figures = {}
    for one in scored:
        for name, known in one.estimates().items():
            figures[f"{one.system.name}/{name}"] = known.mean
        for name, value in one.by_set.items():
            figures[f"{one.system.name}/{name}"] = value
    return figures

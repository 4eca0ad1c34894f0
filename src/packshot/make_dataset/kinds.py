"""The kinds of datasets: a row each with what they are built from, by which steps, and what the card shows."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePath

import pyarrow.parquet as pq

from packshot.config.compose import to_plain
from packshot.config.schema import BuildData, CaptionerKind, DatasetKind
from packshot.imaging.mask_networks import load_network
from packshot.imaging.onnx import load_session
from packshot.lists import column, select
from packshot.make_dataset import curation, sources, steps
from packshot.pipeline import Report, Step
from packshot.pipeline.shards import read_outcomes
from packshot.pipeline.step import Outcome, Sample
from packshot.render import blender_pool

# Paths, of which a card that is published names the last part only: the rest is the layout of a disk or a bucket.
_PLACES = (
    ("source", "path"), ("source", "masks"), ("matte", "model"), ("depth", "onnx"),
    ("captioner", "adapter"), ("curation", "encoder"), ("curation", "detector"),
)  # fmt: skip
# Keys of the source that decide how it is reached.
_NOT_SHAPING = ("downloads", "download_seconds", "download_mib", "download_retries")
_PHOTO_SETTINGS = (
    "dataset",
    "source",
    "captions",
    "data",
    "matte",
    "depth",
    "quality",
    "curation",
    "captioner",
    "shard_size",
)
_COLUMNS = ("text", "id", "scene", "source", "license", "width", "height")


@dataclass(frozen=True)
class Recipe:
    """How one kind of dataset is made.

    what: the pictures, for messages. sheet: how many of the first pictures the contact sheet shows.
    refuse: raises ConfigError for models that cannot be used, here and not in a worker.
    items: what there is to build from, and lines for the screen; ``cache`` is a folder for downloads.
    fingerprints: digests of the contents behind items.
    steps: in their order; the last one writes the rows.
    settings: what the card states about how the set was made: all that shaped it, but no places.
    notes: lines for the screen about what was built.
    hold: keeps other builds from shared folders. finish: removes what the set holds now.
    """

    what: Callable[[BuildData], str]
    sheet: int
    refuse: Callable[[BuildData], None]
    items: Callable[[BuildData, str], tuple[list[Sample], list[str]]]
    fingerprints: Callable[[Sequence[Sample]], list[str]]
    steps: Callable[[BuildData, Path, Sequence[Sample]], list[Step]]
    settings: Callable[[BuildData], dict[str, object]]
    notes: Callable[[BuildData, Report], list[str]] = lambda config, report: []
    hold: Callable[[BuildData], AbstractContextManager[object]] = lambda config: nullcontext()
    finish: Callable[[BuildData, Path], None] = lambda config, folder: None


def photo_steps(config: BuildData, folder: Path, items: Sequence[Sample], masked: bool) -> list[Step]:
    """From photographs to rows. masked: the product is found in each. items: of the source."""
    made = [steps.ingest_step(config), steps.naming_step(config), steps.dedup_step(config)]
    made += curation.curation_steps(config)
    pictures = ["image"]
    measures = curation.curation_columns(config)
    added = ["caption_origin", *measures]
    if masked:
        made.append(steps.mask_step(config))
        pictures.append("mask")
        added += ["status", "reasons", "mask_confidence"]
        if config.depth.onnx:
            made.append(steps.depth_step(config))
            pictures.append("depth")
    if config.captioner.kind is not CaptionerKind.none:
        made.append(steps.caption_step(config, masked))
    if any(item.get("repeats", 1) > 1 for item in items):
        added.append("repeats")
    if any(has_several_captions(item) for item in items):
        added.append("captions")
    columns = (*pictures, *_COLUMNS, *added)
    settings = {"dataset": config.dataset.name, "columns": list(columns)}
    return [*made, steps.final_step(columns, partial(steps.finish, columns=columns), settings, measures)]


def has_several_captions(item: Sample) -> bool:
    """Whether an item of the source may have several captions."""
    described = item.get("described") or {}
    return bool(item.get("several") or item.get("captions") or described.get("captions"))


def photo_items(config: BuildData, cache: str) -> tuple[list[Sample], list[str]]:
    """The pictures of the source."""
    return sources.list_items(config.source, cache)


def photo_settings(config: BuildData) -> dict[str, object]:
    """The groups that shape photographs into rows."""
    plain = to_plain(config)
    for group, key in _PLACES:
        if plain[group][key]:
            plain[group][key] = PurePath(plain[group][key]).name
    del plain["captioner"]["endpoint"]  # an address inside somebody's network, at times with a key in it
    for key in _NOT_SHAPING:
        del plain["source"][key]
    names = (*_PHOTO_SETTINGS, "licenses") if config.licenses.commercial else _PHOTO_SETTINGS
    return select(plain, names)


def naming_notes(config: BuildData, report: Report) -> list[str]:
    """How many captions of the source name a product, and the key that decides what becomes of them."""
    named = captioned = 0
    for file in report.files("naming"):
        named += sum(map(bool, column(read_outcomes(file, ["naming"]), "naming")))
    for file in report.files("ingest"):
        captioned += sum(map(bool, column(read_outcomes(file, ["text"]), "text")))
    policy = config.captions.product
    return [f"{named} of {captioned} captions name a product (captions.product={policy}; keep, report or reject)"]


def caption_notes(config: BuildData, report: Report) -> list[str]:
    """Who wrote the captions of the set, and the key that decides what becomes of those of the source."""
    if config.captioner.kind is CaptionerKind.none:
        return []
    origins: Counter[str] = Counter()
    for file in report.files("part"):
        origins.update(pq.read_table(file, columns=["caption_origin"])[0].to_pylist())
    counts = ", ".join(f"{count} {origin or 'none'}" for origin, count in origins.most_common())
    kept = "replaces those of the source" if config.captioner.overwrite else "keeps those of the source"
    return [f"captions by origin: {counts} (captioner.overwrite={str(config.captioner.overwrite).lower()} {kept})"]


def photo_notes(config: BuildData, report: Report) -> list[str]:
    """What the screen says of the captions."""
    return [*naming_notes(config, report), *caption_notes(config, report)]


def mask_notes(config: BuildData, report: Report) -> list[str]:
    """How many pictures have no product that could be found, and what to do where none is meant."""
    rows = column(chain.from_iterable(read_outcomes(file, []) for file in report.files("mask")), "reason")
    lost = rows.count("no_product")
    if not lost:
        return []
    return [
        f"no product was found in {lost} of {len(rows)} images (matte.min_confidence={config.matte.min_confidence:g}); "
        "for a set of styles or scenes set dataset=background"
    ]


def product_notes(config: BuildData, report: Report) -> list[str]:
    """What the screen says of captions and masks."""
    return [*photo_notes(config, report), *mask_notes(config, report)]


def refuse_networks(config: BuildData) -> None:
    """Load what finds products, depth and pictures to leave out once."""
    curation.refuse_models(config)
    load_network(config.matte.model)
    if config.depth.onnx:
        load_session("depth.onnx", config.depth.onnx)


def refuse_blender(config: BuildData) -> None:
    """Look for Blender's environment."""
    blender_pool.blender_python(config.render.environment)


def copy_rows(samples: list[Sample]) -> list[Outcome]:
    """Rendered rows are finished."""
    return list(map(Outcome, samples))


def render_steps(config: BuildData, folder: Path, items: Sequence[Sample]) -> list[Step]:
    """From render jobs to rows."""
    render = blender_pool.render_step(blender_pool.open_farm(config, folder))
    return [render, steps.final_step(render.schema.names, copy_rows, {"dataset": "rendered"})]


def render_settings(config: BuildData) -> dict[str, object]:
    """The renderer's keys without its places."""
    render = to_plain(config)["render"]
    del render["folder"], render["environment"]
    return {"dataset": "rendered", "seed": config.run.seed, "render": render, "shard_size": config.shard_size}


def hold_scenes(config: BuildData) -> AbstractContextManager[object]:
    """One build at a time in a shared folder of scenes."""
    return blender_pool.sole_use(config.render.folder) if config.render.folder else nullcontext()


def drop_scenes(config: BuildData, folder: Path) -> None:
    """Scenes that are not shared are in the set now."""
    if not config.render.folder:
        shutil.rmtree(folder / "renders")


def source_name(config: BuildData) -> str:
    """The pictures of a set of photographs, for messages."""
    return f"of source.path={config.source.path}"


RECIPES: dict[DatasetKind, Recipe] = {
    DatasetKind.background: Recipe(
        source_name,
        24,
        curation.refuse_models,
        photo_items,
        sources.fingerprints,
        partial(photo_steps, masked=False),
        photo_settings,
        photo_notes,
    ),
    DatasetKind.product: Recipe(
        source_name,
        24,
        refuse_networks,
        photo_items,
        sources.fingerprints,
        partial(photo_steps, masked=True),
        photo_settings,
        product_notes,
    ),
    DatasetKind.rendered: Recipe(
        lambda config: "rendered",
        48,
        refuse_blender,
        lambda config, cache: (blender_pool.jobs(config), []),
        blender_pool.fingerprints,
        render_steps,
        render_settings,
        hold=hold_scenes,
        finish=drop_scenes,
    ),
}

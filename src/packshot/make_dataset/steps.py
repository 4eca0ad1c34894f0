"""From images to a dataset: the steps, their order, and what is written beside the shards."""

from __future__ import annotations

import dataclasses
import io
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from packshot.config.compose import to_plain
from packshot.config.schema import BuildData, DatasetKind, LicenseConfig, MatteConfig, QualityConfig
from packshot.errors import PackshotError
from packshot.imaging.decode import MAX_PIXELS, DecodeError, decode_image, flatten, open_up_to
from packshot.imaging.depth import estimate_depth
from packshot.imaging.masks import ONNX_LEVELS, MaskFileError, NoProductError, find_mask, load_segmentation
from packshot.imaging.onnx import load_session
from packshot.make_dataset import card as cards
from packshot.make_dataset.dedup import find_duplicates, perceptual_hash
from packshot.make_dataset.quality import check
from packshot.make_dataset.sources import Raw, fingerprint, list_items, mask_pattern, read_items
from packshot.pipeline import Outcome, Report, Step, run_steps
from packshot.pipeline.run import rejections
from packshot.pipeline.shards import split
from packshot.pipeline.step import Sample
from packshot.render import blender_pool, rows
from packshot.runs.files import file_sha256, folder_hash, readable, replacing_file, sha256
from packshot.runs.folder import log, open_run
from packshot.runs.licenses import allows, refuse_weights
from packshot.runs.tracking import open_tracker
from packshot.scene import Scene
from packshot.scene.scores import product_words

# Paths, of which a card that is published says the last name only: the rest is the layout of somebody's disk or bucket.
_PLACES = (
    ("source", "path"), ("source", "masks"), ("matte", "onnx"), ("matte", "network"), ("depth", "onnx"),
    ("captioner", "adapter"),
)  # fmt: skip
# The contact sheet: how many of the first images, and whether their masks stand beside them.
_SHEETS = {DatasetKind.background: (24, False), DatasetKind.product: (24, True), DatasetKind.rendered: (48, False)}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_BASE = ("image", "text", "id", "scene", "source", "license", "width", "height")
_COLUMNS = {DatasetKind.background: _BASE, DatasetKind.product: ("image", "mask", *_BASE[1:])}
_MEANING = {
    "image": "photograph; transparent ones over white",
    "mask": "white = product",
    "text": "caption of everything but the product; empty when there is none",
    "id": "SHA-256 of the source's bytes",
    "scene": "the caption's slots: surface, surroundings, background, lighting, mood, style",
    "source": "where the image came from, relative to the source",
    "license": "licence of the image",
    "width": "px",
    "height": "px",
    "plate": "the same scene without the product",
    "cutout": "the product alone, with alpha",
    "shadow": "what the product does to the light around it: plate x shadow carries its shadow; white = nothing",
    "depth": "inverse depth, near is bright; in rendered sets the product is at 0.5",
    "normals": "surface normals in camera space: x right, y up, z to the camera",
    "product_id": "design of the product",
}


def png(image: Image.Image) -> Sample:
    """An image as the ``image`` feature of ``datasets`` stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return {"bytes": buffer.getvalue(), "path": None}


def open_png(value: Sample) -> Image.Image:
    """Inverse of :func:`png`, of any size: what is too large was left out before."""
    return open_up_to(None, value["bytes"])


def without_product(text: str) -> Outcome:
    """The columns ``text`` for a caption; one that names the product is blanked, with a remark."""
    words = product_words(text)
    if words:
        return Outcome({"text": ""}, "caption_names_product", ", ".join(words))
    return Outcome({"text": text})


# --- steps ------------------------------------------------------------------------------------------------------------


def _ingest(samples: list[Sample], quality: QualityConfig, license: str, licenses: LicenseConfig) -> list[Outcome]:
    return [_ingest_one(raw, quality, raw.license or license, licenses) for raw in read_items(samples)]


def _ingest_one(raw: Raw, quality: QualityConfig, license: str, licenses: LicenseConfig) -> Outcome:
    known = {"id": sha256(raw.data) if raw.data is not None else "", "source": raw.name}
    if raw.data is None:
        return Outcome(known, "unreadable", raw.error, kept=False)
    if not allows(licenses, license):
        return Outcome(known, "license", license, kept=False)
    try:
        image = decode_image(raw.data, raw.name, quality.max_pixels)
    except DecodeError as error:
        return Outcome(known, error.reason, error.measure, kept=False)
    if problem := check(image, quality):
        return Outcome(known, *problem, kept=False)
    text = without_product(raw.text)
    columns = {
        **known,
        **text.columns,
        "image": png(image),
        "mask_file": raw.mask,
        "license": license,
        "width": image.width,
        "height": image.height,
        "phash": f"{perceptual_hash(flatten(image)):016x}",
    }
    return dataclasses.replace(text, columns=columns)


def _dedup(samples: list[Sample], max_distance: int) -> list[Outcome]:
    """Rejects what was there before: first equal bytes, then near-equal pictures. The measure is the earlier id."""
    if max_distance < 0:
        return [Outcome() for _ in samples]
    first: dict[str, int] = {}
    for position, sample in enumerate(samples):
        first.setdefault(sample["id"], position)
    unique = sorted(first.values())
    matches = find_duplicates([int(samples[position]["phash"], 16) for position in unique], max_distance)
    near = {position: unique[match] for position, match in zip(unique, matches, strict=True) if match is not None}

    def judge(position: int, sample: Sample) -> Outcome:
        if first[sample["id"]] != position:
            return Outcome({}, "duplicate", sample["id"], kept=False)
        if position in near:
            return Outcome({}, "near_duplicate", samples[near[position]]["id"], kept=False)
        return Outcome()

    return [judge(position, sample) for position, sample in enumerate(samples)]


def _mask(samples: list[Sample], matte: MatteConfig, from_files: bool) -> list[Outcome]:
    return [_mask_one(sample, matte, from_files) for sample in samples]


def _mask_one(sample: Sample, matte: MatteConfig, from_files: bool) -> Outcome:
    """from_files: masks are drawn by hand (``source.masks``), and none is guessed where one is missing."""
    if from_files and sample["mask_file"] is None:
        wanted = mask_pattern(sample["source"].partition("/")[2])
        return Outcome({}, "no_mask", f"source.masks has no {wanted}", kept=False)
    name, image = sample["source"], open_png(sample["image"])
    limit = max(MAX_PIXELS, image.width * image.height)  # a mask may be as large as its picture
    try:
        given = None
        if sample["mask_file"] is not None:
            given = decode_image(sample["mask_file"], f"the mask of {name}", limit)
        found = find_mask(image, matte, given, name)
    except NoProductError as error:
        return Outcome({}, "no_product", f"confidence {error.confidence:.2f}", kept=False)
    except (DecodeError, MaskFileError) as error:
        return Outcome({}, "bad_mask", str(error.args[0]), kept=False)
    return Outcome({"mask": png(found.to_image()), "mask_method": found.method, "mask_confidence": found.confidence})


def _depth(samples: list[Sample], onnx: str) -> list[Outcome]:
    return [Outcome({"depth": png(estimate_depth(flatten(open_png(sample["image"])), onnx))}) for sample in samples]


def _row(samples: list[Sample], columns: Sequence[str]) -> list[Outcome]:
    return [Outcome(_finished(sample, columns)) for sample in samples]


def _finished(sample: Sample, columns: Sequence[str]) -> Sample:
    image = open_png(sample["image"])
    # Over white: readers take RGB, and would show whatever colour lies hidden under alpha 0.
    flat = {"image": png(flatten(image))} if image.mode == "RGBA" else {}
    whole = {**sample, **flat, "scene": Scene.parse(sample["text"]).scene.to_dict()}
    return {name: whole[name] for name in columns}


def _final(columns: Sequence[str], function: Callable[[list[Sample]], list[Outcome]], config: dict[str, Any]) -> Step:
    from datasets import Features

    known = rows.features()
    schema = Features({name: known[name] for name in columns}).arrow_schema
    return Step("part", 1, config, schema, function, final=True)


def _photo_steps(config: BuildData, captions: Sequence[Step]) -> list[Step]:
    quality, licenses, product = config.quality, config.licenses, config.dataset is DatasetKind.product
    text = [(name, pa.string()) for name in ("id", "text", "source", "license", "phash")]
    base = pa.schema(
        [*text, ("image", _IMAGE), ("mask_file", pa.binary()), ("width", pa.int32()), ("height", pa.int32())]
    )
    checks = {key: value for key, value in dataclasses.asdict(quality).items() if key != "duplicate_distance"}
    steps = [
        Step(
            "ingest",
            1,
            {
                **checks,
                "license": config.source.license,
                **({"licenses": dataclasses.asdict(licenses)} if licenses.commercial else {}),
            },
            base,
            partial(_ingest, quality=quality, license=config.source.license, licenses=licenses),
        ),
        Step(
            "dedup",
            1,
            {"max_distance": quality.duplicate_distance},
            pa.schema([]),
            partial(_dedup, max_distance=quality.duplicate_distance),
            reads=("id", "phash"),
            whole=True,
        ),
    ]
    if product:
        columns = pa.schema([("mask", _IMAGE), ("mask_method", pa.string()), ("mask_confidence", pa.float32())])
        from_files = config.source.masks is not None
        settings = {**_network_identity(config.matte), "min_confidence": config.matte.min_confidence}
        settings |= {"from_files": True} if from_files else {}
        reads = ("image", "mask_file", "source")
        steps.append(
            Step("mask", 1, settings, columns, partial(_mask, matte=config.matte, from_files=from_files), reads=reads)
        )
    columns = _COLUMNS[config.dataset]
    if product and config.depth.onnx:
        settings = {"onnx": file_sha256(readable("depth.onnx", config.depth.onnx))}
        added = pa.schema([("depth", _IMAGE)])
        steps.append(Step("depth", 1, settings, added, partial(_depth, onnx=config.depth.onnx), reads=("image",)))
        columns = ("image", "mask", "depth", *_BASE[1:])
    last = _final(columns, partial(_row, columns=columns), {"dataset": config.dataset.name, "columns": list(columns)})
    return [*steps, *captions, last]


def _network_identity(matte: MatteConfig) -> dict[str, Any]:
    """What finds products, by its digest: another network makes other masks."""
    if matte.onnx:
        return {"onnx": file_sha256(readable("matte.onnx", matte.onnx)), "levels": ONNX_LEVELS}
    return {"network": folder_hash(readable("matte.network", matte.network)) if matte.network else None}


# --- rendered packshots -----------------------------------------------------------------------------------------------


def _copy(samples: list[Sample]) -> list[Outcome]:
    return [Outcome(sample) for sample in samples]


def _render_steps(config: BuildData, folder: Path) -> list[Step]:
    render = blender_pool.render_step(blender_pool.open_farm(config, folder))
    return [render, _final(render.schema.names, _copy, {"dataset": "rendered"})]


# --- the build --------------------------------------------------------------------------------------------------------


def build(config: BuildData, captions: Sequence[Step] = ()) -> None:
    """Build ``config.dataset`` from ``config.source`` into the run folder; resumes to the same bytes.

    captions: steps that fill ``text`` after the masks are known (``packshot.make_dataset.run``).
    Raises:
        ConfigError: nothing to build from, an unusable model, or a run folder or render.folder in use.
        PackshotError: not one image was accepted, or a worker died.
    """
    shared = config.render.folder if config.dataset is DatasetKind.rendered else None
    with blender_pool.sole_use(shared) if shared else nullcontext():
        _build(config, captions)


def _build(config: BuildData, captions: Sequence[Step]) -> None:
    rendered = config.dataset is DatasetKind.rendered
    refuse_weights(config)
    if rendered:
        blender_pool.blender_python(config.render.environment)  # refuse it here, not in a worker
    items = blender_pool.jobs(config) if rendered else list_items(config.source)
    if config.dataset is DatasetKind.product:
        load_segmentation(config.matte)  # refuse it here, not in a worker
        if config.depth.onnx:
            load_session("depth.onnx", config.depth.onnx)
    run = open_run("build_data", config)
    steps = _render_steps(config, run.path) if rendered else _photo_steps(config, captions)
    tracker = open_tracker(run, config, "build_data")
    started = time.monotonic()
    shards = split(items, config.shard_size)
    report = run_steps(run.path, shards, blender_pool.fingerprint if rendered else fingerprint, steps, config.executor)
    if rendered and not config.render.folder:
        shutil.rmtree(run.path / "renders")  # the set holds them now
    figures = _write_extras(report, steps, config, len(items))
    if report.worked:
        line = {"step": 0, **figures, "seconds": round(time.monotonic() - started, 1)}
        run.metrics(line)
        tracker.log({key: float(value) for key, value in line.items()}, 0)
    else:
        log.info("everything was done already")
    log.info("%(accepted)d of %(images)d images accepted, %(rejected)d rejected", figures)
    sheet = run.path / "contact_sheet.png"
    if sheet.exists():
        tracker.images("contact_sheet", [sheet], ["first images"], 0)
    tracker.finish()
    if not figures["accepted"]:
        raise PackshotError(
            f"None of the {len(items)} images {'rendered' if rendered else f'of source.path={config.source.path}'} "
            "was accepted.",
            f"{run.path / 'rejected.parquet'} says why, image by image.",
        )


def _write_extras(report: Report, steps: Sequence[Step], config: BuildData, images: int) -> dict[str, int]:
    """``rejected.parquet``, the card and the contact sheet, each only where it changed."""
    rejected = _rejected(report, steps)
    parts = report.files("part")
    licenses = cards.count(name for file in parts for name in pq.read_table(file, columns=["license"])[0].to_pylist())
    columns = {name: _MEANING[name] for name in steps[-1].schema.names}
    settings = _settings(config)
    reasons, remarks = (cards.count(row["reason"] for row in rejected if row["kept"] is kept) for kept in (False, True))
    text = cards.card(config.dataset.name, licenses, reasons, remarks, columns, settings)
    schema = pa.schema([*((name, pa.string()) for name in ("id", "reason", "measure", "source")), ("kept", pa.bool_())])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rejected, schema=schema), buffer)
    _write_if_changed(report.folder / "rejected.parquet", buffer.getvalue())
    _write_if_changed(report.folder / "README.md", text.encode())
    count, with_masks = _SHEETS[config.dataset]
    rows = _first_rows(parts, count, ["image", "mask"] if with_masks else ["image"])
    first = [(open_png(row["image"]), open_png(row["mask"]) if with_masks else None) for row in rows]
    if first:
        _write_if_changed(report.folder / "contact_sheet.png", png(cards.contact_sheet(first))["bytes"])
    lost = sum(entry.rejected for entries in report.entries.values() for entry in entries)
    return {"images": images, "accepted": images - lost, "rejected": lost}


def _settings(config: BuildData) -> dict[str, Any]:
    """What the card says of how the set was made: everything that shaped it, nothing of where."""
    plain = to_plain(config)
    for group, key in _PLACES:
        if plain[group][key]:
            plain[group][key] = PurePath(plain[group][key]).name
    del plain["captioner"]["endpoint"]  # an address inside somebody's network, at times with a key in it
    if config.dataset is not DatasetKind.rendered:
        keys = ("dataset", "source", "matte", "depth", "quality", "captioner", "shard_size")
        return {key: plain[key] for key in (*keys, *(("licenses",) if config.licenses.commercial else ()))}
    render = {key: value for key, value in plain["render"].items() if key not in ("folder", "environment")}
    return {"dataset": "rendered", "seed": config.run.seed, "render": render, "shard_size": config.shard_size}


def _rejected(report: Report, steps: Sequence[Step]) -> list[Sample]:
    """Rows of ``rejected.parquet``, kept ones with a remark included: by step, then in the order of the input."""
    first = steps[0].name
    table = [pq.read_table(file, columns=["id", "source"]).to_pylist() for file in report.files(first)]
    return [
        {**table[shard][row["index"]], **{name: row[name] for name in ("reason", "measure", "kept")}}
        for step in steps
        if not step.final
        for shard, row in rejections(report, step.name, ())
    ]


def _first_rows(parts: Sequence[Path], count: int, columns: list[str]) -> list[Sample]:
    def rows() -> Iterator[Sample]:
        for part in parts:
            with pq.ParquetFile(part) as parquet:
                for batch in parquet.iter_batches(count, columns=columns):
                    yield from batch.to_pylist()

    return list(islice(rows(), count))


def _write_if_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        with replacing_file(path) as file:
            file.write_bytes(content)

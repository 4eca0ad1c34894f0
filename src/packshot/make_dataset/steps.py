"""The steps from images to the rows of a dataset, and captions for the images that came without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from packshot.caption.models.captioner import Captioner, identity, load_captioner
from packshot.config.schema import BuildData, LicenseConfig, MatteConfig, QualityConfig
from packshot.imaging.decode import MAX_PIXELS, DecodeError, decode_image, flatten
from packshot.imaging.depth import estimate_depth
from packshot.imaging.masks import ONNX_LEVELS, MaskFileError, NoProductError, find_mask
from packshot.make_dataset.dedup import find_duplicates, perceptual_hash
from packshot.make_dataset.pictures import open_png, png
from packshot.make_dataset.quality import check
from packshot.make_dataset.sources import read_items
from packshot.make_dataset.sources.base import Raw
from packshot.make_dataset.sources.files import mask_pattern
from packshot.pipeline import Outcome, Step
from packshot.pipeline.step import Sample
from packshot.render import rows
from packshot.runs.files import file_sha256, folder_hash, readable, sha256
from packshot.runs.licenses import allows
from packshot.scene import Scene
from packshot.scene.scores import product_words

if TYPE_CHECKING:
    from PIL.Image import Image

    from packshot.caption.data import CaptionedRow

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def without_product(text: str) -> Outcome:
    """The columns ``text`` for a caption; one that names the product is blanked, with a remark."""
    words = product_words(text)
    if words:
        return Outcome({"text": ""}, "caption_names_product", ", ".join(words))
    return Outcome({"text": text})


def ingest(samples: list[Sample], quality: QualityConfig, license: str, licenses: LicenseConfig) -> list[Outcome]:
    return [ingest_one(raw, quality, raw.license or license, licenses) for raw in read_items(samples)]


def ingest_one(raw: Raw, quality: QualityConfig, license: str, licenses: LicenseConfig) -> Outcome:
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


def dedup(samples: list[Sample], max_distance: int) -> list[Outcome]:
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


def find_masks(samples: list[Sample], matte: MatteConfig, from_files: bool) -> list[Outcome]:
    return [find_one_mask(sample, matte, from_files) for sample in samples]


def find_one_mask(sample: Sample, matte: MatteConfig, from_files: bool) -> Outcome:
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


def add_depth(samples: list[Sample], onnx: str) -> list[Outcome]:
    return [Outcome({"depth": png(estimate_depth(flatten(open_png(sample["image"])), onnx))}) for sample in samples]


def finish(samples: list[Sample], columns: Sequence[str]) -> list[Outcome]:
    return [Outcome(finished_row(sample, columns)) for sample in samples]


def finished_row(sample: Sample, columns: Sequence[str]) -> Sample:
    image = open_png(sample["image"])
    # Over white: readers take RGB, and would show whatever colour lies hidden under alpha 0.
    flat = {"image": png(flatten(image))} if image.mode == "RGBA" else {}
    whole = {**sample, **flat, "scene": Scene.parse(sample["text"]).scene.to_dict()}
    return {name: whole[name] for name in columns}


def final_step(
    columns: Sequence[str], function: Callable[[list[Sample]], list[Outcome]], config: dict[str, Any]
) -> Step:
    from datasets import Features

    known = rows.features()
    schema = Features({name: known[name] for name in columns}).arrow_schema
    return Step("part", 1, config, schema, function, final=True)


def ingest_step(config: BuildData) -> Step:
    """Decodes and checks every picture."""
    quality = config.quality
    settings: dict[str, object] = dataclasses.asdict(quality)
    del settings["duplicate_distance"]
    settings["license"] = config.source.license
    if config.licenses.commercial:
        settings["licenses"] = dataclasses.asdict(config.licenses)
    text = [(name, pa.string()) for name in ("id", "text", "source", "license", "phash")]
    sizes = [("width", pa.int32()), ("height", pa.int32())]
    schema = pa.schema([*text, ("image", _IMAGE), ("mask_file", pa.binary()), *sizes])
    function = partial(ingest, quality=quality, license=config.source.license, licenses=config.licenses)
    return Step("ingest", 1, settings, schema, function)


def dedup_step(config: BuildData) -> Step:
    """Compares every picture with those before it."""
    distance = config.quality.duplicate_distance
    function = partial(dedup, max_distance=distance)
    return Step("dedup", 1, {"max_distance": distance}, pa.schema([]), function, reads=("id", "phash"), whole=True)


def mask_step(config: BuildData) -> Step:
    """Finds the product, or takes the masks that were drawn by hand."""
    settings = {**network_identity(config.matte), "min_confidence": config.matte.min_confidence}
    from_files = config.source.masks is not None
    if from_files:
        settings["from_files"] = True
    columns = pa.schema([("mask", _IMAGE), ("mask_method", pa.string()), ("mask_confidence", pa.float32())])
    function = partial(find_masks, matte=config.matte, from_files=from_files)
    return Step("mask", 1, settings, columns, function, reads=("image", "mask_file", "source"))


def depth_step(config: BuildData) -> Step:
    """Estimates depth with a network."""
    onnx = config.depth.onnx or ""
    settings = {"onnx": file_sha256(readable("depth.onnx", onnx))}
    function = partial(add_depth, onnx=onnx)
    return Step("depth", 1, settings, pa.schema([("depth", _IMAGE)]), function, reads=("image",))


def network_identity(matte: MatteConfig) -> dict[str, Any]:
    """What finds products, by its digest: another network makes other masks."""
    if matte.onnx:
        return {"onnx": file_sha256(readable("matte.onnx", matte.onnx)), "levels": ONNX_LEVELS}
    return {"network": folder_hash(readable("matte.network", matte.network)) if matte.network else None}


def caption_step(config: BuildData, masked: bool) -> Step:
    """Writes ``text`` where the source had none. A changed prompt or model redoes it, and no step before it.

    masked: masks are known, and tell the captioner what the product is.
    """

    @cache
    def captioner() -> Captioner:  # loaded when the first image needs it: never, on finished work
        return load_captioner(config.model, config.captioner)

    named = identity(config.model, config.captioner)
    function = partial(write_captions, captioner=captioner)
    schema = pa.schema([("text", pa.string())])
    return Step(
        "caption",
        1,
        named,
        schema,
        function,
        reads=("image", "text", "mask") if masked else ("image", "text"),
        exclusive=True,
    )


def write_captions(samples: list[Sample], captioner: Callable[[], Captioner]) -> list[Outcome]:
    from packshot.caption.write import write_rows

    bare = {index: sample for index, sample in enumerate(samples) if not sample["text"]}
    pictures = {index: picture_and_mask(sample) for index, sample in bare.items()}
    written = write_rows(pictures, captioner()) if bare else {}
    return [
        caption_outcome(written[index]) if index in written else Outcome({"text": sample["text"]})
        for index, sample in enumerate(samples)
    ]


def picture_and_mask(sample: Sample) -> tuple[Image, Image | None]:
    mask = open_png(sample["mask"]).convert("L") if sample.get("mask") else None
    return flatten(open_png(sample["image"])), mask


def caption_outcome(row: CaptionedRow) -> Outcome:
    """An image without a usable caption stays, with the reason on record; training refuses empty captions."""
    if row.text is not None:
        return Outcome({"text": row.text})
    reason = "caption_names_product" if (row.error or "").startswith("names the product") else "no_caption"
    return Outcome({"text": ""}, reason, row.error)

"""The steps from images to the rows of a dataset, and captions for the images that came without one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import starmap
from typing import TYPE_CHECKING

import pyarrow as pa
from PIL.Image import Image, Resampling

from packshot.caption.models.captioner import Captioner
from packshot.caption.models.load import identity, load_captioner
from packshot.config.make_dataset import BuildData, ProductNaming
from packshot.config.mask_models import MASK_MODELS, reads_onnx
from packshot.config.schema import MatteConfig, WithoutMask
from packshot.dataset.near_duplicates import color_map, find_duplicates, perceptual_hash
from packshot.imaging.decode import MAX_PIXELS, DecodeError, decode, decode_image, flatten
from packshot.imaging.depth import estimate_depth
from packshot.imaging.mask_networks import network_file
from packshot.imaging.masks import ONNX_LEVELS, DoubtfulMaskError, MaskFileError, NoProductError, find_mask
from packshot.imaging.masks import VERSION as MASKS_VERSION
from packshot.imaging.profiles import READ_AS_SRGB
from packshot.lists import column, map_values, pick, select, without, without_none
from packshot.make_dataset.pictures import encode_scaled, keeps_bytes, open_png, picture, png, scaled, stored_picture
from packshot.make_dataset.quality import check, overview
from packshot.make_dataset.sources import read_items
from packshot.make_dataset.sources.base import Raw
from packshot.make_dataset.sources.files import mask_pattern
from packshot.pipeline import Outcome, Step
from packshot.pipeline.step import Sample
from packshot.render import rows
from packshot.runs.files import file_sha256, folder_hash, readable, resolve, sha256
from packshot.runs.licenses import allows
from packshot.scene import Scene
from packshot.scene.naming import names_product

if TYPE_CHECKING:
    from packshot.caption.data import CaptionedRow

NAMES_PRODUCT = "caption_names_product"
# What a step reads to see the picture.
PICTURE = ("id", "source", "image", "item", "width", "height")
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def ingest(samples: list[Sample], config: BuildData) -> list[Outcome]:
    """Decode and check the pictures behind items of the source."""
    return list(map(partial(ingest_one, config=config), read_items(samples), samples))


def ingest_one(raw: Raw, item: Sample, config: BuildData) -> Outcome:
    """One picture, or the reason why it is left out."""
    known: Sample = {"id": sha256(raw.data) if raw.data is not None else "", "source": raw.name}
    license_name = raw.license or config.source.license
    if raw.data is None:
        return Outcome(known, "unreadable", raw.error, kept=False)
    if not allows(config.licenses, license_name):
        return Outcome(known, "license", license_name, kept=False)
    try:
        image, changes = decode(raw.data, raw.name, config.quality.max_pixels)
    except DecodeError as error:
        return Outcome(known, error.reason, error.measure, kept=False)
    flat = overview(image)
    if problem := check(image.size, flat, config.quality):
        return Outcome(known, *problem, kept=False)
    small = scaled(image, config.data.max_side)
    if small is not image:
        stored = encode_scaled(small, raw.data)
    else:
        stored = None if keeps_bytes(raw.data, image, changes) else png(image)
    columns = {
        **known,
        "text": raw.text,
        "captions": list(raw.captions),
        "caption_origin": raw.origin if raw.text else "",
        "encoding": raw.encoding,
        "image": stored,
        "item": json.dumps(without(item, "index")),
        "mask_file": raw.mask,
        "license": license_name,
        "width": small.width,
        "height": small.height,
        "repeats": raw.repeats,
        "phash": f"{perceptual_hash(flat):016x}",
        "colors": color_map(flat),
    }
    doubts = [change for change in changes if change.endswith(READ_AS_SRGB)]
    return Outcome(columns, "color_unknown", doubts[0]) if doubts else Outcome(columns)


def check_captions(samples: list[Sample], policy: ProductNaming) -> list[Outcome]:
    """Look for captions that name a product, for which the policy decides, and for captions in unusual encodings."""
    outcomes = []
    for sample in samples:
        hits = ", ".join(names_product(sample["text"]))
        columns = {"naming": hits}
        if hits and policy is not ProductNaming.keep:
            outcomes.append(Outcome(columns, NAMES_PRODUCT, hits, kept=policy is ProductNaming.report))
        elif sample["encoding"]:
            outcomes.append(Outcome(columns, "caption_encoding", f"read as {sample['encoding']}"))
        else:
            outcomes.append(Outcome(columns))
    return outcomes


def dedup(samples: list[Sample], max_distance: int) -> list[Outcome]:
    """Rejects what was there before: first equal bytes, then near-equal pictures. The measure is the earlier id."""
    if max_distance < 0:
        return [Outcome() for _ in samples]
    first: dict[str, int] = {}
    for position, sample in enumerate(samples):
        first.setdefault(sample["id"], position)
    unique = sorted(first.values())
    hashes = [int(samples[position]["phash"], 16) for position in unique]
    colors = column(pick(samples, unique), "colors")
    matches = find_duplicates(hashes, max_distance, colors)
    near = map_values(unique.__getitem__, without_none(dict(zip(unique, matches, strict=True))))

    def judge(position: int, sample: Sample) -> Outcome:
        if first[sample["id"]] != position:
            return Outcome({}, "duplicate", sample["id"], kept=False)
        if position in near:
            return Outcome({}, "near_duplicate", samples[near[position]]["id"], kept=False)
        return Outcome()

    return list(starmap(judge, enumerate(samples)))


def find_masks(samples: list[Sample], matte: MatteConfig, from_files: bool) -> list[Outcome]:
    """The product in every picture."""
    return list(map(partial(find_one_mask, matte=matte, from_files=from_files), samples))


def find_one_mask(sample: Sample, matte: MatteConfig, from_files: bool) -> Outcome:
    """from_files: masks are drawn by hand (``source.masks``), and none is found where one is missing."""
    if from_files and sample["mask_file"] is None:
        wanted = mask_pattern(sample["source"].partition("/")[2])
        return Outcome({}, "no_mask", f"source.masks has no {wanted}", kept=False)
    name = sample["source"]
    image = picture(sample)
    try:
        given = given_mask(sample, image)
        found = find_mask(image, matte, given, name)
    except DoubtfulMaskError as error:
        return Outcome({}, "mask_in_doubt", ", ".join(error.reasons), kept=False)
    except NoProductError as error:
        return Outcome({}, "no_product", f"confidence {error.confidence:.2f}", kept=False)
    except (DecodeError, MaskFileError) as error:
        return Outcome({}, "bad_mask", str(error.args[0]), kept=False)
    reasons = list(found.reasons)
    columns = {
        "mask": png(found.to_image()),
        "mask_method": found.method,
        "mask_confidence": found.confidence,
        "status": "needs_review" if reasons else "accepted",
        "reasons": reasons,
    }
    if reasons:
        return Outcome(columns, "needs_review", ", ".join(reasons))
    return Outcome(columns)


def given_mask(sample: Sample, image: Image) -> Image | None:
    """The mask that was drawn for a picture, scaled as the picture was."""
    if sample["mask_file"] is None:
        return None
    limit = max(MAX_PIXELS, image.width * image.height)  # a mask may be as large as its picture
    mask = decode_image(sample["mask_file"], f"the mask of {sample['source']}", limit)
    ratio = mask.width / image.width
    if ratio > 1 and (round(mask.width / ratio), round(mask.height / ratio)) == image.size:
        return mask.resize(image.size, Resampling.BOX)
    return mask


def add_depth(samples: list[Sample], onnx: str) -> list[Outcome]:
    """Inverse depth of every picture."""
    return [Outcome({"depth": png(estimate_depth(flatten(picture(sample)), onnx))}) for sample in samples]


def finish(samples: list[Sample], columns: Sequence[str]) -> list[Outcome]:
    """The rows of the dataset."""
    return [Outcome(finished_row(sample, columns)) for sample in samples]


def finished_row(sample: Sample, columns: Sequence[str]) -> Sample:
    """One row. Transparent pictures lie over white: readers take RGB, and would show the colours under alpha 0."""
    stored = stored_picture(sample)
    if sample["image"] is not None and open_png(stored).mode == "RGBA":
        stored = png(flatten(open_png(stored)))
    whole = {**sample, "image": stored, "scene": Scene.parse(sample["text"]).scene.to_dict()}
    if sample["text"] not in sample["captions"]:  # a captioner's text has replaced them
        whole["captions"] = None
    return select(whole, columns)


def added_features() -> dict[str, object]:
    """Columns of built sets that rendered ones do not have, as types of ``datasets``."""
    from datasets import List, Value

    text = Value("string")
    masks = {"status": text, "reasons": List(text), "mask_confidence": Value("float32")}
    return {**masks, "caption_origin": text, "captions": List(text), "repeats": Value("int32")}


def final_step(
    columns: Sequence[str],
    function: Callable[[list[Sample]], list[Outcome]],
    config: dict[str, object],
    measures: Iterable[str] = (),
) -> Step:
    """Writes the rows. measures: columns of numbers."""
    from datasets import Features, Value

    known = {**rows.features(), **added_features(), **dict.fromkeys(measures, Value("float32"))}
    schema = Features(select(known, columns)).arrow_schema
    return Step("part", 2, config, schema, function, final=True)


def ingest_step(config: BuildData) -> Step:
    """Decodes and checks every picture."""
    settings: dict[str, object] = dataclasses.asdict(config.quality)
    del settings["duplicate_distance"]
    settings |= {"license": config.source.license, "max_side": config.data.max_side}
    if config.licenses.commercial:
        settings["licenses"] = dataclasses.asdict(config.licenses)
    names = ("id", "text", "caption_origin", "encoding", "source", "license", "phash", "item")
    types = {**dict.fromkeys(names, pa.string()), "image": _IMAGE, "mask_file": pa.binary(), "colors": pa.binary()}
    types |= dict.fromkeys(("width", "height", "repeats"), pa.int32())
    schema = pa.schema({**types, "captions": pa.list_(pa.string())})
    return Step("ingest", 3, settings, schema, partial(ingest, config=config))


def naming_step(config: BuildData) -> Step:
    """Finds captions that name a product."""
    policy = config.captions.product
    schema = pa.schema([("naming", pa.string())])
    function = partial(check_captions, policy=policy)
    return Step("naming", 1, {"policy": policy.name}, schema, function, reads=("id", "text", "encoding"))


def dedup_step(config: BuildData) -> Step:
    """Compares every picture with those before it."""
    distance = config.quality.duplicate_distance
    function = partial(dedup, max_distance=distance)
    reads = ("id", "phash", "colors")
    return Step("dedup", 2, {"max_distance": distance}, pa.schema([]), function, reads=reads, whole=True)


def mask_step(config: BuildData) -> Step:
    """Finds the product, or takes the masks that were drawn by hand."""
    settings = {**network_identity(config.matte), "min_confidence": config.matte.min_confidence}
    settings |= {"strict": config.matte.strict, "invert": config.matte.invert}
    from_files = config.source.masks is not None and config.source.without_mask is WithoutMask.reject
    if from_files:
        settings["from_files"] = True
    columns = pa.schema(
        [
            ("mask", _IMAGE),
            ("mask_method", pa.string()),
            ("mask_confidence", pa.float32()),
            ("status", pa.string()),
            ("reasons", pa.list_(pa.string())),
        ]
    )
    function = partial(find_masks, matte=config.matte, from_files=from_files)
    return Step("mask", MASKS_VERSION, settings, columns, function, reads=(*PICTURE, "mask_file"))


def depth_step(config: BuildData) -> Step:
    """Estimates depth with a network."""
    onnx = config.depth.onnx or ""
    settings = {"onnx": file_sha256(readable("depth.onnx", onnx))}
    function = partial(add_depth, onnx=onnx)
    return Step("depth", 2, settings, pa.schema([("depth", _IMAGE)]), function, reads=PICTURE)


def network_identity(matte: MatteConfig) -> dict[str, object]:
    """What finds products, by its digest: another network makes other masks."""
    if reads_onnx(matte.model):
        return {"onnx": file_sha256(network_file(matte.model)), "levels": ONNX_LEVELS}
    weights = MASK_MODELS[matte.model].weights
    folder = resolve(weights) if weights else None
    return {"network": folder_hash(folder) if folder and folder.is_dir() else None}


def caption_step(config: BuildData, masked: bool) -> Step:
    """Writes ``text`` where the source had none, or everywhere with ``captioner.overwrite``.

    A changed prompt or model redoes it, and no step before it.

    masked: masks are known, and tell the captioner what the product is.
    """

    @cache
    def captioner() -> Captioner:  # loaded when the first image needs it: never, on finished work
        return load_captioner(config.model, config.captioner)

    named = {**identity(config.model, config.captioner), "origin": config.captioner.kind.name}
    overwrite = config.captioner.overwrite
    if overwrite:
        named["overwrite"] = "true"
    function = partial(write_captions, captioner=captioner, origin=config.captioner.kind.name, overwrite=overwrite)
    schema = pa.schema([("text", pa.string()), ("caption_origin", pa.string())])
    reads = (*PICTURE, "text", "caption_origin", *(("mask",) if masked else ()))
    return Step("caption", 2, named, schema, function, reads=reads, exclusive=True)


def write_captions(
    samples: list[Sample], captioner: Callable[[], Captioner], origin: str, overwrite: bool = False
) -> list[Outcome]:
    """Captions for the pictures that came without one, with ``overwrite`` for all; those of the source stay otherwise.

    A caption of the source also stays where the captioner fails.
    """
    from packshot.caption.stream import write_rows

    pictures = {}
    for index, sample in enumerate(samples):
        if overwrite or not sample["text"]:
            pictures[index] = picture_and_mask(sample)
    written = write_rows(pictures, captioner()) if pictures else {}
    outcomes = []
    for index, sample in enumerate(samples):
        if index in written:
            outcomes.append(caption_outcome(written[index], origin, sample))
        else:
            outcomes.append(Outcome({"text": sample["text"], "caption_origin": sample["caption_origin"]}))
    return outcomes


def picture_and_mask(sample: Sample) -> tuple[Image, Image | None]:
    """What the captioner sees: the picture over white, and the mask where it is known."""
    mask = open_png(sample["mask"]).convert("L") if sample.get("mask") else None
    return flatten(picture(sample)), mask


def caption_outcome(row: CaptionedRow, origin: str, sample: Sample) -> Outcome:
    """An image without a usable caption stays as it came, with the reason on record; trainers refuse empty captions."""
    if row.text is not None:
        return Outcome({"text": row.text, "caption_origin": origin})
    reason = NAMES_PRODUCT if (row.error or "").startswith("names the product") else "no_caption"
    return Outcome({"text": sample["text"], "caption_origin": sample["caption_origin"]}, reason, row.error)

"""The files next to the shards of a dataset: the table of rejected samples, the card, the contact sheet."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image

from packshot.config.make_dataset import BuildData
from packshot.lists import in_words, select
from packshot.make_dataset import card as cards
from packshot.make_dataset import curation
from packshot.make_dataset.pictures import open_png, png
from packshot.pipeline import Report, Step
from packshot.pipeline.run import rejections
from packshot.pipeline.step import Sample
from packshot.runs.files import replacing_file

_REJECTED = pa.schema({**dict.fromkeys(("id", "reason", "measure", "source"), pa.string()), "kept": pa.bool_()})
_HELD = 4  # rows in memory, of those that are shown
MEANING = {
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
    "status": "accepted, or needs_review where the mask is in doubt",
    "reasons": "codes of what is in doubt; empty when accepted",
    "mask_confidence": "0 to 1; 1 for a mask file or a cut-out's own alpha",
    "caption_origin": "source: a person's caption; else the captioner that wrote it; empty when there is none",
    "captions": "all captions, where there are several; text is the first, and training draws one at each access",
    "repeats": "how often training should see the image in an epoch",
}

# The keys that decide about reasons, those of curation aside.
DECIDED_BY = {
    "too_small": "quality.min_side",
    "too_many_pixels": "quality.max_pixels",
    "blurred": "quality.min_sharpness",
    "near_duplicate": "quality.duplicate_distance",
    "duplicate": "quality.duplicate_distance",
    "similar": "curation.max_similarity",
    "license": "licenses.commercial",
    "caption_names_product": "captions.product",
    "no_mask": "source.without_mask",
    "no_product": "matte.min_confidence",
    "needs_review": "matte.strict",
    "mask_in_doubt": "matte.strict",
}


def write_extras(
    report: Report, steps: Sequence[Step], kind: str, settings: dict[str, object], sheet: int, images: int
) -> dict[str, int]:
    """``rejected.parquet``, the card and the contact sheet, each only where it changed; returns the counts.

    kind: of the dataset, for the card. sheet: how many pictures the contact sheet shows. images: of the source.
    """
    rejected = rejected_rows(report, steps)
    parts = report.files("part")
    licenses = []
    for file in parts:
        licenses += pq.read_table(file, columns=["license"])[0].to_pylist()
    names = steps[-1].schema.names
    text = cards.card(
        kind,
        cards.count(licenses),
        count_reasons(rejected, kept=False),
        count_reasons(rejected, kept=True),
        select({**MEANING, **curation.MEANING}, names),
        settings,
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rejected, schema=_REJECTED), buffer)
    write_if_changed(report.folder / "rejected.parquet", buffer.getvalue())
    write_if_changed(report.folder / "README.md", text.encode())
    columns = ["image", "mask"] if "mask" in names and kind != "rendered" else ["image"]
    first = cards.contact_sheet(map(picture_and_mask, first_rows(parts, sheet, columns)))
    if first is not None:
        write_if_changed(report.folder / "contact_sheet.png", png(first)["bytes"])
    lost = 0
    for entries in report.entries.values():
        lost += sum(entry.rejected for entry in entries)
    review = count_status(parts, "needs_review") if "status" in names else 0
    return {"images": images, "accepted": images - lost - review, "needs_review": review, "rejected": lost}


def count_status(parts: Sequence[Path], status: str) -> int:
    """How many rows of the shards have a status."""
    found = 0
    for file in parts:
        found += pq.read_table(file, columns=["status"])[0].to_pylist().count(status)
    return found


def picture_and_mask(row: Sample) -> tuple[Image, Image | None]:
    """The pictures of a row for the contact sheet."""
    return open_png(row["image"]), open_png(row["mask"]) if "mask" in row else None


def count_reasons(rows: Sequence[Sample], kept: bool) -> dict[str, int]:
    """How many of these rejected rows, or of those that were kept with a remark, have each reason."""
    return cards.count(row["reason"] for row in rows if row["kept"] is kept)


def reason_counts(report: Report, steps: Sequence[Step], config: BuildData) -> list[str]:
    """A line on what was left out and one on remarks, by reason with the key that decides, only where there are any."""
    rows = rejected_rows(report, steps)
    keys = {**DECIDED_BY, **{row.reason: f"curation.{row.key}" for row in curation.MEASURES.values()}}
    lines = []
    for kept, what in ((False, "left out"), (True, "kept with a remark")):
        counts = {}
        for reason, number in count_reasons(rows, kept).items():
            key = keys.get(reason)
            counts[f"{reason} ({key}={attrgetter(key)(config)})" if key else reason] = number
        if counts:
            lines.append(f"{what}: {in_words(counts)}; rejected.parquet has each with its measure")
    return lines


def rejected_rows(report: Report, steps: Sequence[Step]) -> list[Sample]:
    """Rows of ``rejected.parquet``, kept ones with a remark included: by step, then in the order of the input."""
    names = [pq.read_table(file, columns=["id", "source"]).to_pylist() for file in report.files(steps[0].name)]
    rows = []
    for step in steps:
        if step.final:
            continue
        for shard, outcome in rejections(report, step.name, ()):
            decided = select(outcome, ("reason", "measure", "kept"))
            rows.append({**names[shard][outcome["index"]], **decided})
    return rows


def first_rows(parts: Sequence[Path], count: int, columns: list[str]) -> Iterator[Sample]:
    """The first rows of a dataset, read no further than they need, a few at a time."""
    left = count
    for part in parts:
        with pq.ParquetFile(part) as parquet:
            for batch in parquet.iter_batches(_HELD, columns=columns):
                for row in batch.slice(0, left).to_pylist():
                    left -= 1
                    yield row
                if left == 0:
                    return


def write_if_changed(path: Path, content: bytes) -> None:
    """Leave a file with this content alone, so that a rerun on finished work touches nothing."""
    if not path.exists() or path.read_bytes() != content:
        with replacing_file(path) as file:
            file.write_bytes(content)

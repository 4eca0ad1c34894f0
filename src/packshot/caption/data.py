"""Dataset shards as the captioner reads and writes them: Parquet tables that keep all their columns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value
from PIL.Image import Image

from packshot.dataset.arrow_copy import REPAIR, first_damaged
from packshot.errors import ConfigError, PackshotError, first_line
from packshot.imaging.decode import decode_image, flatten
from packshot.lists import without_none
from packshot.runs.files import readable, replacing_file
from packshot.scene import SLOTS, Scene
from packshot.scene.scene import scene_features

PICTURES = ("image", "mask")  # the pictures that a captioner reads
PATIENCE = 30 * 24 * 3600  # seconds that processes wait for each other; the launcher ends them all when one fails
ERROR_COLUMN = "caption_error"
ORIGIN_COLUMN = "caption_origin"
SOURCE = "source"  # the origin of a caption that came with the picture
CONFIDENCE_COLUMN = "caption_confidence"
_KEY = b"packshot.caption"  # footer entry: which input and which captioner a shard was written from
_TEXT = Value("string")
_CONFIDENCE = dict.fromkeys(SLOTS, Value("float32"))
# What task=caption writes into every shard, beside the columns that were there.
_WRITTEN = {
    "text": _TEXT,
    "scene": scene_features(),
    ERROR_COLUMN: _TEXT,
    CONFIDENCE_COLUMN: _CONFIDENCE,
    ORIGIN_COLUMN: _TEXT,
}


@dataclass(frozen=True)
class CaptionedRow:
    """The caption of one row, or the reason why it has none. Exactly one of text and error is set.

    confidence: per slot, as :class:`packshot.caption.models.adapter.Caption` has it.
    """

    text: str | None = None
    error: str | None = None
    confidence: dict[str, float] = field(default_factory=dict)


def shard_files(key: str, path: str) -> list[Path]:
    """The Parquet files of a dataset folder that the config names under ``key``, in order.

    Raises:
        ConfigError: no folder, no shard in it, or a shard that is not a whole Parquet file.
    """
    folder = readable(key, path)
    files = sorted({*folder.glob("*.parquet")} - {folder / "rejected.parquet"})
    if not files:
        raise ConfigError(f"{key}={path} holds no *.parquet.", "build_data.py writes such folders.")
    damaged = first_damaged(files)
    if damaged:
        raise ConfigError(f"{key}={path}: {damaged.name} is not a whole Parquet file.", REPAIR)
    return files


def read_shard(file: Path) -> pa.Table:
    """One shard as it is on disk (images encoded).

    Raises:
        PackshotError: the file is not Parquet, or has no column ``image``.
    """
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise PackshotError(f"{file} cannot be read as Parquet ({reason}).", REPAIR) from error
    if "image" not in table.column_names:
        raise PackshotError(f"{file} has no column image.", "build_data.py writes the columns that are needed.")
    return table


def decode_row(table: pa.Table, index: int) -> tuple[Image, Image | None]:
    """Image (RGB, transparent pixels on white) and mask (L) of a row.

    Raises:
        PackshotError: the cell holds no image that can be decoded.
    """
    image = decode_image(picture_bytes(table, "image", index), "the image")
    mask = None
    if "mask" in table.column_names and table.column("mask")[index].is_valid:
        mask = decode_image(picture_bytes(table, "mask", index), "the mask").convert("L")
    return flatten(image), mask


def picture_bytes(table: pa.Table, column: str, index: int) -> bytes:
    """The file of a picture. Raises PackshotError if there is none."""
    cell = table.column(column)[index].as_py()
    if not isinstance(cell, dict) or not cell.get("bytes"):
        raise PackshotError(f"there is no {column}.")
    return cell["bytes"]


def read_captions(file: Path, key: str) -> list[CaptionedRow] | None:
    """The rows of a shard that an earlier run wrote under the same ``key``, or None."""
    if not file.exists() or (pq.read_schema(file).metadata or {}).get(_KEY) != key.encode():
        return None
    table = pq.read_table(file, columns=["text", ERROR_COLUMN, CONFIDENCE_COLUMN])
    rows: list[CaptionedRow] = []
    for row in table.to_pylist():
        if row[ERROR_COLUMN] is not None:  # its text, if it has one, is the source's
            rows.append(CaptionedRow(error=row[ERROR_COLUMN]))
        else:
            rows.append(CaptionedRow(row["text"], None, without_none(row[CONFIDENCE_COLUMN] or {})))
    return rows


class Journal:
    """The captions of an unfinished shard, one per line, so that a kill loses one batch.

    The file is deleted when the shard is complete. Lines under another ``key`` are not read.
    """

    def __init__(self, target: Path, key: str) -> None:
        self._file = target.with_name(f".{target.name}.journal")
        self._key = hashlib.sha256(key.encode()).hexdigest()

    def read(self) -> dict[int, CaptionedRow]:
        """Rows that were captioned before, by index; a line that a kill cut short is skipped."""
        rows: dict[int, CaptionedRow] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            with suppress(ValueError):  # an empty line, or one cut short
                found = json.loads(line)
                if found["key"] == self._key:
                    rows[found["row"]] = CaptionedRow(found["text"], found["error"], found["confidence"])
        return rows

    def add(self, rows: dict[int, CaptionedRow]) -> None:
        """Record a batch."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            for index, row in rows.items():
                # The line break comes first: it also ends a line that a kill has cut short.
                file.write("\n" + json.dumps({"key": self._key, "row": index, **asdict(row)}))

    def remove(self) -> None:
        """Delete the file, because the shard is complete."""
        self._file.unlink(missing_ok=True)


def texts_of(table: pa.Table) -> list[str | None]:
    """The captions of a table, None where there is none."""
    if "text" not in table.column_names:
        return [None] * table.num_rows
    return [text if text and text.strip() else None for text in table.column("text").to_pylist()]


def write_captions(
    file: Path, table: pa.Table, rows: Sequence[CaptionedRow], key: str, origin: str, kept: Collection[int]
) -> None:
    """``table`` with its caption columns (:data:`_WRITTEN`) replaced, whole or not at all.

    origin: names the captioner. kept: rows whose caption is that of the table, with its scene, confidence and origin.
    Rows on which the captioner failed keep theirs too, beside the error.
    The features that ``datasets`` and the hub viewer read from the footer are kept and extended.
    """
    features = Features.from_arrow_schema(table.schema)
    features.update(_WRITTEN)
    before = table.select([name for name in _WRITTEN if name in table.column_names]).to_pylist()
    written: dict[str, list[object]] = {name: [] for name in _WRITTEN}
    given = texts_of(table)
    stay = {index for index, row in enumerate(rows) if index in kept or (row.error is not None and given[index])}
    for index, row in enumerate(rows):
        cells = {**kept_cells(before[index]), ERROR_COLUMN: row.error} if index in stay else new_cells(row, origin)
        for name, value in cells.items():
            written[name].append(value)
    arrays: list[pa.Array | pa.ChunkedArray] = []
    schema = features.arrow_schema
    for column in schema:
        if column.name == "captions":  # several captions of the source go with the one that they belong to
            several = table.column(column.name).to_pylist()
            left = [cell if index in stay else None for index, cell in enumerate(several)]
            arrays.append(pa.array(left, column.type))
        elif column.name in written:
            arrays.append(pa.array(written[column.name], column.type))
        else:
            arrays.append(table.column(column.name).cast(column.type))
    metadata = {**(table.schema.metadata or {}), **(schema.metadata or {}), _KEY: key.encode()}
    with replacing_file(file) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata)), temporary)


def new_cells(row: CaptionedRow, origin: str) -> dict[str, object]:
    """The caption columns of a row that the captioner wrote, or failed to write."""
    return {
        "text": row.text,
        "scene": Scene.parse(row.text).scene.to_dict() if row.text else None,
        ERROR_COLUMN: row.error,
        CONFIDENCE_COLUMN: {**dict.fromkeys(_CONFIDENCE), **row.confidence},
        ORIGIN_COLUMN: origin if row.text else "",
    }


def kept_cells(before: dict[str, Any]) -> dict[str, object]:
    """The caption columns of a row whose caption stays. before: these columns as they are, where there are any."""
    confidence = without_none(before.get(CONFIDENCE_COLUMN) or {})
    return {
        "text": before["text"],
        "scene": before.get("scene") or Scene.parse(before["text"]).scene.to_dict(),
        ERROR_COLUMN: None,
        CONFIDENCE_COLUMN: {**dict.fromkeys(_CONFIDENCE), **confidence},
        ORIGIN_COLUMN: before.get(ORIGIN_COLUMN) or SOURCE,
    }

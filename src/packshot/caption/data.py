"""Dataset shards as the captioner reads and writes them: Parquet tables that keep every column they came with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value
from PIL.Image import Image

from packshot.errors import ConfigError, PackshotError
from packshot.imaging.decode import decode_image, flatten
from packshot.runs.files import readable, replacing_file
from packshot.scene import SLOTS, Scene
from packshot.scene.scene import scene_features

ERROR_COLUMN = "caption_error"
CONFIDENCE_COLUMN = "caption_confidence"
_KEY = b"packshot.caption"  # footer entry: which input and which captioner a shard was written from
_TEXT = Value("string")
_CONFIDENCE = dict.fromkeys(SLOTS, Value("float32"))


@dataclass(frozen=True)
class CaptionedRow:
    """The caption of one row, or the reason why it has none. Exactly one of text and error is set.

    confidence: per slot, as :class:`packshot.caption.models.adapter.Caption` has it.
    """

    text: str | None = None
    error: str | None = None
    confidence: dict[str, float] = field(default_factory=dict)


def shard_files(key: str, path: str | None) -> list[Path]:
    """The Parquet files of a dataset folder that the config names under ``key``, in order.

    Raises:
        ConfigError: no path, no folder, or no shard in it.
    """
    if path is None:
        raise ConfigError(f"{key} is not set.", f"Add {key}=<dataset folder>, as build_data.py writes it.")
    folder = readable(key, path)
    files = sorted(file for file in folder.glob("*.parquet") if file.name != "rejected.parquet")
    if not files:
        raise ConfigError(f"{key}={path} holds no *.parquet.", "build_data.py writes such folders.")
    return files


def read_shard(file: Path) -> pa.Table:
    """One shard as it lies on disk (images encoded).

    Raises:
        PackshotError: no Parquet, or no column ``image``.
    """
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise PackshotError(f"{file} cannot be read as Parquet ({reason}).", "Build the dataset again.") from error
    if "image" not in table.column_names:
        raise PackshotError(f"{file} has no column image.", "build_data.py writes the columns that are needed.")
    return table


def decode_row(table: pa.Table, index: int) -> tuple[Image, Image | None]:
    """Image (RGB, transparent pixels on white) and mask (L) of a row.

    Raises:
        PackshotError: the cell holds no image that can be decoded.
    """
    image = decode_image(_bytes(table, "image", index), "the image")
    mask = None
    if "mask" in table.column_names and table.column("mask")[index].is_valid:
        mask = decode_image(_bytes(table, "mask", index), "the mask").convert("L")
    return flatten(image), mask


def _bytes(table: pa.Table, column: str, index: int) -> bytes:
    cell = table.column(column)[index].as_py()
    if not isinstance(cell, dict) or not cell.get("bytes"):
        raise PackshotError(f"there is no {column}.")
    return cell["bytes"]


def read_captions(file: Path, key: str) -> list[CaptionedRow] | None:
    """The rows of an earlier run's shard, or None when there is none that was written under the same ``key``."""
    if not file.exists() or (pq.read_schema(file).metadata or {}).get(_KEY) != key.encode():
        return None
    table = pq.read_table(file, columns=["text", ERROR_COLUMN, CONFIDENCE_COLUMN])
    return [
        CaptionedRow(row["text"], row[ERROR_COLUMN], _known(row[CONFIDENCE_COLUMN] or {})) for row in table.to_pylist()
    ]


def _known(confidence: dict[str, float | None]) -> dict[str, float]:
    return {slot: value for slot, value in confidence.items() if value is not None}


class Journal:
    """Captions of a shard that is being written, a line each as they come, so that a kill costs one batch.

    It lies beside the shard and goes when the shard is whole. Lines under another ``key`` are not read.
    """

    def __init__(self, target: Path, key: str) -> None:
        self._file, self._key = target.with_name(f".{target.name}.journal"), hashlib.sha256(key.encode()).hexdigest()

    def read(self) -> dict[int, CaptionedRow]:
        """Rows that were captioned before, by index; a line that a kill cut short is passed over."""
        rows: dict[int, CaptionedRow] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            with suppress(ValueError):  # an empty line, or one cut short
                found = json.loads(line)
                if found["key"] == self._key:
                    rows[found["row"]] = CaptionedRow(found["text"], found["error"], found["confidence"])
        return rows

    def add(self, rows: dict[int, CaptionedRow]) -> None:
        """Note a batch."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": self._key, "row": index, **asdict(row)}) for index, row in rows.items()]
        with self._file.open("a") as file:
            file.write("\n" + "\n".join(lines))  # a line that a kill cut short ends before the next

    def remove(self) -> None:
        """The shard is whole."""
        self._file.unlink(missing_ok=True)


def write_captions(file: Path, table: pa.Table, rows: Sequence[CaptionedRow], key: str) -> None:
    """``table`` with ``text``, ``scene``, ``caption_error`` and ``caption_confidence`` replaced, whole or not at all.

    The features that ``datasets`` and the hub viewer read from the footer are kept and extended.
    """
    features = Features.from_arrow_schema(table.schema)
    features.update({"text": _TEXT, "scene": scene_features(), ERROR_COLUMN: _TEXT, CONFIDENCE_COLUMN: _CONFIDENCE})
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    columns["text"] = [row.text for row in rows]
    columns["scene"] = [Scene.parse(row.text).scene.to_dict() if row.text else None for row in rows]
    columns[ERROR_COLUMN] = [row.error for row in rows]
    columns[CONFIDENCE_COLUMN] = [{slot: row.confidence.get(slot) for slot in _CONFIDENCE} for row in rows]
    schema = features.arrow_schema
    metadata = {**(table.schema.metadata or {}), **schema.metadata, _KEY: key.encode()}
    arrays = []
    for column_type in schema:
        column = columns[column_type.name]
        arrays.append(pa.array(column, column_type.type) if isinstance(column, list) else column.cast(column_type.type))
    with replacing_file(file) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata)), temporary)

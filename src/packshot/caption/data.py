"""Dataset shards as the captioner reads and writes them: Parquet tables that keep every column they came with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from PIL.Image import Image

from packshot.core.errors import ConfigError, PackshotError
from packshot.core.storage import readable, replacing_file
from packshot.data.decode import decode_image, flatten
from packshot.scene import Scene

ERROR_COLUMN = "caption_error"
_KEY = b"packshot.caption"  # footer entry: which input and which captioner a shard was written from
_TEXT = Value("string")
_SCENE = {
    "surface": _TEXT,
    "surroundings": List(_TEXT),
    "background": _TEXT,
    "lighting": _TEXT,
    "mood": _TEXT,
    "style": List(_TEXT),
}


@dataclass(frozen=True)
class CaptionedRow:
    """The caption of one row, or the reason why it has none. Exactly one of text and error is set."""

    text: str | None = None
    error: str | None = None


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
    table = pq.read_table(file, columns=["text", ERROR_COLUMN])
    return [CaptionedRow(row["text"], row[ERROR_COLUMN]) for row in table.to_pylist()]


def write_captions(file: Path, table: pa.Table, rows: Sequence[CaptionedRow], key: str) -> None:
    """``table`` with ``text``, ``scene`` and ``caption_error`` replaced, whole or not at all.

    The features that ``datasets`` and the hub viewer read from the footer are kept and extended.
    """
    features = Features.from_arrow_schema(table.schema)
    features.update({"text": _TEXT, "scene": _SCENE, ERROR_COLUMN: _TEXT})
    columns: dict[str, Any] = {name: table.column(name) for name in table.column_names}
    columns["text"] = [row.text for row in rows]
    columns["scene"] = [Scene.parse(row.text).scene.to_dict() if row.text else None for row in rows]
    columns[ERROR_COLUMN] = [row.error for row in rows]
    schema = features.arrow_schema
    metadata = {**(table.schema.metadata or {}), **schema.metadata, _KEY: key.encode()}
    arrays = []
    for field in schema:
        column = columns[field.name]
        arrays.append(pa.array(column, field.type) if isinstance(column, list) else column.cast(field.type))
    with replacing_file(file) as temporary:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema.with_metadata(metadata)), temporary)

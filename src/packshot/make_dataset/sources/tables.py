"""Parquet tables with a column of pictures: our own datasets, the hub's, img2dataset's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packshot.config.schema import SourceConfig
from packshot.dataset import corrections
from packshot.dataset.rows import CAPTIONS, is_list
from packshot.dataset.text_files import CAPTION_COLUMNS
from packshot.errors import ConfigError
from packshot.make_dataset.sources.base import (
    LICENSE_COLUMNS,
    Item,
    Listing,
    Raw,
    caption_count,
    captions_of,
    check_caption_column,
    first_of,
    no_captions,
    open_place,
    text_of,
)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "picture", "photo")
# What build_data.py keeps next to the shards of a dataset.
_OWN_FILES = (
    "README.md",
    "contact_sheet.png",
    "ledger.jsonl",
    "config.yaml",
    "metrics.jsonl",
    "log.txt",
    "report.html",
)


def claims(listing: Listing) -> list[str]:
    """Shards with pictures. A table without pictures next to tars or images is metadata, and is left to those."""
    return [path for path in listing.paths if is_shard(listing.inside(path)) and has_pictures(listing, path)]


def is_shard(inside: str) -> bool:
    """A shard of a dataset, not what ``build_data.py`` keeps next to it (paths relative to the source)."""
    parts = PurePosixPath(inside)
    return parts.suffix == ".parquet" and parts.name != "rejected.parquet" and parts.parts[0] != "steps"


def has_pictures(listing: Listing, path: str) -> bool:
    """Whether a table has a column for pictures."""
    with open_place(listing.place(path)) as file:
        try:
            schema = pq.read_schema(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"source.path: {path} is not a Parquet file ({error}).", "Export it again.") from error
    column = first_of(IMAGE_COLUMNS, dict.fromkeys(schema.names))
    return column == "image" or (column is not None and holds_pictures(schema.field(column).type))


def list_items(listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
    """An item per row. Raises ConfigError for columns whose type does not fit their name, or source.masks."""
    refuse_masks(source)
    kept = set(paths)
    for path in listing.paths:
        own = listing.inside(path).startswith("steps/") or PurePosixPath(path).name in (*_OWN_FILES, "rejected.parquet")
        if path not in kept and not own and PurePosixPath(path).name != corrections.FILE:
            listing.unread.add("next to a table with pictures", listing.inside(path))
    items: list[Item] = []
    for path in paths:
        items += table_items(listing, path, source)
    return items


def refuse_masks(source: SourceConfig) -> None:
    """Shards bring their own masks."""
    if source.masks:
        raise ConfigError(
            f"source.masks={source.masks} would not be read: source.path={source.path} holds shards.",
            "Their masks are the column 'mask' (Parquet) or <key>.mask.png (tar); leave source.masks out.",
        )


def table_items(listing: Listing, path: str, source: SourceConfig) -> list[Item]:
    """An item per row of one table."""
    with open_place(listing.place(path)) as file:
        parquet = pq.ParquetFile(file)
        columns = column_map(path, parquet.schema_arrow, source)
        count = parquet.metadata.num_rows
        texts = corrected(listing, path, parquet)
        written = parquet.read(columns=[columns["text"]])[0].to_pylist() if columns["text"] else []
    listing.notes.extend(table_notes(path, columns, parquet.schema_arrow.names, written, count))
    shared = {"place": listing.place(path), "columns": columns, "several": has_several(columns, parquet.schema_arrow)}
    name = listing.named(path)
    return [{**shared, "name": f"{name}#{row}", "row": row, "text": texts.get(row)} for row in range(count)]


def table_notes(
    path: str, columns: dict[str, str], names: list[str], written: Sequence[object], rows: int
) -> list[str]:
    """Lines for the screen on the captions of a table. columns: that are read. names: of all. written: the captions."""
    other = [name for name in names if name not in columns.values()]
    line = caption_count(sum(map(bool, map(text_of, written))), rows)
    return [f"{path}: {line}", *no_captions(path, [*other, *filter(None, [columns["text"]])], None)]


def column_map(path: str, schema: pa.Schema, source: SourceConfig) -> dict[str, str]:
    """The table's own name of every column that is read; "" for one that it lacks.

    Raises:
        ConfigError: the type of a column does not fit its name; before a row is read.
    """
    names = dict.fromkeys(schema.names)
    check_caption_column(source.caption_column, schema.names, path)
    found: dict[str, str] = {}
    for role, row in _COLUMNS.items():
        chosen = source.caption_column if role == "text" else None
        name = first_of(row.names, names, chosen) or ""
        found[role] = name
        if name and not row.fits(schema.field(name).type):
            raise ConfigError(
                f"source.path: {path}: column '{name}' holds {schema.field(name).type}, not {row.wanted}.",
                "Convert it, or drop it if it means something else.",
            )
    return found


def holds_pictures(kind: pa.DataType) -> bool:
    """Encoded pictures: bytes, or the ``image`` feature of ``datasets``."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and holds_pictures(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def has_several(columns: dict[str, str], schema: pa.Schema) -> bool:
    """Whether a table may have several captions in a row. columns: by :func:`column_map`."""
    names = [columns[role] for role in ("captions", "text") if columns[role]]
    return any(is_list(schema.field(name).type) for name in names)


def row_captions(names: dict[str, str], row: dict[str, Any]) -> tuple[str, ...]:
    """All captions of a row, where there are several."""
    return captions_of(row.get(names["captions"])) or captions_of(row.get(names["text"]))


def holds_texts(kind: pa.DataType) -> bool:
    """A text, or a list of texts."""
    return holds_text(kind.value_type) if is_list(kind) else holds_text(kind)


def holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


@dataclass(frozen=True)
class Column:
    """A column that is read. names: what people call it. fits: whether a type can hold it."""

    names: tuple[str, ...]
    fits: Callable[[pa.DataType], bool]
    wanted: str


_COLUMNS: dict[str, Column] = {
    "image": Column(IMAGE_COLUMNS, holds_pictures, "the bytes of image files"),
    "mask": Column(("mask",), lambda kind: holds_pictures(kind) or pa.types.is_null(kind), "the bytes of image files"),
    "text": Column(CAPTION_COLUMNS, holds_texts, "a caption per row, as text or a list of texts"),
    "captions": Column((CAPTIONS,), lambda kind: True, ""),  # counts only where it is a list
    "license": Column(LICENSE_COLUMNS, holds_text, "the name of a licence, as text"),
    "origin": Column(("caption_origin",), holds_text, "who wrote the caption, as text"),
}


def corrected(listing: Listing, path: str, parquet: pq.ParquetFile) -> dict[int, str]:
    """Captions by row that a person has corrected in a file next to the shards, in place of the machine's."""
    edited = f"{path.rpartition('/')[0]}/{corrections.FILE}"
    if "id" not in parquet.schema_arrow.names or not listing.fs.exists(edited):
        return {}
    texts = corrections.parse(listing.fs.cat_file(edited).decode(), edited)
    ids = parquet.read(columns=["id"]).column("id").to_pylist()
    return {row: texts[key] for row, key in enumerate(ids) if key in texts}


# The row group that was read last: shards are consecutive rows, so each group is read about once.
_last_group: tuple[tuple[str, int], list[dict[str, Any]]] | None = None


def read_item(item: Item) -> Raw:
    """One row. A row group is read whole and kept until another one is wanted."""
    global _last_group
    names: dict[str, str] = item["columns"]
    with open_place(item["place"]) as file:
        parquet = pq.ParquetFile(file)
        first, group = 0, 0
        while item["row"] >= first + parquet.metadata.row_group(group).num_rows:
            first += parquet.metadata.row_group(group).num_rows
            group += 1
        if _last_group is None or _last_group[0] != (item["place"], group):
            columns = list(filter(None, names.values()))
            _last_group = (item["place"], group), parquet.read_row_group(group, columns=columns).to_pylist()
    row = _last_group[1][item["row"] - first]
    data = image_bytes(row[names["image"]])
    mask = image_bytes(row.get(names["mask"]))
    error = "" if data is not None else f"row {item['row']} has no bytes in its column '{names['image']}'"
    text = text_of(item["text"] or row.get(names["text"]))
    origin = "" if item["text"] else row.get(names["origin"])  # a corrected caption is a person's
    license_name = row.get(names["license"])
    return Raw(
        item["name"],
        data,
        text,
        mask=mask,
        license=license_name,
        error=error,
        origin=origin or "source",
        captions=() if item["text"] else row_captions(names, row),
    )


def image_bytes(value: Any) -> bytes | None:
    """The bytes of a picture, whether the column holds them or the ``image`` feature of ``datasets``."""
    return value.get("bytes") if isinstance(value, dict) else value

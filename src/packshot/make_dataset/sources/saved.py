"""Folders that ``datasets`` wrote with ``save_to_disk``: read through that library, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packshot.config.schema import SourceConfig
from packshot.errors import ConfigError
from packshot.lists import ending
from packshot.make_dataset.sources.base import Item, Listing, Raw, open_place, text_of
from packshot.make_dataset.sources.tables import (
    column_map,
    has_several,
    image_bytes,
    refuse_masks,
    row_captions,
    table_notes,
)

if TYPE_CHECKING:
    from datasets import Dataset

# The folder that was opened last, memory-mapped.
_last_folder: tuple[str, Dataset] | None = None


def claims(listing: Listing) -> list[str]:
    """The state file of every split."""
    splits = {path.rpartition("/")[0] for path in ending(listing.paths, ".arrow")}
    return sorted({f"{split}/state.json" for split in splits} & set(listing.paths))


def opened(folder: str) -> Dataset:
    """One split, its pictures as their files are."""
    global _last_folder
    if _last_folder is None or _last_folder[0] != folder:
        from datasets import Image, load_from_disk

        loaded: Any = load_from_disk(folder)
        for name, feature in loaded.features.items():
            if isinstance(feature, Image):
                loaded = loaded.cast_column(name, Image(decode=False))
        _last_folder = folder, loaded
    return _last_folder[1]


def list_items(listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
    """An item per row. Raises ConfigError for columns whose type does not fit their name, or source.masks."""
    refuse_masks(source)
    items: list[Item] = []
    for path in paths:
        folder = listing.place(path).rpartition("/")[0]
        data = opened(folder)
        columns = column_map(folder, data.features.arrow_schema, source)
        if not columns["image"]:
            raise ConfigError(f"source.path: {folder} has no column 'image'.", f"Its columns: {data.column_names}.")
        written = list(data[columns["text"]]) if columns["text"] else []
        listing.notes.extend(table_notes(folder, columns, data.column_names, written, len(data)))
        name = listing.named(path.rpartition("/")[0]).rstrip("/")
        shared = {"place": folder, "columns": columns, "several": has_several(columns, data.features.arrow_schema)}
        for row in range(len(data)):
            items.append({**shared, "name": f"{name}#{row}", "row": row})
    return items


def read_item(item: Item) -> Raw:
    """One row; a picture that is only named is read from its file."""
    row: dict[str, Any] = opened(item["place"])[item["row"]]
    names: dict[str, str] = item["columns"]
    value = row[names["image"]]
    data = image_bytes(value)
    error = ""
    if data is None and isinstance(value, dict) and value.get("path"):
        try:
            with open_place(value["path"]) as file:
                data = file.read()
        except OSError as problem:
            error = f"{value['path']}: {problem.strerror}"
    elif data is None:
        error = f"row {item['row']} has no picture in its column '{names['image']}'"
    text = text_of(row.get(names["text"]))
    return Raw(
        item["name"],
        data,
        text,
        mask=image_bytes(row.get(names["mask"])),
        license=row.get(names["license"]),
        error=error,
        captions=row_captions(names, row),
    )

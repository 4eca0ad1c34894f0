"""Lists of pictures: a CSV, JSON, JSON lines or Parquet table whose rows name files or URLs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from packshot.config.schema import SourceConfig
from packshot.dataset.rows import CAPTIONS
from packshot.errors import ConfigError
from packshot.imaging.files import is_image
from packshot.lists import column
from packshot.make_dataset.sources.base import (
    FILE_COLUMNS,
    Item,
    Listing,
    Raw,
    caption_count,
    check_caption_column,
    described_row,
    first_of,
    no_captions,
    read_place,
    with_captions,
)
from packshot.make_dataset.sources.downloads import DownloadError, fetch, forget_failures
from packshot.make_dataset.sources.tables import refuse_masks
from packshot.make_dataset.sources.tabular import columns_of, is_table_file, read_rows

URL_COLUMNS = ("url", "image_url", "img_url", "link")
CHECKSUMS = ("sha256", "md5")


def claims(listing: Listing) -> list[str]:
    """The one table that the source is, or the tables of a folder without images."""
    tables = list(filter(is_table_file, listing.paths))
    if listing.root in tables or (listing.root.lower().endswith(".json") and listing.root in listing.paths):
        return [listing.root]
    return [] if any(map(is_image, listing.paths)) else tables


def list_items(listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
    """An item per row. Raises ConfigError for a table without a column of files or URLs, or source.masks."""
    refuse_masks(source)
    items: list[Item] = []
    for path in sorted(set(listing.paths) - set(paths)):
        listing.unread.add("next to lists", listing.inside(path))
    for path in paths:
        items += list_rows(listing, path, source)
    if not items:
        raise ConfigError(f"source.path={source.path}: its list is empty.", "Each row names one picture.")
    remote = sum(column(items, "url"))
    if remote:
        listing.notes.append(f"{remote} of {len(items)} images are downloaded to {listing.cache} and kept there")
        forget_failures(listing.cache)
    listing.notes.append(caption_count(sum(map(bool, column(items, "text"))), len(items)))
    return items


def list_rows(listing: Listing, path: str, source: SourceConfig) -> list[Item]:
    """The items of one table."""
    items: dict[tuple[str, ...], Item] = {}
    limits = {
        "seconds": source.download_seconds,
        "mebibytes": source.download_mib,
        "retries": source.download_retries,
    }
    rows, notes = read_rows(listing.place(path))
    if rows:
        check_caption_column(source.caption_column, columns_of(rows), listing.named(path))
        columns = [name for name in columns_of(rows) if name.lower() not in (*URL_COLUMNS, *CHECKSUMS)]
        notes += no_captions(listing.named(path), columns, source.caption_column)
    for number, row in enumerate(rows):
        target = target_of(row)
        if target is None:
            raise no_target(path, number, row)
        described = described_row(row, source.caption_column)
        place = place_of(listing.place(path), target)
        checksums = {name: str(row[name]).lower() for name in CHECKSUMS if row.get(name)}
        key = (place, *checksums.values())
        if key in items:  # lists with a row for each caption
            items[key] |= with_captions(items[key], described)
            continue
        items[key] = {
            "name": f"{listing.named(path)}#{number}",
            "place": place,
            "url": target.startswith(("http://", "https://")),
            **described,
            "checksums": checksums,
            "cache": listing.cache,
            "limits": limits,
        }
    if len(items) < len(rows):
        again = len(rows) - len(items)
        notes.append(
            f"{listing.named(path)}: {again} of {len(rows)} rows name a picture again; its captions are joined"
        )
    listing.notes.extend(notes)
    return list(items.values())


def no_target(path: str, number: int, row: dict[str, Any]) -> ConfigError:
    """The error for a row of a table that names no picture."""
    columns = f"{', '.join(FILE_COLUMNS[:4])} or {URL_COLUMNS[0]}"
    return ConfigError(
        f"source.path: {path}, row {number} names no picture in a column like {columns}.",
        f"Its columns: {', '.join(row)}.",
    )


def place_of(table: str, target: str) -> str:
    """Where the picture lies that a row names: a URL, or a path relative to its table, also with Windows' slashes."""
    if "://" in target:
        return target
    if "://" in table:  # on a remote store
        return f"{table.rpartition('/')[0]}/{target}"
    place = PurePosixPath(table).parent / target
    if "\\" in target and not os.path.exists(place):
        place = PurePosixPath(table).parent / target.replace("\\", "/")
    return str(place)


def target_of(row: dict[str, Any]) -> str | None:
    """The file or URL that a row names; a file comes before a URL."""
    for name in (*FILE_COLUMNS, *URL_COLUMNS):
        value = row.get(first_of((name,), row) or "")
        if isinstance(value, str) and value.strip():
            return value.strip()
    return None


def read_item(item: Item) -> Raw:
    """The bytes of a listed picture, downloaded unless they were before."""
    try:
        if item["url"]:
            data = fetch(item["place"], Path(item["cache"]), **item["limits"])
        else:
            data = read_place(item["place"].removeprefix("file://"))
    except DownloadError as error:
        return Raw(item["name"], None, error=str(error))
    for kind, wanted in item["checksums"].items():
        found = hashlib.new(kind, data, usedforsecurity=False).hexdigest()
        if found != wanted:
            return Raw(item["name"], None, error=f"its {kind} is {found}, not {wanted}")
    return Raw(item["name"], data, item["text"], license=item["license"] or None, captions=tuple(item[CAPTIONS]))

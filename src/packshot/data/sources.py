"""What there is to build from: images in a folder, behind a glob, or in Parquet; local or on any fsspec store.

An item names one image without reading it. Reading happens in the workers, a sample at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow.parquet as pq

from packshot.config.schema import SourceConfig
from packshot.core.errors import ConfigError
from packshot.core.run import log
from packshot.core.storage import resolve
from packshot.data.decode import IMAGE_SUFFIXES

Item = dict[str, Any]


@dataclass(frozen=True)
class Raw:
    """The bytes of one sample. data: of the image file, None when it cannot be read (``error`` says why)."""

    name: str
    data: bytes | None
    text: str = ""
    mask: bytes | None = None
    license: str | None = None
    error: str = ""


def list_items(source: SourceConfig) -> list[Item]:
    """Every image of the source, sorted by path.

    A file's caption lies beside it as ``<file>.txt`` or ``<stem>.txt``; its mask in ``source.masks`` under the same
    path or stem. A Parquet dataset brings its own ``text``, ``mask`` and ``license`` columns, if it has them.

    Raises:
        ConfigError: nothing there, no image there, a Parquet without images, or no driver for the store.
    """
    fs, root = _open(source.path)
    if any(char in root for char in "*?["):
        paths, base = sorted(fs.glob(root)), root[: root.index(next(c for c in root if c in "*?["))].rpartition("/")[0]
    elif not fs.exists(root):
        raise ConfigError(f"source.path={source.path}: no such file or folder.", f"Looked for {root}.")
    elif fs.isdir(root):
        paths, base = sorted(fs.find(root)), root.rstrip("/")
    else:
        paths, base = [root], root.rpartition("/")[0]
    tables = [path for path in paths if _is_table(path[len(base) :].lstrip("/"))]
    if tables:  # a dataset; pictures beside its shards (a contact sheet) belong to its documentation
        return [item for path in tables for item in _table_items(fs, path, base)]
    images = [path for path in paths if _is_image(path) or path == root]
    masks = _masks(source)
    if source.masks:
        images = [path for path in images if path not in masks.values()]
    if not images:
        raise ConfigError(
            f"source.path={source.path} holds no image ({len(paths)} files).",
            f"Known are {' '.join(sorted(IMAGE_SUFFIXES))} and .parquet.",
        )
    known = set(paths)
    return [_file_item(fs, path, base, known, masks) for path in images]


def read_items(items: Sequence[Item]) -> Iterator[Raw]:
    """The samples behind items, in order."""
    for item in items:
        yield _read_row(item) if "row" in item else _read_file(item)


def fingerprint(items: Sequence[Item]) -> str:
    """Digest over names and contents (image, mask, caption) of a shard."""
    digest = hashlib.sha256()
    for raw in read_items(items):
        texts = (raw.name, raw.text, raw.license or "", raw.error)
        for part in (*(text.encode() for text in texts), raw.data or b"", raw.mask or b""):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _open(path: str) -> tuple[Any, str]:
    try:
        return fsspec.url_to_fs(path if "://" in path else str(resolve(path).absolute()))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{path} cannot be opened: {error}", "s3:// needs the package s3fs.") from error


def _is_table(inside: str) -> bool:
    """A shard of a dataset, not what ``build_data.py`` keeps beside it (paths relative to the source)."""
    parts = PurePosixPath(inside)
    return parts.suffix == ".parquet" and parts.name != "rejected.parquet" and parts.parts[0] != "steps"


def _is_image(path: str) -> bool:
    parts = PurePosixPath(path)
    return parts.suffix.lower() in IMAGE_SUFFIXES and not parts.name.startswith(".")


def _masks(source: SourceConfig) -> dict[str, str]:
    """Mask files by their path inside ``source.masks``, with and without suffix."""
    if not source.masks:
        return {}
    fs, root = _open(source.masks)
    if not fs.isdir(root):
        raise ConfigError(f"source.masks={source.masks} is no folder.", f"Looked for {root}.")
    found = {}
    for path in filter(_is_image, sorted(fs.find(root))):
        inside = path[len(root) :].lstrip("/")
        found[str(PurePosixPath(inside).with_suffix(""))] = path
        found[inside] = path
    if not found:
        raise ConfigError(f"source.masks={source.masks} holds no image.", "One mask per image, with its file name.")
    return found


def _file_item(fs: Any, path: str, base: str, known: set[str], masks: dict[str, str]) -> Item:
    inside = path[len(base) :].lstrip("/")
    stem = str(PurePosixPath(path).with_suffix(""))
    text = next((beside for beside in (f"{path}.txt", f"{stem}.txt") if beside in known or fs.exists(beside)), None)
    mask = masks.get(inside) or masks.get(str(PurePosixPath(inside).with_suffix("")))
    url = fs.unstrip_protocol
    return {
        "name": f"{PurePosixPath(base).name}/{inside}",
        "url": url(path),
        "text": text and url(text),
        "mask": mask and url(mask),
    }


def _read_file(item: Item) -> Raw:
    try:
        data = _bytes(item["url"])
        text = _bytes(item["text"]).decode("utf-8", errors="replace").strip() if item["text"] else ""
        return Raw(item["name"], data, text, _bytes(item["mask"]) if item["mask"] else None)
    except OSError as error:
        return Raw(item["name"], None, error=error.strerror or str(error))


def _bytes(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return file.read()  # type: ignore[union-attr]


def _table_items(fs: Any, path: str, base: str) -> list[Item]:
    with fs.open(path) as file:
        try:
            parquet = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"source.path: {path} is no Parquet file ({error}).", "Export it again.") from error
        if "image" not in parquet.schema_arrow.names:
            names = ", ".join(parquet.schema_arrow.names)
            raise ConfigError(f"source.path: {path} has no column 'image'.", f"Its columns: {names}.")
        log.info("%s: %d rows", path, parquet.metadata.num_rows)
        name, url = f"{PurePosixPath(base).name}/{path[len(base) :].lstrip('/')}", fs.unstrip_protocol(path)
        return [{"name": f"{name}#{row}", "url": url, "row": row} for row in range(parquet.metadata.num_rows)]


# The row group that was read last: shards are consecutive rows, so each group is read about once.
_last_group: tuple[tuple[str, int], list[dict[str, Any]]] | None = None


def _read_row(item: Item) -> Raw:
    global _last_group
    with fsspec.open(item["url"], "rb") as file:
        parquet = pq.ParquetFile(file)
        first, group = 0, 0
        while item["row"] >= first + parquet.metadata.row_group(group).num_rows:
            first += parquet.metadata.row_group(group).num_rows
            group += 1
        if _last_group is None or _last_group[0] != (item["url"], group):
            columns = [n for n in ("image", "text", "mask", "license") if n in parquet.schema_arrow.names]
            _last_group = (item["url"], group), parquet.read_row_group(group, columns=columns).to_pylist()
    row = _last_group[1][item["row"] - first]
    data, mask = _image_bytes(row["image"]), _image_bytes(row.get("mask"))
    error = "" if data is not None else "the row holds no image bytes"
    return Raw(item["name"], data, row.get("text") or "", mask, row.get("license"), error)


def _image_bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value

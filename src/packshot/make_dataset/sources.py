"""What there is to build from: images in a folder, behind a glob, in Parquet or tar shards; local or on any store.

An item names one image without reading it. Reading happens in the workers, a sample at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from packshot.config.schema import SourceConfig
from packshot.dataset import corrections
from packshot.errors import ConfigError
from packshot.imaging.files import IMAGE_SUFFIXES, is_image, pair_masks
from packshot.make_dataset.tars import read_member, tar_items
from packshot.runs.files import resolve
from packshot.runs.folder import log

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
    path or stem. A Parquet dataset brings its own ``text``, ``mask`` and ``license`` columns, if it has them, and
    the captions that were corrected beside its shards; for tar shards see :func:`tar_items`.

    Raises:
        ConfigError: nothing there, no image there, a Parquet without images or beside ``source.masks``, masks of which
            none or several belong to an image, or no driver for the store.
    """
    fs, root = _open(source.path)
    paths, base = _found(fs, root, source.path)
    tables = [path for path in paths if _is_table(path[len(base) :].lstrip("/"))]
    tars = [path for path in paths if path.endswith(".tar")]
    if (tables or tars) and source.masks:
        raise ConfigError(
            f"source.masks={source.masks} would not be looked at: source.path={source.path} holds shards.",
            "Their masks are the column 'mask' (Parquet) or <key>.mask.png (tar); leave source.masks out.",
        )
    if tables:  # a dataset; pictures beside its shards (a contact sheet) belong to its documentation
        return [item for path in tables for item in _table_items(fs, path, base)]
    if tars:
        return [item for path in tars for item in tar_items(fs, path, _named(path, base))]
    given = _mask_files(source)
    own = set(given.values())
    images = [path for path in paths if (is_image(path) or path == root) and fs.unstrip_protocol(path) not in own]
    if not images:
        raise ConfigError(
            f"source.path={source.path} holds no image ({len(paths)} files).",
            f"Known are {' '.join(IMAGE_SUFFIXES)}, .parquet and .tar.",
        )
    inside = {path: path[len(base) :].lstrip("/") for path in images}
    masks = _masks(source, list(inside.values()), given) if source.masks else {}
    known = set(paths)
    return [_file_item(fs, path, base, known, masks.get(inside[path])) for path in images]


def _found(fs: Any, root: str, given: str) -> tuple[list[str], str]:
    """The files behind a path, sorted, and the folder that their names are relative to."""
    if fs.exists(root):  # before it is taken for a glob: names may hold brackets
        return (sorted(fs.find(root)), root.rstrip("/")) if fs.isdir(root) else ([root], root.rpartition("/")[0])
    wild = next((position for position, char in enumerate(root) if char in "*?["), None)
    if wild is None:
        raise ConfigError(f"source.path={given}: no such file or folder.", f"Looked for {root}.")
    return sorted(fs.glob(root)), root[:wild].rpartition("/")[0]


def read_items(items: Sequence[Item]) -> Iterator[Raw]:
    """The samples behind items, in order."""
    for item in items:
        yield next(read(item) for mark, read in _READERS.items() if mark in item)


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


def _mask_files(source: SourceConfig) -> dict[str, str]:
    """URLs of the mask files by their path inside ``source.masks``."""
    if not source.masks:
        return {}
    fs, root = _open(source.masks)
    if not fs.isdir(root):
        raise ConfigError(f"source.masks={source.masks} is no folder.", f"Looked for {root}.")
    found = {path[len(root) :].lstrip("/"): fs.unstrip_protocol(path) for path in sorted(fs.find(root))}
    masks = {inside: url for inside, url in found.items() if is_image(inside)}
    if not masks:
        raise ConfigError(f"source.masks={source.masks} holds no image.", "One mask per image, with its file name.")
    return masks


def _masks(source: SourceConfig, images: Sequence[str], given: dict[str, str]) -> dict[str, str]:
    """URL of the mask of every image that has one; images and masks by their path inside their folders."""
    pairs = pair_masks(f"source.masks={source.masks}", images, given)
    if not pairs:
        raise ConfigError(
            f"source.masks={source.masks} has a mask for none of the {len(images)} images of source.path.",
            f"Looked for {mask_pattern(images[0])} and the like; it holds {next(iter(given))} and the like.",
        )
    if len(pairs) < len(images):
        log.warning("source.masks=%s has no mask for %d images", source.masks, len(images) - len(pairs))
    return {image: given[mask] for image, mask in pairs.items()}


def mask_pattern(image: str) -> str:
    """What is looked for in ``source.masks``, for an image by its path inside the source."""
    return f"{PurePosixPath(image).with_suffix('')}.*"


def _named(path: str, base: str) -> str:
    """How tables and messages call a file: by the source's last name and its path inside."""
    return f"{PurePosixPath(base).name}/{path[len(base) :].lstrip('/')}"


def _file_item(fs: Any, path: str, base: str, known: set[str], mask: str | None) -> Item:
    stem = str(PurePosixPath(path).with_suffix(""))
    text = next((beside for beside in (f"{path}.txt", f"{stem}.txt") if beside in known or fs.exists(beside)), None)
    url = fs.unstrip_protocol
    return {
        "name": _named(path, base),
        "url": url(path),
        "text": text and url(text),
        "mask": mask,
    }


def _read_file(item: Item) -> Raw:
    try:
        data = _bytes(item["url"])
        text = _bytes(item["text"]).decode("utf-8", errors="replace").strip() if item["text"] else ""
        return Raw(item["name"], data, text, _bytes(item["mask"]) if item["mask"] else None)
    except OSError as error:
        return Raw(item["name"], None, error=error.strerror or str(error))


def _read_shard(item: Item) -> Raw:
    try:
        return Raw(item["name"], **read_member(item))
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
        _check_columns(path, parquet.schema_arrow)
        log.info("%s: %d rows", path, parquet.metadata.num_rows)
        texts = _corrected(fs, path, parquet)
        name, url = _named(path, base), fs.unstrip_protocol(path)
        rows = range(parquet.metadata.num_rows)
        return [{"name": f"{name}#{row}", "url": url, "row": row, "text": texts.get(row)} for row in rows]


def _check_columns(path: str, schema: pa.Schema) -> None:
    """Refuses a table whose columns are not what their names say: by its types, before a row is read."""
    if "image" not in schema.names:
        raise ConfigError(f"source.path: {path} has no column 'image'.", f"Its columns: {', '.join(schema.names)}.")
    for name, (fits, wanted) in _COLUMNS.items():
        if name in schema.names and not fits(schema.field(name).type):
            raise ConfigError(
                f"source.path: {path}: column '{name}' holds {schema.field(name).type}, not {wanted}.",
                "Convert it, or drop it if it means something else.",
            )


def _holds_pictures(kind: pa.DataType) -> bool:
    """Encoded pictures: bytes, or the ``image`` feature of ``datasets``."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_pictures(kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


_PICTURES = "the bytes of image files"
_COLUMNS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "image": (_holds_pictures, _PICTURES),
    "mask": (lambda kind: _holds_pictures(kind) or pa.types.is_null(kind), _PICTURES),
    "text": (_holds_text, "one caption per row, as text"),
    "license": (_holds_text, "the name of a licence, as text"),
}


def _corrected(fs: Any, path: str, parquet: pq.ParquetFile) -> dict[int, str]:
    """Captions by row that a person has corrected beside the shards, in place of the machine's."""
    beside = f"{path.rpartition('/')[0]}/{corrections.FILE}"
    if "id" not in parquet.schema_arrow.names or not fs.exists(beside):
        return {}
    texts = corrections.parse(fs.cat_file(beside).decode(), beside)
    ids = parquet.read(columns=["id"]).column("id").to_pylist()
    return {row: texts[key] for row, key in enumerate(ids) if key in texts}


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
    error = "" if data is not None else f"row {item['row']} has no bytes in its column 'image'"
    return Raw(item["name"], data, item["text"] or row.get("text") or "", mask, row.get("license"), error)


def _image_bytes(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


# By what an item of the kind has: how its sample is read. Files have neither of the first two.
_READERS: dict[str, Callable[[Item], Raw]] = {"row": _read_row, "spans": _read_shard, "url": _read_file}

"""What all kinds of sources share: the sample that is read, the places it is read from, and what was not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec

from packshot.dataset.rows import CAPTIONS
from packshot.dataset.text_files import CAPTION_COLUMNS
from packshot.dataset.walk import Unread
from packshot.errors import ConfigError
from packshot.lists import in_words

Item = dict[str, Any]
LICENSE_COLUMNS = ("license", "licence")
# Columns of tables that name files.
FILE_COLUMNS = (
    "file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "img_path", "image", "img",
    "image_file", "image_name", "img_name",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """The bytes of one sample.

    data: of the image file, None when it cannot be read, for the reason in ``error``.
    text: the caption, "" where there is none.
    encoding: what the caption was read as, "" for UTF-8.
    repeats: how often training should see the picture in an epoch.
    origin: who wrote the caption, where the source names them.
    captions: all captions, where there are several; ``text`` is the first.
    """

    name: str
    data: bytes | None
    text: str = ""
    encoding: str = ""
    mask: bytes | None = None
    license: str | None = None
    error: str = ""
    repeats: int = 1
    origin: str = "source"
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The regular files behind ``source.path``.

    fs: their fsspec file system. root: the path inside it. base: the folder that names are relative to.
    paths: sorted, hidden ones left out. cache: the folder in which downloads may be kept. notes: what the person should
    know, for the screen once the run has begun.
    """

    fs: Any
    given: str
    root: str
    base: str
    paths: list[str]
    unread: Unread
    cache: str
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether the source is a folder, so that all of its files are listed."""
        return self.root.rstrip("/") == self.base

    def inside(self, path: str) -> str:
        """A path relative to the source."""
        return path[len(self.base) :].lstrip("/")

    def named(self, path: str) -> str:
        """How tables and messages call a file: by the source's last name and its path inside."""
        return f"{PurePosixPath(self.base).name}/{self.inside(path)}"

    def place(self, path: str) -> str:
        """Where a worker reads a file: a plain path on this machine, a URL elsewhere."""
        return path if is_local(self.fs) else self.fs.unstrip_protocol(path)


def is_local(fs: Any) -> bool:
    protocol = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return "file" in protocol


def open_place(place: str) -> Any:
    """A readable binary file. Plain paths never pass fsspec: it takes "::" in a name for a chain of URLs."""
    if place.startswith("/"):
        return open(place, "rb")
    return fsspec.open(place, "rb").open()


def read_place(place: str) -> bytes:
    """The content of a file."""
    with open_place(place) as file:
        return file.read()


def first_of(names: tuple[str, ...], values: Mapping[str, object], chosen: str | None = None) -> str | None:
    """The first of the names that the values have, in lower case or any; ``chosen`` comes before them."""
    for name in (chosen, *names) if chosen else names:
        if name in values:
            return name
    lowered = {str(name).strip().lower(): name for name in values}
    return next(filter(None, map(lowered.get, names)), None)


def text_of(value: object) -> str:
    """A caption from a cell: text as it is, nothing for an empty cell, the first that is not empty of several."""
    if isinstance(value, (list, tuple)):
        value = next((text for text in value if text and str(text).strip()), "")
    if value is None or value != value:  # NaN, as pandas writes an empty cell
        return ""
    return str(value).strip()


def captions_of(value: object) -> tuple[str, ...]:
    """The captions of a cell that holds a list of two or more; none of another cell."""
    texts = tuple(filter(None, map(text_of, value))) if isinstance(value, (list, tuple)) else ()
    return texts if len(texts) > 1 else ()


def described_by(values: object, caption_column: str | None) -> dict[str, str]:
    """``text`` and ``license`` of a table's row or a JSON object, under any of the usual keys."""
    if not isinstance(values, dict):
        return {}
    return {
        "text": text_of(values.get(first_of(CAPTION_COLUMNS, values, caption_column) or "")),
        "license": text_of(values.get(first_of(LICENSE_COLUMNS, values) or "")),
    }


def described_row(row: Mapping[str, object], caption_column: str | None) -> dict[str, Any]:
    """:func:`described_by` of a table's row, with all its captions where it has several."""
    cell = row.get(first_of(CAPTION_COLUMNS, row, caption_column) or "")
    return {**described_by(row, caption_column), CAPTIONS: captions_of(cell)}


def check_caption_column(key: str | None, columns: list[str], where: str) -> None:
    """Raises ConfigError when ``source.caption_column`` is not among the columns."""
    if key and key not in columns:
        raise ConfigError(
            f"source.caption_column={key}: {where} has no such column.", f"Its columns: {', '.join(columns)}."
        )


def no_captions(where: str, columns: list[str], chosen: str | None) -> list[str]:
    """A line for the screen on a table without a column of captions, where it has columns that might be one."""
    other = [name for name in columns if str(name).lower() not in (*FILE_COLUMNS, *LICENSE_COLUMNS)]
    if not other or chosen or first_of(CAPTION_COLUMNS, dict.fromkeys(columns)):
        return []
    return [
        f"{where} has no column of captions, but {', '.join(map(str, other))}: source.caption_column=<name> reads one"
    ]


def with_captions(known: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A described row with the captions of a further row on the same picture."""
    texts: list[str] = []
    for described in (known, row):
        texts += described[CAPTIONS] or filter(None, [described["text"]])
    texts = list(dict.fromkeys(texts))
    return {**known, "text": texts[0] if texts else "", CAPTIONS: tuple(texts) if len(texts) > 1 else ()}


def caption_count(captioned: int, images: int) -> str:
    """The line on the screen with the number of captions that were found."""
    hint = "" if captioned else "; captioner=florence2 writes them, docs/datasets.md names where they are looked for"
    return f"{captioned} of {images} images have a caption{hint}"


def by_extension(names: list[str]) -> str:
    """ "3 .json, 1 .md" """
    counts = Counter(PurePosixPath(name).suffix or PurePosixPath(name).name for name in names)
    return in_words(dict(counts.most_common()))

"""Text and tables as people have them: in any of the usual encodings, with any of the usual separators."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from packshot.errors import ConfigError

csv.field_size_limit(2**27)  # Python's own limit of 128 KiB cuts embedded data URLs
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1f]")


class EncodingError(ValueError):
    """The bytes are not text in an encoding that can be recognised."""


def decode_text(data: bytes) -> tuple[str, str]:
    """(text, encoding); the encoding is "" for plain UTF-8 and otherwise names what the bytes were read as.

    A byte order mark decides. Without one the bytes are UTF-8, else UTF-16 where every second byte is zero, else
    Windows-1252, which editors on Windows write.

    Raises:
        EncodingError: none of them fits.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return decoded(data[len(mark) :], encoding), "" if encoding == "utf-8" else encoding
    if guess := utf16_without_mark(data):
        return decoded(data, guess), guess
    try:
        return clean(data.decode("utf-8")), ""
    except UnicodeDecodeError:
        if _CONTROL.search(data):
            raise EncodingError("not text: it has control characters") from None
        return decoded(data, "windows-1252"), "windows-1252"


def decoded(data: bytes, encoding: str) -> str:
    """The bytes as clean text.

    Raises:
        EncodingError: they are not in that encoding.
    """
    try:
        return clean(data.decode(encoding))
    except UnicodeDecodeError as error:
        raise EncodingError(
            f"not {encoding}: byte {data[error.start]:#04x} at {error.start}; save it as UTF-8"
        ) from error


def utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 of mostly Latin text has a zero in every other byte; UTF-8 text has none."""
    if len(data) < 4 or len(data) % 2:
        return None
    if data[1::2].count(0) > 0.7 * len(data) / 2:
        return "utf-16-le"
    return "utf-16-be" if data[0::2].count(0) > 0.7 * len(data) / 2 else None


def clean(text: str) -> str:
    """Without zero characters, which no tokenizer expects, and outer white space."""
    return text.replace("\0", "").replace("\r\n", "\n").strip()


def csv_rows(text: str) -> list[dict[str, str]]:
    """Rows under the names of the first line; the separator is the one that the first line has most of."""
    if text.lower().startswith("sep="):  # a hint that Excel writes
        text = text.partition("\n")[2]
    header = text.partition("\n")[0]
    separator = max(",;\t|", key=header.count)
    rows = []
    for row in csv.DictReader(io.StringIO(text, newline=None), delimiter=separator):
        row.pop(None, None)  # type: ignore[call-overload]  # cells beyond the header
        rows.append({name.strip(): value for name, value in row.items() if name})
    return rows


def json_rows(text: str, where: str) -> list[dict[str, Any]]:
    """One object per line; blank lines are passed over. where: names the table in an error.

    Raises:
        ConfigError: a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}, line {number} is not JSON ({error}).", "Each line is one object.") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{where}, line {number} is not an object.", "Each line is one object.")
        rows.append(row)
    return rows


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """The rows of a table on the disk: JSON lines by the ending .jsonl or .ndjson, else CSV. key: names it in errors.

    Raises:
        ConfigError: it cannot be read, or it is not a table.
    """
    try:
        text, _ = decode_text(path.read_bytes())
    except (OSError, EncodingError) as error:
        raise ConfigError(f"{key}={path} cannot be read ({error}).", "Expected a table, .csv or .jsonl.") from error
    return json_rows(text, f"{key}={path}") if path.suffix in (".jsonl", ".ndjson") else csv_rows(text)

"""Text and tables as people have them: in any of the usual encodings, with any of the usual separators."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from itertools import repeat
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


# Columns and keys in which people keep captions, in any case; the first that is there counts.
CAPTION_COLUMNS = ("text", "caption", "prompt", "description", "captions", "txt", "alt", "alt_text")
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
        text = decoded(data, "windows-1252")
        if len(re.findall(r"[^\x00-\x7f]", text)) > max(8, 0.4 * len(text)):  # of Western text a tenth at most
            raise EncodingError("in an encoding that cannot be told; save it as UTF-8") from None
        return text, "windows-1252"


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


def csv_rows(text: str, texts: Sequence[str] = CAPTION_COLUMNS) -> list[dict[str, str]]:
    """Rows under the names of the first line; the separator is the one that the first line has most of.

    What a row has beyond the last column belongs to that one if it is one of ``texts``: people write commas in captions
    without quotes.

    Raises:
        csv.Error: a row has more cells than columns, and the last column is another one.
    """
    if text.lower().startswith("sep="):  # a hint that Excel writes
        text = text.partition("\n")[2]
    header = text.partition("\n")[0]
    separator = max(",;\t|", key=header.count)
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=None), restkey="", delimiter=separator)
    for row in reader:
        beyond = row.pop("", None) or []
        cells = {name.strip(): value for name, value in row.items() if name}
        if isinstance(beyond, list) and any(map(str.strip, beyond)):
            last = list(cells)[-1]
            if last.lower() not in texts:
                quoted = f"put a cell that holds {separator!r} in quotes"
                raise csv.Error(f"line {reader.line_num} has more cells than the {len(cells)} columns; {quoted}")
            cells[last] = separator.join([cells[last], *beyond])
        rows.append(cells)
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


def document_rows(text: str, where: str) -> list[dict[str, Any]]:
    """The rows of a JSON document; a file's name that the document has as a key stands under ``file_name``.

    It is an array of objects or of file names, an object of file names with a caption, captions or an object each, or
    COCO's captions (``images`` and ``annotations``). Several documents, one on each line, are JSON lines.

    Raises:
        ConfigError: it is none of these.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return json_rows(text, where)
    if isinstance(document, dict) and isinstance(document.get("annotations"), list):
        return coco_rows(document, where)
    names: Iterable[str | None] = document if isinstance(document, dict) else repeat(None)
    values = document.values() if isinstance(document, dict) else document
    rows: list[dict[str, Any]] = []
    for name, value in zip(names, values if isinstance(values, Iterable) else [values], strict=False):
        row = described_file(name, value)
        if row is None:
            raise ConfigError(
                f"{where}: {name or f'entry {len(rows)}'} is neither a caption nor an object.",
                "A list of captions is an array of objects, or an object of file names and captions.",
            )
        rows.append(row)
    return rows


def described_file(name: str | None, value: object) -> dict[str, Any] | None:
    """An entry of a JSON document as a row; None where it is not one. name: its key, of an object."""
    if isinstance(value, dict):
        return {**value, "file_name": name} if name is not None else value
    if name is None:
        return {"file_name": value} if isinstance(value, str) else None
    captions = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return {"file_name": name, "text": value} if captions or isinstance(value, str) else None


def coco_rows(document: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A row per image of COCO's captions: ``file_name``, ``text`` with all captions of the image, ``license``.

    Raises:
        ConfigError: an image without ``id`` or ``file_name``.
    """
    captions: dict[object, list[str]] = {}
    for annotation in document["annotations"]:
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"].strip())
    licenses: dict[object, object] = {}
    for known in document.get("licenses") or []:
        licenses[known["id"]] = known.get("name", "")
    rows = []
    for image in document.get("images") or []:
        if not isinstance(image, dict) or not {"id", "file_name"} <= set(image):
            raise ConfigError(f"{where}: an image without id or file_name.", "COCO's images have both.")
        row = {"file_name": image["file_name"], "text": captions.get(image["id"], [])}
        rows.append({**row, "license": licenses.get(image.get("license"), "")})
    return rows


def read_records(path: Path, key: str) -> list[dict[str, Any]]:
    """The rows of a table on the disk: JSON lines by the ending .jsonl or .ndjson, else CSV. key: names it in errors.

    Raises:
        ConfigError: it cannot be read, or it is not a table.
    """
    try:
        text, _ = decode_text(path.read_bytes())
        return json_rows(text, f"{key}={path}") if path.suffix in (".jsonl", ".ndjson") else csv_rows(text)
    except (OSError, EncodingError, csv.Error) as error:
        raise ConfigError(f"{key}={path} cannot be read ({error}).", "Expected a table, .csv or .jsonl.") from error

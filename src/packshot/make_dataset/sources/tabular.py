"""Tables of text: CSV in any dialect and encoding, JSON lines, Parquet; as a list of rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packshot.errors import ConfigError
from packshot.make_dataset.sources.base import open_place, read_place
from packshot.make_dataset.sources.captions import EncodingError, decode_text

_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
csv.field_size_limit(2**27)  # Python's own limit of 128 KiB cuts embedded data URLs


def is_table_file(path: str) -> bool:
    """Whether a file's name says that it is a table."""
    return PurePosixPath(path).suffix.lower() in _SUFFIXES


def read_rows(place: str) -> list[dict[str, Any]]:
    """The rows of a table.

    Raises:
        ConfigError: it is damaged, or in an encoding that cannot be told.
    """
    suffix = PurePosixPath(place).suffix.lower()
    try:
        if suffix == ".parquet":
            with open_place(place) as file:
                return pq.read_table(file).to_pylist()
        text, _ = decode_text(read_place(place))
        return json_rows(text, place) if suffix in (".jsonl", ".ndjson") else csv_rows(text)
    except (OSError, pa.ArrowException, EncodingError, csv.Error) as error:
        raise ConfigError(f"source.path: {place} cannot be read ({error}).", "Export it again, as UTF-8.") from error


def json_rows(text: str, place: str) -> list[dict[str, Any]]:
    """One object per line; blank lines are passed over."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"source.path: {place}, line {number} is not JSON ({error}).", "Each line is one object."
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(f"source.path: {place}, line {number} is not an object.", "Each line is one object.")
        rows.append(row)
    return rows


def csv_rows(text: str) -> list[dict[str, Any]]:
    """Rows under the names of the first line; the separator is the one that the first line has most of."""
    header = text.partition("\n")[0]
    separator = max(",;\t|", key=header.count)
    rows = []
    for row in csv.DictReader(io.StringIO(text), delimiter=separator):
        row.pop(None, None)  # type: ignore[call-overload]  # cells beyond the header
        rows.append({name.strip(): value for name, value in row.items() if name})
    return rows

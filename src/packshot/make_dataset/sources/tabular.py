"""Tables of text: CSV in any dialect and encoding, JSON, JSON lines, Parquet; as a list of rows."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from packshot.dataset.text_files import EncodingError, csv_rows, decode_text, document_rows, json_rows
from packshot.errors import ConfigError
from packshot.make_dataset.sources.base import open_place, read_place

_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def is_table_file(path: str) -> bool:
    """Whether a file has the name of a table. A .json is one only by its content."""
    return PurePosixPath(path).suffix.lower() in _SUFFIXES


def columns_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """The names that any row has: those of JSON may differ."""
    return list(dict.fromkeys(chain.from_iterable(rows)))


def read_rows(place: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a table, and a line for the screen where it is not UTF-8.

    Raises:
        ConfigError: it is damaged, or in an encoding that cannot be recognised.
    """
    suffix = PurePosixPath(place).suffix.lower()
    try:
        if suffix == ".parquet":
            with open_place(place) as file:
                return pq.read_table(file).to_pylist(), []
        text, encoding = decode_text(read_place(place))
        notes = [f"{PurePosixPath(place).name} is not UTF-8: read as {encoding}"] if encoding else []
        if suffix == ".json":
            return document_rows(text, f"source.path: {place}"), notes
        lines = suffix in (".jsonl", ".ndjson")
        return json_rows(text, f"source.path: {place}") if lines else csv_rows(text), notes
    except (OSError, pa.ArrowException, EncodingError, csv.Error) as error:
        raise ConfigError(f"source.path: {place} cannot be read ({error}).", "Export it again, as UTF-8.") from error

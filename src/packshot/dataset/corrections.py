"""Captions that a person has corrected: they lie next to a dataset's shards and win over what a machine wrote.

``corrections.jsonl`` holds one line ``{"id": ..., "text": ...}`` per sample. Captioning the dataset again leaves it
alone. Training, evaluation and review, which read with :func:`packshot.dataset.rows.load_rows`, ``build_data.py`` and
``task=caption`` without ``captioner.overwrite`` use its texts; other tools see the shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from packshot.errors import PackshotError
from packshot.runs.files import replacing_file

FILE = "corrections.jsonl"


def read(folder: Path) -> dict[str, str]:
    """Text by sample id; empty where nothing was corrected.

    Raises:
        PackshotError: a line is not a correction.
    """
    path = folder / FILE
    return parse(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def parse(content: str, name: str) -> dict[str, str]:
    """Text by sample id, from the lines of a ``corrections.jsonl`` that messages call ``name``.

    Raises:
        PackshotError: a line is not a correction.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            values = json.loads(line)
            found[str(values["id"])] = str(values["text"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PackshotError(
                f"{name}, line {number} is not a correction.", 'A line is {"id": ..., "text": ...}.'
            ) from error
    return found


def add(folder: Path, corrections: Mapping[str, str]) -> int:
    """Add corrections to those of the folder, where a new one replaces an old; returns how many there are now."""
    everything = {**read(folder), **corrections}
    lines = [json.dumps({"id": key, "text": text}, ensure_ascii=False) for key, text in sorted(everything.items())]
    with replacing_file(folder / FILE) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(everything)


def apply(table: pa.Table, corrections: Mapping[str, str]) -> pa.Table:
    """The table with corrected texts; their old scenes and errors are gone."""
    if not corrections:
        return table
    ids = table.column("id").to_pylist()
    replaced = {"text", "scene", "caption_error", "caption_confidence", "captions", "caption_origin"}
    for name in replaced & set(table.column_names):
        field = table.schema.field(name)
        values = table.column(name).to_pylist()
        for place, key in enumerate(ids):
            if key in corrections:
                values[place] = {"text": corrections[key], "caption_origin": "source"}.get(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table

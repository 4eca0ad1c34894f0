"""``packshot show DATASET``: one row of a dataset in words, and its pictures as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from packshot.config.keys import nearest
from packshot.dataset.rows import Rows, load_rows
from packshot.errors import ConfigError
from packshot.lists import without_none
from packshot.scene import Scene
from packshot.scene.grammar import filled

KEYS = ("show.id", "show.index", "show.out")
SHORT = 6  # characters of an id that are enough, where they name one row alone


@dataclass(frozen=True)
class Shown:
    """What to show: a dataset folder, and the row by its id or its beginning, or by its number (from 0).

    out: folder for the pictures of the row, None for none.
    """

    dataset: str
    id: str | None = None
    index: int = 0
    out: Path | None = None


def read_arguments(arguments: Sequence[str]) -> Shown:
    """``DATASET [ROW] [show.id=ID | show.index=N] [show.out=FOLDER]``; ROW is a number or an id.

    Raises:
        ConfigError: not a dataset, an unknown key, or an index that is not a number.
    """
    named: list[str] = []
    keys: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key.startswith("show."):
            if key not in KEYS:
                close = nearest(key, KEYS)
                raise ConfigError(f"There is no key {key!r}.", f"Did you mean {close}?" if close else f"{KEYS}")
            keys[key] = value
        else:
            named.append(argument)
    if not 1 <= len(named) <= 2:
        raise ConfigError("packshot show needs a dataset, and takes one row.", "packshot show DATASET [ROW]")
    row = named[1] if len(named) > 1 else ""
    if row.isdecimal() and len(row) < SHORT:
        keys.setdefault("show.index", row)
    elif row:
        keys.setdefault("show.id", row)
    if "show.id" in keys and "show.index" in keys:
        raise ConfigError("show.id and show.index both name a row.", "Give one of them.")
    number = keys.get("show.index", "0")
    if not number.isdecimal():
        raise ConfigError(f"show.index={number} is not a row.", "Rows have the numbers 0, 1, 2, …")
    out = Path(keys["show.out"]) if "show.out" in keys else None
    return Shown(named[0], keys.get("show.id"), int(number), out)


def find_row(rows: Rows, shown: Shown) -> int:
    """The index of the row.

    Raises:
        ConfigError: there is no such row, or several have an id that begins so.
    """
    if shown.id is None:
        if shown.index >= len(rows):
            raise ConfigError(
                f"show.index={shown.index}: {shown.dataset} has {len(rows)} rows.", f"Name 0 to {len(rows) - 1}."
            )
        return shown.index
    if shown.id in rows.ids:
        return rows.ids.index(shown.id)
    found = [index for index, sample_id in enumerate(rows.ids) if sample_id.startswith(shown.id)]
    if len(found) != 1:
        problem = f"{len(found)} rows have an id that begins so" if found else "no row has an id that begins so"
        raise ConfigError(f"show.id={shown.id}: {problem}.", f"The first row is {rows.ids[0]}.")
    return found[0]


def describe(row: dict[str, object]) -> list[str]:
    """A row in words: a line for each column, and for each slot of its scene."""
    lines: list[str] = []
    for name, value in row.items():
        if isinstance(value, Image.Image):
            lines.append(f"{name:18}{value.width} x {value.height} px, {value.mode}")
        elif isinstance(value, Scene):
            lines += [f"  {slot:16}{', '.join(texts)}" for slot, texts in filled(value).items()]
        elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            lines.append(f"{name:18}a picture of {len(value['bytes']):,} bytes")
        elif isinstance(value, dict):
            known = without_none(value)
            lines += [f"{name:18}", *(f"  {key:16}{one}" for key, one in known.items())] if known else []
        elif value not in (None, "", []):
            lines.append(f"{name:18}{', '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines


def show(shown: Shown) -> list[str]:
    """The lines about one row; its pictures are written where ``shown.out`` says.

    Raises:
        ConfigError: there is no such dataset or row.
    """
    rows = load_rows("DATASET", shown.dataset, captions=False)
    index = find_row(rows, shown)
    row = rows[index]
    lines = [f"row {index} of {len(rows)} in {shown.dataset}", *describe(row)]
    if shown.out is not None:
        shown.out.mkdir(parents=True, exist_ok=True)
        for name, value in row.items():
            if isinstance(value, Image.Image):
                file = shown.out / f"{str(row['id'])[:16]}-{name}.png"
                value.save(file)
                lines.append(f"wrote {file}")
    return lines


def main(arguments: Sequence[str]) -> None:
    """The command."""
    print("\n".join(show(read_arguments(arguments))))

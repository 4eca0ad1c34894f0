"""What a config key is: how the schema declares one, and how help and errors describe it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

Hint: TypeAlias = type | UnionType  # the type of a key: int, an enum, list[str], str | None


def opt(default: Any, help: str, *, min: float | None = None, max: float | None = None, lone: bool = False) -> Any:
    """A documented field; ``min`` and ``max`` are inclusive. lone: a value that is not a list becomes a list of one."""
    metadata = {"help": help, "min": min, "max": max, "lone": lone}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Names(Enum):
    """Enum whose members print as their name, the way they are written on the command line."""

    def __str__(self) -> str:
        return self.name


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Hint]]:
    """Every leaf of a schema class as (dotted key, field, type)."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, hints[f.name]


def describe_type(hint: Hint) -> str:
    """A type in words: ``train | plan | check``, ``integer``, ``list of text``."""
    words = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(hint.__members__)
    if get_origin(hint) is list:
        return f"list of {describe_type(get_args(hint)[0])}"
    return " or ".join(map(describe_type, get_args(hint)))


def describe(field: dataclasses.Field, hint: Hint) -> str:
    """What a key takes, with its range."""
    low = field.metadata.get("min")
    high = field.metadata.get("max")
    if low is not None and high is not None:
        return f"{describe_type(hint)} from {low} to {high}"
    if low is not None:
        return f"{describe_type(hint)} >= {low}"
    return describe_type(hint) if high is None else f"{describe_type(hint)} <= {high}"


ABBREVIATIONS = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "steps": "max_steps",
    "grad_accum": "gradient_accumulation_steps",
    "cfg": "guidance_scale",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known key that is most like ``word``. The last part also counts alone, so a wrong group is forgiven."""
    known = list(known)
    meant = ABBREVIATIONS.get(word.rpartition(".")[2])
    for key in known:
        if meant and key.rpartition(".")[2] == meant:
            return key
    same = [key for key in known if key.rpartition(".")[2] == word]
    if len(same) == 1:
        return same[0]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    tails = {key.rpartition(".")[2]: key for key in known}
    close = difflib.get_close_matches(word.rpartition(".")[2], tails, n=1, cutoff=0.75)
    return tails[close[0]] if close else None

"""What a slot of a Scene is: one row from which captions, configs, forms, datasets and scores derive.

The rows themselves stand in :class:`packshot.scene.scene.Scene`, as the metadata of its fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import List, Value


@dataclass(frozen=True)
class Slot:
    """One slot.

    help: what the slot means, in config help and HTTP forms.
    vocabulary: phrases that the renderer can build. A slot still takes any text.
    example: what the page of the server suggests.
    many: the slot holds a tuple of texts instead of one text.
    placed: a phrase may end in a position ("lemons behind it").
    weight: how much the slot counts in the mean score.

    How the slot stands in a caption:

    order: its place among the clauses; 0 is the head.
    prefix, suffix: the caption's words before and behind the value.
    ending: a value that ends in this word takes neither.
    joiner: joins several values in one clause; None: every value is a clause.
    words: a regular expression; a clause without prefix and suffix belongs to the slot that has one of its words.
    free: regular expressions for the wording of people and captioners; the group ``value`` is the slot's text.
    decoding: the Lark body of the value in the decoding grammar.
    """

    help: str
    vocabulary: tuple[str, ...]
    order: int
    example: str
    many: bool = False
    placed: bool = False
    weight: float = 1.0
    prefix: str = ""
    suffix: str = ""
    ending: str = ""
    joiner: str | None = None
    words: str = ""
    free: tuple[str, ...] = ()
    decoding: str = "PHRASE"

    def normalized(self, name: str, value: object, default: object) -> str | tuple[str, ...] | None:
        """A value as the Scene stores it: single spaces, no blank texts, without the words that the caption adds.

        Raises:
            TypeError: the value is not text, or not a sequence of texts where the slot takes many.
        """
        if self.many:
            given = (value,) if isinstance(value, str) else tuple(value or ())  # type: ignore[arg-type]
            if not all(isinstance(item, str) for item in given):
                raise TypeError(f"Scene.{name} takes a text or a sequence of texts, not {value!r}")
            return tuple(filter(None, map(single_spaced, given)))
        if value is not None and not isinstance(value, str):
            raise TypeError(f"Scene.{name} takes text, not {value!r}")
        text = single_spaced(value or "")
        while self.suffix and text.lower().endswith(self.suffix):
            text = text[: -len(self.suffix)].rstrip(" ,")
        return text or default  # type: ignore[return-value]

    def clauses(self, values: tuple[str, ...]) -> list[str]:
        """The caption's clauses for values that need no quotes."""
        if self.joiner is not None:
            values = (self.joiner.join(values),)
        if self.ending and values[0].lower().endswith(self.ending):
            return list(values)
        return [f"{self.prefix}{value}{self.suffix}" for value in values]

    def read_clause(self, clause: str) -> tuple[str, ...] | None:
        """The values of a clause that has the slot's own words around it, or None."""
        if self.prefix and clause.startswith(self.prefix):
            clause = clause.removeprefix(self.prefix)
        elif self.suffix and clause.endswith(self.suffix):
            clause = clause.removesuffix(self.suffix)
        elif not (self.ending and clause.endswith(self.ending)):
            return None
        return tuple(clause.split(self.joiner)) if self.joiner else (clause,)

    def feature(self) -> List | Value:
        """The column's type in the ``datasets`` library."""
        from datasets import List, Value

        return List(Value("string")) if self.many else Value("string")


def slot(default: Any, **row: Any) -> Any:
    """A field of the Scene with its row."""
    return field(default=default, metadata={"slot": Slot(**row)})


def single_spaced(text: str) -> str:
    """The text without outer white space, every inner run of it one space."""
    return re.sub(r"\s+", " ", text).strip()


def as_texts(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """A slot's value as a tuple of texts, empty when absent."""
    if value is None or isinstance(value, str):
        return (value,) if value else ()
    return tuple(value)

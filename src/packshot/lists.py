"""Small operations on lists and dicts that every room needs; they import nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

K = TypeVar("K")
T = TypeVar("T")
U = TypeVar("U")


class Named(Protocol):
    """A row of a registry, known by its name."""

    @property
    def name(self) -> str:
        """Unique among the rows."""
        ...


R = TypeVar("R", bound=Named)


def pick(values: Sequence[T], indices: Iterable[int]) -> list[T]:
    """The values at some indices, in the order of the indices."""
    return [values[index] for index in indices]


def column(rows: Iterable[Mapping[K, T]], name: K) -> list[T]:
    """One value of every row. Raises KeyError if a row lacks it."""
    return [row[name] for row in rows]


def select(values: Mapping[K, T], names: Iterable[K]) -> dict[K, T]:
    """The entries with these names, in the order of the names. Raises KeyError if one is missing."""
    return {name: values[name] for name in names}


def without(values: Mapping[K, T], *names: K) -> dict[K, T]:
    """The entries with other names."""
    return {name: value for name, value in values.items() if name not in names}


def without_none(values: Mapping[K, T | None]) -> dict[K, T]:
    """The entries that have a value."""
    return {name: value for name, value in values.items() if value is not None}


def map_values(function: Callable[[T], U], values: Mapping[K, T]) -> dict[K, U]:
    """The same names, with the function's result for each value."""
    return {name: function(value) for name, value in values.items()}


def by_name(rows: Iterable[R]) -> dict[str, R]:
    """Rows of a registry by their names, in their order."""
    return {row.name: row for row in rows}


def attributes(thing: object, names: Iterable[str]) -> dict[str, object]:
    """These attributes of an object, by name."""
    return {name: getattr(thing, name) for name in names}


def ending(names: Iterable[str], *endings: str) -> list[str]:
    """The names that end in one of these."""
    return [name for name in names if name.endswith(endings)]


def in_words(values: Mapping[K, object], form: str = "{1} {0}", joiner: str = ", ") -> str:
    """A dict in words: every entry in ``form``, where {0} is its name and {1} its value ("3 broken, 2 blurred")."""
    return joiner.join(form.format(name, value) for name, value in values.items())

"""Tables of model and dataset cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table and an empty one after it."""
    return [table_line(head), "|" + "---|" * len(head), *map(table_line, rows), ""]


def table_line(cells: Iterable[object]) -> str:
    """One row."""
    return f"| {' | '.join(map(str, cells))} |"

"""Progress with an ETA: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def progress(description: str, total: int, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """Yields ``advance(n=1, **figures)``; figures (``loss=0.12``) appear next to the bar.

    done: units finished before this process started (resumed runs); they do not count for the rate.
    show: False on all processes but the main one, which then show nothing.
    """
    if not show:
        yield lambda n=1, **figures: None
    elif sys.stderr.isatty():
        yield from bar(description, total, done)
    else:
        yield from lines(description, total, done)


def figures_text(figures: dict[str, object]) -> str:
    """``loss 0.12  lr 0.0001``."""
    texts = []
    for key, value in figures.items():
        texts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return "  ".join(texts)


def bar(description: str, total: int, done: int) -> Iterator[Advance]:
    """A bar on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(description, total=total, completed=done, figures="")

        def advance(n: int = 1, **figures: object) -> None:
            shown.advance(task, n)
            if figures:
                shown.update(task, figures=figures_text(figures))

        yield advance


def lines(description: str, total: int, done: int, every_seconds: float = 10.0) -> Iterator[Advance]:
    """A line in a log at the end, and at most every ``every_seconds`` before."""
    started = time.monotonic()
    last = started
    first = done

    def advance(n: int = 1, **figures: object) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last < every_seconds and done < total:
            return
        last = now
        rate = (done - first) / max(now - started, 1e-9)
        if done >= total:
            time_text = f"took {clock(now - started)}"
        else:
            time_text = f"ETA {clock((total - done) / rate)}" if rate else "ETA unknown"  # nothing is done yet
        print(
            f"{description} {done}/{total}  {time_text}  {figures_text(figures)}".rstrip(), file=sys.stderr, flush=True
        )

    yield advance

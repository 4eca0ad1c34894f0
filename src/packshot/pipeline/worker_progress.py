"""How far the workers are, row by row: each appends to a small file beside the shards, the main process reads sizes.

Files work wherever a shard can be written, on this machine or on another one.
"""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packshot.runs.progress import Advance

_SECONDS = 1.0


def _folder(dataset: Path) -> Path:
    return dataset / "steps" / ".progress"


def tell(dataset: Path, shard: int, rows: int) -> None:
    """Called by a worker when it has done so many more rows of a shard."""
    folder = _folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)  # not by the main process: a rerun on finished work touches nothing
    with (folder / str(shard)).open("ab") as file:
        file.write(b"." * rows)


class Meter:
    """Adds up what the workers told; a finished shard counts whole, also one that was found done."""

    def __init__(self, dataset: Path, advance: Advance) -> None:
        self._folder, self._advance = _folder(dataset), advance
        self._seen: dict[int, int] = defaultdict(int)
        self._lock = threading.Lock()

    def finished(self, shard: int, rows: int, **figures: object) -> None:
        """A shard is in place; figures appear beside the bar."""
        with self._lock:
            self._advance(rows - self._seen[shard], **figures)
            self._seen[shard] = rows

    def look(self) -> None:
        """Count what was told since the last look."""
        for file in self._folder.glob("*"):
            with self._lock:
                shard, rows = int(file.name), file.stat().st_size
                if rows > self._seen[shard]:
                    self._advance(rows - self._seen[shard])
                    self._seen[shard] = rows


@contextmanager
def watching(dataset: Path, advance: Advance) -> Iterator[Meter]:
    """Looks every second while the block runs; leaves no file behind."""
    folder, stop = _folder(dataset), threading.Event()
    shutil.rmtree(folder, ignore_errors=True)
    meter = Meter(dataset, advance)

    def look() -> None:
        while not stop.wait(_SECONDS):
            meter.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)

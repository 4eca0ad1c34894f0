"""How far the workers are, row by row: each appends to a small file near the shards, the main process reads sizes.

Files work where a shard can be written, on this machine or on another one.
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


def progress_folder(dataset: Path) -> Path:
    """The folder of the workers' files."""
    return dataset / "steps" / ".progress"


def report(dataset: Path, shard: int, rows: int) -> None:
    """Called by a worker when it has done so many more rows of a shard."""
    folder = progress_folder(dataset)
    folder.mkdir(parents=True, exist_ok=True)  # not by the main process: a rerun on finished work touches nothing
    with (folder / str(shard)).open("ab") as file:
        file.write(b"." * rows)


class Meter:
    """Adds up what the workers reported; a finished shard counts whole, even one that was done before."""

    def __init__(self, dataset: Path, advance: Advance) -> None:
        self._folder = progress_folder(dataset)
        self._advance = advance
        self._seen: dict[int, int] = defaultdict(int)
        self._lock = threading.Lock()

    def finished(self, shard: int, rows: int, **figures: object) -> None:
        """A shard is in place; figures appear next to the bar."""
        with self._lock:
            self._advance(rows - self._seen[shard], **figures)
            self._seen[shard] = rows

    def poll(self) -> None:
        """Count what was reported since the last poll."""
        for file in self._folder.glob("*"):
            with self._lock:
                shard = int(file.name)
                rows = file.stat().st_size
                if rows > self._seen[shard]:
                    self._advance(rows - self._seen[shard])
                    self._seen[shard] = rows


@contextmanager
def watching(dataset: Path, advance: Advance) -> Iterator[Meter]:
    """Polls every second while the block runs; leaves no file behind."""
    folder = progress_folder(dataset)
    stop = threading.Event()
    shutil.rmtree(folder, ignore_errors=True)
    meter = Meter(dataset, advance)

    def poll() -> None:
        while not stop.wait(_SECONDS):
            meter.poll()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        stop.set()
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)

"""The ledger: one line per finished shard of a step. A file without its line does not exist."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packshot.runs.files import replacing_file
from packshot.runs.folder import log


@dataclass(frozen=True)
class Entry:
    """A finished shard. rows: samples that reached the step; rejected: those that ended there."""

    step: str
    shard: int
    key: str
    file: str
    sha256: str
    rows: int
    rejected: int


class Ledger:
    """``ledger.jsonl`` of a dataset folder. Only the main process writes it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"
        self._entries: dict[tuple[str, int], Entry] = {}
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        entries = list(filter(None, map(read_entry, lines)))
        self._remember(entries)
        if len(entries) < len(lines):
            log.warning("%s: %d unreadable lines; their shards are done again", self.path, len(lines) - len(entries))
            self._write(entries)

    def find(self, step: str, shard: int) -> Entry | None:
        """The entry of a shard, also one whose key is out of date."""
        return self._entries.get((step, shard))

    def add(self, entry: Entry) -> None:
        """Record a shard whose file is in place; on disk when this returns."""
        with self.path.open("a") as file:
            file.write(entry_line(entry))
            file.flush()
            os.fsync(file.fileno())
        self._entries[entry.step, entry.shard] = entry

    def finish(self, entries: Sequence[Entry]) -> None:
        """Reduce the ledger to these entries, in this order: the same bytes however the run went."""
        self._entries.clear()
        self._remember(entries)
        if not self.path.exists() or self.path.read_text() != "".join(map(entry_line, entries)):
            self._write(entries)

    def _remember(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._entries[entry.step, entry.shard] = entry

    def _write(self, entries: Sequence[Entry]) -> None:
        with replacing_file(self.path) as file:
            file.write_text("".join(map(entry_line, entries)))


def entry_line(entry: Entry) -> str:
    """The entry as a line of the ledger."""
    return json.dumps(asdict(entry)) + "\n"


def read_entry(line: bytes) -> Entry | None:
    """None for a line that a kill cut short (or that something else damaged)."""
    try:
        return Entry(**json.loads(line)) if line.endswith(b"\n") else None
    except (ValueError, TypeError, RecursionError):
        return None

"""What lost workers cost: builds against the real ledger, killed again and again, that finish with the same bytes.

    python -m benchmarks.lost_workers [shards] [seed]

A worker is lost at a random moment of a random shard: before its file is there, after it but before its line in the
ledger, or in the middle of that line. The run is then started again on what lies on the disk. The table tells how many
shards were worked on more than once, for several chances of losing a worker in one shard.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from packshot.config.schema import ExecutorConfig
from packshot.errors import PackshotError
from packshot.lists import column
from packshot.pipeline import Outcome, Step, run_steps
from packshot.pipeline.ledger import Entry, Ledger, entry_line
from packshot.pipeline.step import Sample

ROWS = 4  # samples in a shard
CHANCES = (0.0, 0.001, 0.01, 0.05)  # of losing the worker in one shard of one step
MOMENTS = ("before the file", "before the line", "in the line")


class LostError(PackshotError):
    """A worker is gone, and with it the run."""


class Losses:
    """Decides which work is lost.

    calls: shards of steps that were worked on. whole: how often the step over all shards was done. losses: by moment.
    """

    def __init__(self, chance: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.chance = chance
        self.calls = 0
        self.whole = 0
        self.losses = dict.fromkeys(MOMENTS, 0)

    def moment(self) -> str | None:
        """When the worker of this shard is lost; None: it is not."""
        if self.rng.random() >= self.chance:
            return None
        return MOMENTS[int(self.rng.integers(len(MOMENTS)))]


def steps(losses: Losses) -> list[Step]:
    """A step for each shard, a whole step, and the rows: as a build has them."""

    def work(samples: list[Sample]) -> Sequence[Outcome]:
        losses.calls += 1
        if losses.moment() == MOMENTS[0]:
            losses.losses[MOMENTS[0]] += 1
            raise LostError("lost", "")
        outcomes = []
        for sample in samples:
            kept = int(sample["name"]) % 7 != 3
            outcomes.append(Outcome({"value": sample["name"]}, None if kept else "every seventh", "", kept))
        return outcomes

    def compare(samples: list[Sample]) -> Sequence[Outcome]:
        losses.whole += 1
        return [Outcome() for _ in samples]

    def rows(samples: list[Sample]) -> Sequence[Outcome]:
        losses.calls += 1
        return [Outcome({"value": value}) for value in column(samples, "value")]

    schema = pa.schema([("value", pa.string())])
    return [
        Step("measure", 1, {}, schema, work),
        Step("compare", 1, {}, pa.schema([]), compare, reads=("value",), whole=True),
        Step("part", 1, {}, schema, rows, reads=("value",), final=True),
    ]


class FragileLedger(Ledger):
    """The ledger, whose writer may be lost before a line or within it."""

    losses: Losses

    def add(self, entry: Entry) -> None:
        moment = self.losses.moment()
        if moment in MOMENTS[1:]:
            self.losses.losses[moment] += 1
            if moment == MOMENTS[2]:
                with self.path.open("a") as file:
                    file.write(entry_line(entry)[:40])
            raise LostError("lost", "")
        super().add(entry)


def digest(samples: Sequence[Sample]) -> list[str]:
    """Digests of the items."""
    return [hashlib.sha256(sample["name"].encode()).hexdigest() for sample in samples]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(folder: Path, shards: Sequence[Sequence[Sample]], losses: Losses) -> int:
    """Run until nothing is lost any more; returns how often the run was started."""
    import packshot.pipeline.run as pipeline_run

    FragileLedger.losses = losses
    pipeline_run.Ledger = FragileLedger
    starts = 1
    while True:
        try:
            run_steps(folder, shards, digest, steps(losses), ExecutorConfig())
            return starts
        except LostError:
            starts += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=int, nargs="?", default=400)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    shards = []
    for shard in range(args.shards):
        shards.append([{"name": str(shard * ROWS + row)} for row in range(ROWS)])
    expected: dict[str, bytes] = {}
    work = 0
    for chance in CHANCES:
        losses = Losses(chance, args.seed)
        with tempfile.TemporaryDirectory() as folder:
            starts = build(Path(folder), shards, losses)
            found = folder_bytes(Path(folder))
        if not expected:
            expected, work = found, losses.calls
        same = "the same bytes" if found == expected else "OTHER BYTES"
        lost = ", ".join(f"{number} {moment}" for moment, number in losses.losses.items())
        again = losses.calls - work
        print(f"chance {chance}: {starts} starts, lost {lost}; {same}")
        print(f"    {again} of {work} shards worked on again, the step over all shards {losses.whole} times")
        if found != expected:
            raise SystemExit(1)


if __name__ == "__main__":
    main()

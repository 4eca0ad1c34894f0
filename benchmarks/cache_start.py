"""What a large cache costs at the start of a run: time, memory and files, and what reading an entry takes.

    python -m benchmarks.cache_start --entries 200000

The entries are small (latents of 64 px), so that the index is what is measured. One process fills, a new one opens and
reads.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from packshot.engine.tensor_cache import Job, TensorCache

CHUNK = 8
LATENTS = torch.randn(4, 8, 8)
PLANE = torch.zeros(1, 8, 8)


def entry(item: int) -> dict[str, torch.Tensor]:
    """The tensors of an encoded picture."""
    entry = {"mean": LATENTS + item, "std": LATENTS.clone(), "time_ids": torch.zeros(6)}
    for name in ("alpha", "held", "inside"):
        entry[name] = PLANE.clone()
    return entry


def chunks(entries: int) -> list[list[Job]]:
    """The jobs of a dataset."""
    jobs = [Job(f"{number:064x}", "sample", number) for number in range(entries)]
    return [jobs[first : first + CHUNK] for first in range(0, entries, CHUNK)]


def resident_mib() -> float:
    """The process's memory now, files that it has mapped included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def start(folder: Path, entries: int) -> None:
    """Open a full cache as a run does, and read from it."""
    jobs = chunks(entries)
    accelerator = Accelerator(cpu=True)
    before = resident_mib()
    cache = TensorCache(folder)
    began = time.monotonic()
    cache.fill("encoding", jobs, lambda items: list(map(entry, items)), accelerator)
    opened = time.monotonic() - began
    memory = resident_mib() - before
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(entries, (5000,), generator=generator).tolist()
    began = time.monotonic()
    for place in places:
        cache.get(f"{place:064x}")
    read = (time.monotonic() - began) / len(places)
    files = list(folder.glob("*.*"))
    size = sum(file.stat().st_size for file in files)
    print(f"start {opened:.1f} s, {memory:.0f} MiB more memory, {len(files)} files of {size / 2**20:.0f} MiB together")
    print(f"an entry is read in {1000 * read:.2f} ms")


def main() -> None:
    """Fill a cache, then start again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        start(args.folder, args.entries)
        return
    with tempfile.TemporaryDirectory() as name:
        cache = TensorCache(Path(name))
        began = time.monotonic()
        cache.fill("encoding", chunks(args.entries), lambda items: list(map(entry, items)), Accelerator(cpu=True))
        print(f"filled in {time.monotonic() - began:.1f} s")
        again = [sys.executable, __file__, "--entries", str(args.entries), "--folder", name]
        subprocess.run(again, check=True)


if __name__ == "__main__":
    main()

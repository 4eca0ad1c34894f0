"""What building a dataset costs: memory, CPU time and disk, from sets that are made here.

    python -m benchmarks.scale rows 1000 10000      # tiny pictures: what grows with their number
    python -m benchmarks.scale photos 24            # 12 megapixels each: the cheap steps
    python -m benchmarks.scale workers 160          # the same with one worker and two: wall times

Each build runs in a process of its own. CPU time is the process's own, so other work on the machine disturbs it little.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

TINY = (64, 64)
PHOTO = (4000, 3000)


def tiny(folder: Path, count: int) -> None:
    """Pictures of noise on a wall, all of them different, a thousand in a folder, with captions."""
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(place / f"{number:07d}.jpg", quality=90)
        (place / f"{number:07d}.txt").write_text(f"an object on a table, number {number}")


def photos(folder: Path, count: int) -> None:
    """Soft shapes with grain, as JPEGs of quality 92: 3 to 5 MB each, as cameras write them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (30, 40, 3), np.uint8)
        smooth = cv2.resize(coarse, PHOTO, interpolation=cv2.INTER_CUBIC).astype(np.int16)
        grain = rng.integers(-9, 10, (PHOTO[1], PHOTO[0], 1), np.int16)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=92)


SOURCES = {"rows": tiny, "photos": photos}


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; a file with several links counts once."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            state = path.stat()
            sizes[state.st_ino] = state.st_size
    return sum(sizes.values())


def measure(source: str, out: str, *overrides: str) -> None:
    """Build in this process and print what it cost as JSON."""
    from packshot.config.compose import compose
    from packshot.make_dataset.run import build

    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    keys = [f"source.path={source}", f"run.dir={out}", "dataset=background", "tracking=none", *overrides]
    build(compose("build_data", keys))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"cpu_seconds": cpu, "workers_cpu_seconds": workers.ru_utime + workers.ru_stime}
    figures |= {"wall_seconds": time.monotonic() - started, "peak_mib": after.ru_maxrss / 1024}
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))


def built(source: Path, out: Path, *overrides: str) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "measure", str(source), str(out), *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def report(kind: str, counts: list[int]) -> None:
    """One line for each number of pictures, then one for a second build that finds everything done."""
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            source, out = Path(folder) / f"source{count}", Path(folder) / f"out{count}"
            SOURCES[kind](source, count)
            figures = built(source, out)
            again = built(source, out, "run.resume=true")
            figures["ms_a_picture"] = round(1000 * figures["cpu_seconds"] / count, 2)
            figures["again_cpu_seconds"] = again["cpu_seconds"]
            figures["again_peak_mib"] = again["peak_mib"]
            figures["source_mb"] = round(tree_bytes(source) / 1e6, 1)
            figures["set_mb"] = round(tree_bytes(out) / 1e6, 1)
            print(f"{kind} {count}: {json.dumps(figures)}", flush=True)


def copies(folder: Path, count: int) -> None:
    """Twelve :func:`photos`, then the same again with other bytes at their end."""
    photos(folder, min(count, 12))
    for number in range(12, count):
        original = folder / f"{number % 12:04d}.jpg"
        (folder / f"{number:04d}.jpg").write_bytes(original.read_bytes() + b"copy %d" % number)


def compare_workers(count: int) -> None:
    """The same photographs with one worker and with two, in shards of an eighth of them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        copies(source, count)
        keys = [f"shard_size={max(1, count // 8)}", "quality.duplicate_distance=-1"]
        walls = {}
        for workers in (1, 2, 1, 2):
            out = Path(folder) / f"out{workers}-{len(walls)}"
            figures = built(source, out, *keys, f"executor.workers={workers}")
            wall = figures["wall_seconds"]
            walls[workers] = min(wall, walls.get(workers, wall))
            shutil.rmtree(out)
            print(f"workers {workers}: {json.dumps(figures)}", flush=True)
        print(f"{count / walls[1]:.1f} and {count / walls[2]:.1f} pictures/s, {walls[1] / walls[2]:.2f} times")


def main() -> None:
    if sys.argv[1:2] == ["measure"]:  # see built
        measure(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=(*SOURCES, "workers"))
    parser.add_argument("counts", type=int, nargs="+", help="numbers of pictures; workers takes one")
    args = parser.parse_args()
    if args.kind in SOURCES:
        report(args.kind, args.counts)
    elif len(args.counts) == 1:
        compare_workers(args.counts[0])
    else:
        parser.error("workers takes one number of pictures")


if __name__ == "__main__":
    main()

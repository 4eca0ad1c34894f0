"""How fast the trainers are, compared with a plain reference loop and the bare step: the same model, batch and machine.

    python -m benchmarks.train_speed --method lora --steps 40 --rounds 3

Alternates bare step, reference and ours (with a cold, then with a warm cache) as whole processes, and prints medians,
spreads and ratios. The machine should have nothing else to do; the spread shows whether it had.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"lora": "train_lora.py", "controlnet": "train_controlnet.py", "ip_adapter": "train_ip_adapter.py"}
WARM_UP = 5
Figures = dict[str, float]


def _run(command: list[str]) -> tuple[float, float]:
    """(when it started, peak resident memory in GiB) of a process that ran to its end."""
    started = time.time()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{errors.decode()}")
    return started, usage.ru_maxrss / 2**20


def child(kind: str, method: str, steps: int, batch_size: int, folder: Path) -> Figures:
    """The reference loop or the bare step."""
    out = folder / f"{kind}.json"
    command = [sys.executable, "-m", "benchmarks.children", kind, method, str(steps), str(batch_size), str(out)]
    started, memory = _run(command)
    found = json.loads(out.read_text())
    return {
        "images_per_second": found["images_per_second"],
        "first_step_seconds": found["first_step"] - started,
        "whole_seconds": found["last_step"] - started,
        "peak_memory_gib": memory,
    }


def ours(method: str, steps: int, batch_size: int, folder: Path, run: str) -> Figures:
    """Our trainer; ``folder`` holds its cache, so that the second call finds it warm."""
    path = folder / run
    command = [
        *(sys.executable, SCRIPTS[method], f"run.dir={path}", f"data.cache_dir={folder / 'cache'}", "tracking=none"),
        *(f"train.max_steps={steps}", f"train.batch_size={batch_size}", "train.validation_steps=0"),
        f"train.checkpointing_steps={steps}",
    ]
    started, memory = _run(command)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steady = lines[WARM_UP:]
    seconds = sum(batch_size / line["images_per_second"] for line in steady)
    return {
        "images_per_second": len(steady) * batch_size / seconds,
        "first_step_seconds": lines[0]["time"] - started,
        "whole_seconds": lines[-1]["time"] - started,
        "peak_memory_gib": memory,
        "data_wait_share": sum(line["data_wait_share"] for line in steady) / len(steady),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=SCRIPTS, default="lora")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    shape = (args.method, args.steps, args.batch_size)
    rounds: list[dict[str, Figures]] = []
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rounds.append(
                {
                    "bare": child("bare", *shape, folder),
                    "reference": child("reference", *shape, folder),
                    "ours, cold cache": ours(*shape, folder, "cold"),
                    "ours, warm cache": ours(*shape, folder, "warm"),
                }
            )
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    print(
        f"{args.method}, {args.steps} steps of {args.batch_size} at 128 px, median (least to most) of {args.rounds}\n"
    )
    keys = ("images_per_second", "first_step_seconds", "whole_seconds", "peak_memory_gib", "data_wait_share")
    print("| | " + " | ".join(keys) + " |\n|---|" + "---|" * len(keys))
    for name in rounds[0]:
        cells = [_spread([figures[name][key] for figures in rounds]) if key in rounds[0][name] else "" for key in keys]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| ratio, round by round | |\n|---|---|")
    for name, key, against in (
        ("ours, warm cache", "images_per_second", "reference"),
        ("ours, warm cache", "images_per_second", "bare"),
        ("ours, cold cache", "whole_seconds", "reference"),
        ("ours, cold cache", "first_step_seconds", "reference"),
        ("ours, warm cache", "first_step_seconds", "reference"),
        ("ours, cold cache", "peak_memory_gib", "reference"),
    ):
        ratios = [figures[name][key] / figures[against][key] for figures in rounds]
        print(f"| {key}: {name} / {against} | {_spread(ratios)} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()

"""Which way of pointing out the product makes the better captioner: fine-tunes one per way, and scores each.

    python -m benchmarks.targets --kind florence2 llama32_vision --steps 450 --out outputs/targets

Trains on the rendered training set, scores on the held-out one (products and pairs of surface and background that no
training has seen), with and without the constraint. Finished variants are kept, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"florence2": ("none", "box", "outline", "mask"), "llama32_vision": ("none", "outline", "mask")}
SLOTS = ("surface", "surroundings", "background", "lighting", "mood")


def _run(*overrides: str) -> None:
    command = [sys.executable, "caption_vlm.py", "tracking=none", "run.resume=true", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def scores(kind: str, target: str, steps: int, seed: int, out: Path) -> dict[str, Any]:
    """Train and score one variant; ``scores.json`` of task=evaluate."""
    folder = out / f"{kind}-{target}-{steps}-{seed}"
    common = (f"captioner={kind}", "captioner.tuning=full", f"captioner.product={target}", f"run.seed={seed}")
    if not (folder / "train" / "export").exists():
        _run(*common, "experiment=captioner_mini", f"train.max_steps={steps}", f"run.dir={folder / 'train'}",
             "train.validation_steps=0", f"train.checkpointing_steps={steps}")  # fmt: skip
    file = folder / "scores" / "scores.json"
    if not file.exists():
        export = folder / "train" / "export"
        _run(*common, "task=evaluate", f"captioner.adapter={export}", f"run.dir={folder / 'scores'}",
             "captioner.batch_size=32")  # fmt: skip
    return json.loads(file.read_text())


def row(name: str, table: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    low, high = table["mean"]["soft_interval_95"]
    cells = [
        f"{table['mean']['soft']:.3f} ({low:.3f} to {high:.3f})",
        f"{table['mean']['exact']:.3f}",
        *(f"{table['slots'][slot]['soft']:.2f}" for slot in SLOTS),
        f"{table['parse_rate']:.3f}",
        f"{table['leakage_rate']:.3f}",
        f"{table['invented']['things']:.2f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/targets"))
    args = parser.parse_args()
    head = ("soft F1 (95 %)", "exact", *SLOTS, "parses", "names product", "invented things")
    print(f"| captioner | {' | '.join(head)} |\n|---|{'---|' * len(head)}", flush=True)
    for kind in args.kind:
        for target in TARGETS[kind]:
            found = scores(kind, target, args.steps, args.seed, args.out.resolve())
            print(row(f"{kind}, product {target}", found["captioner"]), flush=True)
            print(row(f"{kind}, product {target}, unconstrained", found["unconstrained"]), flush=True)
        print(row("constant caption", found["baselines"]["constant_caption"]), flush=True)
        print(row(f"{kind}, shuffled images", found["baselines"]["shuffled_images"]), flush=True)


if __name__ == "__main__":
    main()

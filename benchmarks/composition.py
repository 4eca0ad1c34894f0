"""What a denoising step takes with each adapter alone and with all of them, compared with the sum of its parts.

    python -m benchmarks.composition outputs/{lora,inpaint,canny,ip_adapter}/export

Takes turns, round by round, in one process; per set the median over rounds of the time of a picture, divided by its
steps. The parts are the base's step and what each adapter alone adds to it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from PIL import Image

from benchmarks.extension import adapters_of
from packshot.config.schema import AdaptersConfig, GenerateSettings
from packshot.dataset.rows import load_rows
from packshot.generate import Packshot


def together(exports: list[Path]) -> AdaptersConfig:
    """The adapters of several export folders: any number of ControlNets, at most one of each other kind."""
    found = [adapters_of(export) for export in exports]
    return AdaptersConfig(
        lora=next((one.lora for one in found if one.lora), None),
        controlnets=[path for one in found for path in one.controlnets],
        ip_adapter=next((one.ip_adapter for one in found if one.ip_adapter), None),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="+", help="export folders of the trainers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    sets = {"base": [], **{str(path): [path] for path in args.adapters}, "all": args.adapters}
    row = load_rows("data", "data/rendered/heldout").read(0, ("image", "mask", "depth"))
    tools = {name: Packshot.load(adapters=together(exports)) for name, exports in sets.items()}
    settings, seconds = GenerateSettings(num_inference_steps=args.steps), {name: [] for name in sets}
    for number in range(args.rounds + 1):
        for name, tool in tools.items():
            tool.set_product(row["image"], row["mask"], row["id"], depth=row["depth"])
            look = Image.new("RGB", (64, 64), "orange") if tool.models.has_ip_adapter else None
            started = time.perf_counter()
            tool.generate("a table", 1, reference=look, settings=settings)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / args.steps)
    step = {name: statistics.median(values) for name, values in seconds.items()}
    parts = step["base"] + sum(step[str(path)] - step["base"] for path in args.adapters)
    print("| adapters | s per step | spread |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {step[name]:.3f} | {min(values):.3f} to {max(values):.3f} |")
    print(f"\nall {step['all']:.3f} s, sum of the parts {parts:.3f} s, ratio {step['all'] / parts:.2f}")


if __name__ == "__main__":
    main()

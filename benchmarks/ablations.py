"""What keeps a product from growing: trains variants over several seeds and measures what each draws.

    python -m benchmarks.ablations --seeds 3
    python -m benchmarks.ablations --only nine --out outputs/long train.max_steps=3000 train.batch_size=8

Every variant is a file of conf/experiment (or two, used together), trained as its own script trains it. Then it puts
held-out products into the same scenes from the same noise, and the raw decode is measured, before the product's own
pixels are laid over it. Killed or run again, it goes on where it stopped. --out holds runs, pictures and table.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.composition import together
from benchmarks.extension import draw, figures, line, shown_as
from packshot.config.schema import GenerateSettings, ProductConditioning
from packshot.dataset.rows import Rows, load_rows
from packshot.generate import Packshot
from packshot.runs.files import replacing_file
from packshot.train.validation import means

ROOT = Path(__file__).resolve().parents[1]
CONTROLNET = "train_controlnet.py"
LORA = "train_lora.py"
# By the name in the table: the experiments of conf/experiment that a variant trains, with the script of each.
VARIANTS: dict[str, dict[str, str]] = {
    "ControlNet, product noised": {"ablation_inpaint": CONTROLNET},
    "ControlNet, product clean, ring": {"ablation_inpaint_clean": CONTROLNET},
    "ControlNet, the same, mask shrunk and jittered": {"ablation_inpaint_mask": CONTROLNET},
    "LoRA, product clean": {"ablation_lora_plain_ring": LORA},
    "LoRA, product clean, ring": {"ablation_lora_clean": LORA},
    "LoRA, nine channels, ring": {"ablation_lora_channels": LORA},
    "ControlNet and LoRA, clean, ring": {"ablation_inpaint_clean": CONTROLNET, "ablation_lora_clean": LORA},
}
SOLID = 0.35  # share of a product that must lie in held cells: of thin ones a grid of 16 x 16 latents holds nothing
FIGURES = ("extension_rate", "extension", "product_loss", "product_iou", "edge_delta_e")


def train(script: str, experiment: str, seed: int, out: Path, overrides: list[str]) -> Path:
    """The export folder of an experiment with a seed; trains it if it is not there."""
    run = out / "runs" / f"{experiment}-{seed}"
    if not (run / "export" / "README.md").exists():
        keys = [f"experiment={experiment}", f"run.dir={run}", f"run.seed={seed}", "run.resume=true", "tracking=none"]
        subprocess.run([sys.executable, script, *keys, *overrides], cwd=ROOT, check=True)
    return run / "export"


def tools(seeds: int, only: str, out: Path, overrides: list[str]) -> Iterator[tuple[str, int, Packshot]]:
    """Every variant whose name contains ``only`` with every seed, the base alone first: (name, seed, loaded tool)."""
    for shown in (ProductConditioning.noised, ProductConditioning.clean):
        yield f"base alone, product {shown}", 0, shown_as(Packshot.load("mini"), shown)
    for seed in range(seeds):
        for name, experiments in VARIANTS.items():
            if only in name:
                exports = [
                    train(script, experiment, seed, out, overrides) for experiment, script in experiments.items()
                ]
                yield name, seed, Packshot.load("mini", adapters=together(exports))


def averages(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of all figures over pictures."""
    return {**means(rows), "edge_delta_e": statistics.fmean(row["edge_delta_e"] for row in rows)}


def cell(values: list[float], figure: str) -> str:
    """Mean over seeds and the spread between them."""
    share = figure in ("extension_rate", "extension", "product_loss")
    scale, digits = (100 if share else 1), (2 if figure == "product_iou" else 1)
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.fmean(values):.{digits}f}{spread}{' %' if share else ''}"


def table(found: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """Markdown: a line per variant, of the solid products and, in the last column, of all."""
    columns = (
        "extension rate",
        "mean extension",
        "product loss",
        "mask IoU",
        "edge ΔE",
        "extension rate, all products",
    )
    lines = ["| variant | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name, seeds in found.items():
        every = [averages(rows) for rows in seeds.values()]
        solid = [averages([row for row in rows if row["held_share"] >= SOLID]) for rows in seeds.values()]
        cells = [cell([one[figure] for one in solid], figure) for figure in FIGURES]
        cells.append(cell([one["extension_rate"] for one in every], "extension_rate"))
        lines.append(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(tool: Packshot, rows: Rows, indices: list[int], args: argparse.Namespace, folder: Path) -> list[Any]:
    """(figures, picture) of every product and shot."""
    settings = GenerateSettings(num_inference_steps=args.steps, guidance_scale=args.guidance_scale)
    folder.mkdir(parents=True, exist_ok=True)
    shots = [(index, shot) for shot in range(args.shots) for index in indices]
    pictures = [draw(tool, rows, index, shot, settings, folder / f"{index:04}-{shot}.png") for index, shot in shots]
    return [
        (figures(tool.models.pipe.vae, rows, index, picture), picture)
        for (index, _), picture in zip(shots, pictures, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", default="data/rendered/heldout", help="product dataset")
    parser.add_argument("--products", type=int, default=16, help="spread evenly over the dataset")
    parser.add_argument("--shots", type=int, default=2, help="pictures of each product; prompts take turns")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=3.5)
    parser.add_argument("--only", default="", help="variants with these words in their name")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablations")
    parser.add_argument("overrides", nargs="*", help="keys for every training, such as train.max_steps=3000")
    args = parser.parse_args()
    rows = load_rows("data", args.data)
    indices = [int(place) for place in np.linspace(0, len(rows) - 1, args.products)]
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    lines = [line([rows.read(index, ("image",))["image"] for index in indices])]
    for name, seed, tool in tools(args.seeds, args.only, args.out, args.overrides):
        place = args.out / "pictures" / re.sub(r"\W+", "_", f"{name} {seed}")
        results = measured(tool, rows, indices, args, place)
        found.setdefault(name, {})[seed] = [figure for figure, _ in results]
        if seed == 0:
            lines.append(line([picture for _, picture in results[: len(indices)]]))
        print(name, seed, averages(found[name][seed]), flush=True)
        with replacing_file(args.out / "measured.json") as file:
            file.write_text(json.dumps(found, indent=2) + "\n")
        (args.out / "table.md").write_text(table(found) + "\n")
    Image.fromarray(np.vstack(lines)).save(args.out / "sheet.png")
    print(table(found))


if __name__ == "__main__":
    main()

"""The same products before several references, each with several ControlNets: a sheet to look at.

    python -m benchmarks.grid outputs/{inpaint,canny,depth}/export --ip-adapter outputs/ip_adapter/export

A block per product: a line for no ControlNet and for each of them, a column per reference. Products and references are
held out, the pictures as generate.py writes them; no word in the prompt.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.composition import together
from benchmarks.references import without_product
from packshot.config.schema import GenerateSettings
from packshot.dataset.rows import Rows, load_rows
from packshot.generate import Packshot
from packshot.runs.files import replacing_file

ROOT = Path(__file__).resolve().parents[1]
SIDE, STRIP = 128, 14  # px: a picture, a line of words


def labelled(picture: Image.Image, words: str) -> np.ndarray:
    """A picture with a line of words below it."""
    cell = Image.new("RGB", (SIDE, SIDE + STRIP), "white")
    cell.paste(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    ImageDraw.Draw(cell).text((2, SIDE), words, fill="black")
    return np.asarray(cell)


def lines(
    tool: Packshot, name: str, rows: Rows, products: list[int], looks: list[Image.Image], steps: int
) -> list[np.ndarray]:
    """A line per product: the photo, then a picture per reference."""
    settings, found = GenerateSettings(num_inference_steps=steps, guidance_scale=3.5), []
    for number, index in enumerate(products):
        row = rows.read(index, ("image", "mask", "depth"))
        tool.set_product(row["image"], row["mask"], row["id"], depth=row.get("depth"))
        cells = [labelled(row["image"], name)]
        for look in looks:
            [result] = tool.generate("", 1, seed=number, reference=look, settings=settings)
            cells.append(labelled(result.image, ""))
        found.append(np.hstack(cells))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("controlnets", type=Path, nargs="+", help="export folders of train_controlnet.py")
    parser.add_argument("--ip-adapter", type=Path, required=True, help="export folder of train_ip_adapter.py")
    parser.add_argument("--references", type=int, nargs="+", default=[154, 105, 62, 82], help="rows likewise")
    parser.add_argument("--products", type=int, nargs="+", default=[17, 45, 101], help="rows of the held-out set")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "grid.png")
    args = parser.parse_args()
    rows = load_rows("data", "data/rendered/heldout")
    scenes = [rows.read(index, ("image", "mask")) for index in args.references]
    looks = [without_product(scene["image"], scene["mask"]) for scene in scenes]
    head = [labelled(Image.new("RGB", (SIDE, SIDE), "white"), "references"), *(labelled(look, "") for look in looks)]
    blocks: list[list[np.ndarray]] = [[] for _ in args.products]
    for path in (None, *args.controlnets):
        tool = Packshot.load(adapters=together([*([path] if path else []), args.ip_adapter]))
        name = tool.models.controls[0].condition if path else "no ControlNet"
        for block, line in zip(blocks, lines(tool, name, rows, args.products, looks, args.steps), strict=True):
            block.append(line)
    sheet = Image.fromarray(np.vstack([np.hstack(head), *(line for block in blocks for line in block)]))
    with replacing_file(args.out) as file:
        sheet.save(file, format="png")


if __name__ == "__main__":
    main()

"""Draws PackshotBench's items by Packshot itself, and by the ways of pasting that it is compared with.

    packshot bench --export outputs/bench-items
    python -m benchmarks.bench_rows outputs/bench-items outputs/bench-rows --controlnet outputs/demo/controlnet/export
    packshot bench outputs/bench-items/truth outputs/bench-rows/*.csv --out outputs/bench

Writes a folder and a table for each system: the base alone, the base with a ControlNet, and two that take the base's
backgrounds: the product pasted through a hard mask at the model's size, and through a blurred mask. Pictures that are
there are kept, so a stopped run continues.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import AdaptersConfig, GenerateSettings
from packshot.evaluate.items import TABLE, Item, open_items
from packshot.evaluate.preservation import hard_paste
from packshot.generate import Packshot, Result
from packshot.generate.composite import blend
from packshot.runs.files import replacing_file
from packshot.runs.progress import progress

FEATHER = 3.0  # px, standard deviation of the blurred mask


def save(folder: Path, item: Item, picture: np.ndarray, seconds: float) -> None:
    """One picture with what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(folder / f"{item.id}.png") as temporary:
        Image.fromarray(picture).save(temporary, "PNG")
    with replacing_file(folder / f"{item.id}.json") as temporary:
        temporary.write_text(json.dumps({"seconds": round(seconds, 3)}))


def draw(tool: Packshot, item: Item, settings: GenerateSettings) -> tuple[Result, float]:
    """The picture of an item, and the seconds that it took."""
    started = time.monotonic()
    tool.set_product(item.pictures["photo"], item.pictures["mask"], item.id)
    [result] = tool.generate(item.text, 1, 0, settings=settings)
    return result, time.monotonic() - started


def paste(item: Item, result: Result) -> dict[str, np.ndarray]:
    """The photograph pasted onto the background that was drawn, by system."""
    photo_HW3, mask_HW = item.photo_and_mask()
    background_HW3 = np.asarray(result.layers["background"])
    blurred_HW = cv2.GaussianBlur(mask_HW, (0, 0), FEATHER)
    return {
        "hard-paste": hard_paste(photo_HW3, mask_HW, background_HW3, np.asarray(result.layers["raw"])),
        "feathered-paste": blend(photo_HW3, blurred_HW, background_HW3),
    }


def write_table(folder: Path) -> None:
    """The results of a folder as a table that evaluate.py reads."""
    with folder.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "picture", "seconds"])
        for picture in sorted(folder.glob("*.png")):
            seconds = json.loads(picture.with_suffix(".json").read_text())["seconds"]
            writer.writerow([picture.stem, f"{folder.name}/{picture.name}", seconds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--controlnet", type=Path, help="export folder of train_controlnet.py")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    items = open_items(args.items / TABLE, args.out)
    settings = GenerateSettings(num_inference_steps=args.steps)
    systems = {"packshot-base": Packshot.load()}
    if args.controlnet:
        systems["packshot-controlnet"] = Packshot.load(adapters=AdaptersConfig(controlnets=[str(args.controlnet)]))
    for name, tool in systems.items():
        with progress(name, total=len(items)) as advance:
            for item in items:
                if not (args.out / name / f"{item.id}.json").exists():
                    result, seconds = draw(tool, item, settings)
                    for other, picture in (paste(item, result) if name == "packshot-base" else {}).items():
                        save(args.out / other, item, picture, seconds)
                    save(args.out / name, item, np.asarray(result.image), seconds)
                advance()
    for folder in sorted(args.out.iterdir()):
        if folder.is_dir():
            write_table(folder)


if __name__ == "__main__":
    main()

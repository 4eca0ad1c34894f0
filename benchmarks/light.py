"""Does light fall from the side that is asked for? Held-out products, lit from the left and from the right.

    python -m benchmarks.light outputs/light/export

A judge reads the side off a picture: ridge regression on brightness around the product, mirrored halves subtracted,
learned from training renders whose shadow falls to one side. The product itself is greyed: its own pixels are lit
as they were photographed. Each product is drawn twice from one seed, once for each side, with the caption of its scene
less the light. Also writes a sheet: photo, lit from the left, from behind, from the right.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.grid import labelled
from packshot.config.schema import GenerateSettings
from packshot.dataset.rows import Rows, load_rows
from packshot.generate import Packshot
from packshot.imaging.framing import product_box
from packshot.imaging.light_direction import light_direction
from packshot.runs.files import replacing_file
from packshot.scene import Scene

ROOT = Path(__file__).resolve().parents[1]
LEFT, BEHIND, RIGHT = 180.0, 90.0, 0.0
WORDS = {LEFT: "soft light from the left side", RIGHT: "soft light from the right side"}
RIDGE = 1000.0
CERTAIN = 0.5  # of the direction's right component: renders with less are not learned from


def side_features(image: Image.Image, mask: Image.Image) -> np.ndarray:
    """Brightness around the product and its horizontal slope at 16 x 16, less their mirror images: (512,).

    The product is at one place and of one size in all of them; its pixels are replaced by the mean of the others.
    """
    box = product_box(mask)
    assert box is not None
    top, left, bottom, right = box
    lightness_HW = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2LAB)[..., 0].astype(np.float32) / 255
    product_HW = cv2.dilate((np.asarray(mask) > 10).astype(np.uint8), np.ones((3, 3))) > 0
    lightness_HW[product_HW] = lightness_HW[~product_HW].mean()
    scale = 64 / max(bottom - top, right - left)
    move = np.array([[scale, 0, 64 - scale * (left + right) / 2], [0, scale, 96 - scale * bottom]])
    same_HW = cv2.warpAffine(lightness_HW, move, (128, 128), borderMode=cv2.BORDER_REPLICATE)
    small_HW, finer_HW = (cv2.resize(same_HW, (side, side), interpolation=cv2.INTER_AREA) for side in (16, 32))
    slope_HW = cv2.resize(cv2.Sobel(finer_HW, cv2.CV_32F, 1, 0), (16, 16), interpolation=cv2.INTER_AREA)
    return np.concatenate([(small_HW - small_HW[:, ::-1]).ravel(), (slope_HW + slope_HW[:, ::-1]).ravel()])


def sided(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Features of the renders that are lit from one side, and which: 1 the right, -1 the left."""
    features, sides = [], []
    for index in range(len(rows)):
        row = rows.read(index, ("image", "mask", "shadow"))
        shadow_HW, mask_HW = (np.asarray(row[name], np.float32) / 255 for name in ("shadow", "mask"))
        right, _ = light_direction(shadow_HW, mask_HW)
        if abs(right) >= CERTAIN:
            features.append(side_features(row["image"], row["mask"]))
            sides.append(np.sign(right))
    return np.stack(features), np.array(sides)


def learn(rows: Rows) -> np.ndarray:
    """Weights of the judge; a positive product with :func:`side_features` means right."""
    x_ND, y_N = sided(rows)
    scale_D = x_ND.std(0) + 1e-3
    x_ND = x_ND / scale_D
    return np.linalg.solve(x_ND.T @ x_ND + RIDGE * np.eye(x_ND.shape[1]), x_ND.T @ y_N) / scale_D


def draw(tool: Packshot, row: dict[str, Any], seed: int, steps: int, words: str | None, angle: float | None):
    """One picture of the row's scene. words: the light in its caption. angle: that of the map."""
    settings = GenerateSettings(num_inference_steps=steps, guidance_scale=3.5, light_angle=angle)
    scene: Scene = replace(row["scene"], lighting=words)
    tool.set_product(row["image"], row["mask"], row["id"])
    [result] = tool.generate(scene, 1, seed=seed, settings=settings)
    return result.image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("controlnet", type=Path, help="export folder of train_controlnet.py method.condition=light")
    parser.add_argument("--count", type=int, default=60, help="held-out products")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "light.png")
    args = parser.parse_args()
    rows = load_rows("heldout", str(ROOT / "data" / "rendered" / "heldout"))
    judge_D = learn(load_rows("train", str(ROOT / "data" / "rendered" / "train")))
    features, sides = sided(rows)
    print(f"the judge on {len(sides)} held-out renders: {np.mean(np.sign(features @ judge_D) == sides):.2f}")
    chosen = [rows.read(int(i), ("image", "mask")) for i in np.linspace(0, len(rows) - 1, args.count)]
    plain, told = Packshot.load(), Packshot.load(controlnets=[str(args.controlnet)])
    ways = {
        "words": lambda row, seed, angle: draw(plain, row, seed, args.steps, WORDS[angle], None),
        "map": lambda row, seed, angle: draw(told, row, seed, args.steps, None, angle),
        "words and map": lambda row, seed, angle: draw(told, row, seed, args.steps, WORDS[angle], angle),
        "map, words of the other side": lambda row, seed, angle: draw(
            told, row, seed, args.steps, WORDS[LEFT + RIGHT - angle], angle
        ),
    }
    print("\n| told by | pictures lit from the side asked for | of two, the one asked for is lit more from the right |")
    print("|---|---|---|")
    for name, way in ways.items():
        said = {
            angle: np.array(
                [side_features(way(row, seed, angle), row["mask"]) @ judge_D for seed, row in enumerate(chosen)]
            )
            for angle in (LEFT, RIGHT)
        }
        right = np.concatenate([said[RIGHT] > 0, said[LEFT] < 0]).mean()
        print(f"| {name} | {right:.2f} | {np.mean(said[RIGHT] > said[LEFT]):.2f} |", flush=True)
    sheet = []
    for seed, row in enumerate(chosen[:: max(1, len(chosen) // 6)][:6]):
        angles = {"from the left": LEFT, "from behind": BEHIND, "from the right": RIGHT}
        cells = [labelled(row["image"], "photo")]
        cells += [labelled(draw(told, row, seed, args.steps, None, angle), name) for name, angle in angles.items()]
        sheet.append(np.hstack(cells))
    with replacing_file(args.out) as temporary:
        Image.fromarray(np.vstack(sheet)).save(temporary, format="PNG")
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()

"""The edge of products on another background, against the true composite: un-mixed, blended, pasted.

    OMP_NUM_THREADS=1 python -m benchmarks.halo

Held-out renders: the photograph is the product in its own scene, the new background is the next scene without its
product, and the truth is the render's own cut-out over that.
"""

from __future__ import annotations

import argparse

import cv2
import numpy as np
from PIL import Image

from packshot.dataset.rows import load_rows
from packshot.generate.color import delta_e
from packshot.generate.composite import blend
from packshot.generate.product import core_of, prepare
from packshot.imaging.halo import old_background_left

BLURS = (1.0, 3.0)  # px, standard deviation of a feathered mask
REACH = 2  # px outside of the soft edge that belong to it


def hard(alpha_HW: np.ndarray) -> np.ndarray:
    """A mask of 0 and 255."""
    return np.where(alpha_HW >= 128, np.uint8(255), np.uint8(0))


def ways(photo_HW3: np.ndarray, alpha_HW: np.ndarray, plate_HW3: np.ndarray) -> dict[str, np.ndarray]:
    """The product over a new background, by each way of putting it there."""
    photo = Image.fromarray(photo_HW3)
    soft = prepare(photo, Image.fromarray(alpha_HW))
    binary = prepare(photo, Image.fromarray(hard(alpha_HW)))
    made = {
        "un-mixed (Packshot)": blend(soft.foreground_HW3, soft.matte_HW, plate_HW3),
        "un-mixed, from a hard mask": blend(binary.foreground_HW3, binary.matte_HW, plate_HW3),
        "soft alpha, not un-mixed": blend(photo_HW3, alpha_HW, plate_HW3),
        "hard paste": blend(photo_HW3, hard(alpha_HW), plate_HW3),
    }
    for blur in BLURS:
        made[f"feathered paste, {blur:g} px"] = blend(photo_HW3, cv2.GaussianBlur(alpha_HW, (0, 0), blur), plate_HW3)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", default="data/rendered/heldout")
    args = parser.parse_args()
    rows = load_rows("renders", args.renders)
    edges: dict[str, list[np.ndarray]] = {}
    halos: dict[str, list[float]] = {}
    cores: dict[str, list[float]] = {}
    for number in range(len(rows)):
        row = rows.read(number, ("image", "cutout"))
        plate_HW3 = np.asarray(rows.read((number + 1) % len(rows), ("plate",))["plate"].convert("RGB"))
        cutout = np.asarray(row["cutout"].convert("RGBA"))
        photo_HW3 = np.asarray(row["image"].convert("RGB"))
        alpha_HW = np.ascontiguousarray(cutout[..., 3])
        # where alpha is full the photograph itself is the truth: the cut-out was compressed apart from it
        colours_HW3 = np.where((alpha_HW == 255)[..., None], photo_HW3, cutout[..., :3])
        truth_HW3 = blend(colours_HW3, alpha_HW, plate_HW3)
        near_HW = cv2.dilate(alpha_HW, np.ones((2 * REACH + 1,) * 2, np.uint8)) > 0
        band_HW = near_HW & (alpha_HW < 255)
        core_HW = core_of(alpha_HW)
        for name, made_HW3 in {**ways(photo_HW3, alpha_HW, plate_HW3), "the truth": truth_HW3}.items():
            edges.setdefault(name, []).append(delta_e(made_HW3[band_HW], truth_HW3[band_HW]))
            cores.setdefault(name, []).append(float((made_HW3[core_HW] == photo_HW3[core_HW]).all(axis=-1).mean()))
            left = old_background_left(made_HW3, photo_HW3, colours_HW3, alpha_HW)
            if left is not None:
                halos.setdefault(name, []).append(left)
    print("| way | edge ΔE, mean | median | 95th percentile | old background left | core identical |")
    print("|---|---|---|---|---|---|")
    for name, several in edges.items():
        values = np.concatenate(several)
        core = np.mean(cores[name])
        print(
            f"| {name} | {values.mean():.2f} | {np.median(values):.2f} | {np.percentile(values, 95):.1f} | "
            f"{np.mean(halos[name]):.3f} | {core:.1%} |"
        )
    print(f"\n{len(rows)} pairs, {len(np.concatenate(edges['the truth'])):,} px of edge")


if __name__ == "__main__":
    main()

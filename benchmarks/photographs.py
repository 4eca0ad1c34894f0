"""Masks of large pictures: how often they are right, and how often the accepted ones are.

    OMP_NUM_THREADS=1 python -m benchmarks.photographs --stamps /usr/share/tuxpaint/stamps

Photographic cut-outs of things, from Debian's package ``tuxpaint-stamps-default``, and drawn packages, each before
drawn grounds of eight kinds, with shadow, mirror image, noise and JPEG (``tools/composites.py``). No network saw these
cut-outs. ``--wallpapers`` adds photographs as grounds. Pictures are made in memory and not kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import MatteConfig
from packshot.imaging.mask_doubt import iou
from packshot.imaging.masks import NoProductError, find_mask
from tools import composites
from tools.composites import GROUNDS, Cutout, Rng

RIGHT = 0.9  # IoU from which a mask is right
SEED = 7
SIZES = ((640, 640), (900, 720), (720, 960), (1000, 1000))
THINGS = ("clothes", "food", "hobbies", "household", "medical", "vehicles")  # folders of stamps that have products
LEAST_SIDE = 140  # px, longer side of a stamp
OPAQUE = 0.9  # share of a product that is opaque, at least; glass has no truth here


@dataclass(frozen=True)
class Result:
    """A found mask. overlap: its IoU with the truth. accepted: whether nothing speaks against it."""

    kind: str
    ground: str
    overlap: float
    accepted: bool


def stamps(folder: Path) -> list[Cutout]:
    """Photographic stamps of things, each large and opaque enough."""
    found = []
    for thing in THINGS:
        for file in sorted((folder / thing).rglob("*.png")):
            if "cartoon" in file.parts or "_mirror" in file.stem or "_flip" in file.stem:
                continue
            with Image.open(file) as image:
                if image.mode != "RGBA" or max(image.size) < LEAST_SIDE or np.asarray(image)[..., 3].min() > 0:
                    continue
            cutout = composites.read_cutout(file)
            seen = cutout.alpha_HW > 0.1
            if cutout.alpha_HW[seen].mean() >= OPAQUE:
                found.append(cutout)
    return found


def part_of(file: Path, shape: tuple[int, int], rng: Rng) -> np.ndarray:
    """A part of a photograph as a ground, float32 (H, W, 3)."""
    with Image.open(file) as image:
        image.thumbnail((2400, 2400))
        rgb_HW3 = np.asarray(image.convert("RGB"))
    scale = max(shape[0] / rgb_HW3.shape[0], shape[1] / rgb_HW3.shape[1]) * float(rng.uniform(1, 1.6))
    rgb_HW3 = cv2.resize(rgb_HW3, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top = int(rng.integers(rgb_HW3.shape[0] - shape[0] + 1))
    left = int(rng.integers(rgb_HW3.shape[1] - shape[1] + 1))
    return rgb_HW3[top : top + shape[0], left : left + shape[1]].astype(np.float32)


def pictures(
    products: list[Cutout], wallpapers: list[Path], drawn: int, seed: int = SEED
) -> Iterator[tuple[str, composites.Photograph]]:
    """Every stamp before three grounds, and drawn packages before one each, a fifth of them in the ground's colour."""
    names = [*GROUNDS, *(["wallpaper"] if wallpapers else [])]
    jobs: list[Cutout | None] = [product for product in products for _ in range(3)] + [None] * drawn
    for number, product in enumerate(jobs):
        rng = np.random.default_rng([seed, number])
        shape = SIZES[int(rng.integers(len(SIZES)))]
        name = names[(number * 5 + number // len(names) + seed - SEED) % len(names)]
        if name == "wallpaper":
            ground_HW3 = part_of(wallpapers[int(rng.integers(len(wallpapers)))], shape, rng)
        else:
            ground_HW3 = GROUNDS[name](rng, shape)
        cutout = product or composites.drawn_package(rng)
        if product is None and number % 5 == 0:
            cutout = composites.in_colour(cutout, ground_HW3[int(0.7 * shape[0])].mean(axis=0), 0.95)
        fill = float(rng.uniform(0.5, 0.8))
        kind = "drawn" if product is None else "stamp"
        yield kind, composites.compose(cutout, ground_HW3, name, composites.some_setting(rng), rng, fill)


def result(kind: str, photograph: composites.Photograph) -> Result:
    """The mask that a user gets, against the truth; a refused one counts as an empty one."""
    matte = MatteConfig(min_confidence=0.0)
    try:
        mask = find_mask(Image.fromarray(photograph.rgb_HW3), matte)
    except NoProductError:
        return Result(kind, photograph.ground, 0.0, False)
    accepted = not mask.reasons and mask.confidence >= MatteConfig().min_confidence
    return Result(kind, photograph.ground, iou(mask.alpha_HW >= 0.5, photograph.alpha_HW >= 0.5), accepted)


def row(name: str, results: list[Result]) -> str:
    right = np.array([result.overlap >= RIGHT for result in results])
    accepted = np.array([result.accepted for result in results])
    of_accepted = right[accepted].mean() if accepted.any() else float("nan")
    of_right = accepted[right].mean() if right.any() else float("nan")
    wrong = int((accepted & ~right).sum())
    shares = " | ".join(f"{share:.1%}" for share in (right.mean(), accepted.mean(), of_accepted, of_right))
    return f"| {name} | {len(results)} | {shares} | {wrong} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, required=True, help="folder of stamps")
    parser.add_argument("--wallpapers", type=Path, help="folder of photographs that serve as a ninth kind of ground")
    parser.add_argument("--drawn", type=int, default=60, help="drawn packages")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is drawn; another one makes another set")
    args = parser.parse_args()
    wallpapers = sorted(args.wallpapers.rglob("*.jpg")) if args.wallpapers else []
    results = []
    for kind, photograph in pictures(stamps(args.stamps), wallpapers, args.drawn, args.seed):
        results.append(result(kind, photograph))
    print(
        "| masks | number | right (IoU .9) | accepted | right of those | accepted of the right | accepted and wrong |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in sorted({result.ground for result in results}):
        print(row(f"before {name}", [result for result in results if result.ground == name]))
    for kind in ("stamp", "drawn"):
        print(row(kind, [result for result in results if result.kind == kind]))
    for half in range(2):
        print(row(("even half", "odd half")[half], results[half::2]))
    print(row("all", results))


if __name__ == "__main__":
    main()

"""How often accepted masks are right: the curve of precision against acceptance of mask doubts.

    OMP_NUM_THREADS=1 python -m benchmarks.mask_doubts

Held-out renders in their scenes, and the same products before white, grey and coloured walls. The traits of a mask
(``imaging.mask_doubt``) are weighed by a logistic regression on half of the products, whose weights it prints, and both
tables are of the other half.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.optimize import minimize

from packshot.config.schema import MatteConfig
from packshot.dataset.rows import Rows, load_rows
from packshot.generate.composite import blend
from packshot.imaging.mask_doubt import iou
from packshot.imaging.masks import NoProductError, find_mask

RIGHT = 0.9  # IoU from which a mask is right
WALLS = {"white": (255, 255, 255), "grey": (150, 150, 150), "coloured": (196, 150, 120)}
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Judged:
    """A mask against the truth. traits: see ``mask_doubt.traits``. accepted: by the shipped limits."""

    ground: str
    product: str
    overlap: float
    traits: np.ndarray
    accepted: bool


def grounds(rows: Rows, number: int) -> tuple[str, np.ndarray, dict[str, Image.Image]]:
    """The product's name, its true mask (bool), and pictures of it before each ground."""
    row = rows.read(number, ("image", "mask", "cutout"))
    matte_HW = np.asarray(row["mask"])
    colours_HW3 = np.ascontiguousarray(np.asarray(row["cutout"].convert("RGBA"))[..., :3])
    pictures = {"scene": row["image"].convert("RGB")}
    for name, color in WALLS.items():
        wall_HW3 = np.full_like(colours_HW3, color)
        pictures[name] = Image.fromarray(blend(colours_HW3, matte_HW, wall_HW3))
    return row["product_id"], matte_HW >= 128, pictures


def judge_all(rows: Rows, every: int) -> list[Judged]:
    """Every mask that the default finds."""
    found = []
    matte = MatteConfig(min_confidence=0.0)
    for number in range(0, len(rows), every):
        product, truth_HW, pictures = grounds(rows, number)
        for ground, picture in pictures.items():
            try:
                mask = find_mask(picture, matte)
            except NoProductError:
                continue
            if mask.traits is None:
                continue
            overlap = iou(mask.alpha_HW >= 0.5, truth_HW)
            accepted = not mask.reasons and mask.confidence >= MatteConfig().min_confidence
            found.append(Judged(ground, product, overlap, mask.traits, accepted))
    return found


def fitted(masks: list[Judged]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, spread and weights (the last is the offset) of a logistic regression of "right" on the traits."""
    measured = np.array([mask.traits for mask in masks])
    kind = np.array([1.0 if mask.overlap >= RIGHT else -1.0 for mask in masks])
    mean = measured.mean(axis=0)
    spread = measured.std(axis=0) + 1e-6
    scaled = (measured - mean) / spread

    def loss(weights: np.ndarray) -> float:
        margins = kind * (scaled @ weights[:-1] + weights[-1])
        return float(np.logaddexp(0, -margins).mean() + 0.003 * (weights[:-1] ** 2).sum())

    return mean, spread, minimize(loss, np.zeros(measured.shape[1] + 1)).x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", default="data/rendered/heldout")
    parser.add_argument("--every", type=int, default=1, help="take one scene of so many")
    args = parser.parse_args()
    rows = load_rows("renders", args.renders)
    masks = judge_all(rows, args.every)
    products = sorted({str(rows.read(number, ())["product_id"]) for number in range(len(rows))})
    # halves by product: one product's masks resemble each other
    first = set(products[::2])
    fit_on = [mask for mask in masks if mask.product in first]
    shown = [mask for mask in masks if mask.product not in first]
    mean, spread, weights = fitted(fit_on)
    raw = weights[:-1] / spread
    print("WEIGHTS =", tuple(np.round(raw, 3).tolist()), "OFFSET =", round(float(weights[-1] - raw @ mean), 3))
    print("| ground | masks | right (IoU .9) | accepted | right of those | accepted of the right |")
    print("|---|---|---|---|---|---|")
    for ground in ["scene", *WALLS, "all"]:
        chosen = [mask for mask in shown if ground in (mask.ground, "all")]
        right = np.array([mask.overlap >= RIGHT for mask in chosen])
        accepted = np.array([mask.accepted for mask in chosen])
        of_accepted = right[accepted].mean() if accepted.any() else float("nan")
        of_right = accepted[right].mean() if right.any() else float("nan")
        shares = (right.mean(), accepted.mean(), of_accepted, of_right)
        print(f"| {ground} | {len(chosen)} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    right = np.array([mask.overlap >= RIGHT for mask in shown])
    scores = np.array([((mask.traits - mean) / spread) @ weights[:-1] + weights[-1] for mask in shown])
    order = np.argsort(-scores, kind="stable")
    print("\n| accepted share | right of those | accepted of the right |\n|---|---|---|")
    for share in SHARES:
        taken = order[: max(1, round(share * len(order)))]
        print(f"| {share:.0%} | {right[taken].mean():.1%} | {right[taken].sum() / right.sum():.1%} |")


if __name__ == "__main__":
    main()

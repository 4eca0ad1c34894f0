"""How well products are found: GrabCut alone, the family's network alone, and GrabCut guided by the network.

    python -m benchmarks.masks data/rendered/heldout data/rendered/showcase

On sets with masks. Prints per set and way the mean IoU, the shares above 0.9 and below 0.5, and how many were refused
for want of confidence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import MatteConfig
from packshot.dataset.rows import load_rows
from packshot.imaging.masks import NoProductError, find_mask
from packshot.imaging.matting_network import load_matting, predict_alpha

Way = Callable[[Image.Image], tuple[np.ndarray, bool]]  # alpha and whether it was believed


def found(image: Image.Image, matte: MatteConfig) -> tuple[np.ndarray, bool]:
    """The mask, and whether it is accepted by default."""
    believed = MatteConfig().min_confidence
    try:
        mask = find_mask(image, matte)
    except NoProductError:
        return np.zeros((image.height, image.width), np.float32), False
    return mask.alpha_HW, mask.confidence >= believed and not mask.reasons


def network_alone(image: Image.Image, network: str) -> tuple[np.ndarray, bool]:
    alpha_HW = predict_alpha(load_matting(network), np.asarray(image))
    return cv2.resize(alpha_HW, image.size, interpolation=cv2.INTER_LINEAR), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--network", default="data/models/matting")
    parser.add_argument("--count", type=int, default=100, help="pictures of each set, evenly spread")
    args = parser.parse_args()
    ways: dict[str, Way] = {
        "GrabCut alone": lambda image: found(image, MatteConfig(model="grabcut", min_confidence=0.0)),
        "network alone": lambda image: network_alone(image, args.network),
        "the default": lambda image: found(image, MatteConfig(min_confidence=0.0)),
    }
    print("| set | way | mean IoU | above 0.9 | below 0.5 | refused | s per picture |\n|---|---|---|---|---|---|---|")
    for path in args.sets:
        rows = load_rows("set", path)
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(args.count, len(rows))).astype(int))
        samples = [rows.read(int(index), ("image", "mask")) for index in chosen]
        for name, way in ways.items():
            started, scores, refused = time.perf_counter(), [], 0
            for sample in samples:
                alpha_HW, believed = way(sample["image"].convert("RGB"))
                a, b = alpha_HW >= 0.5, np.asarray(sample["mask"]) >= 128
                scores.append((a & b).sum() / (a | b).sum())
                refused += not believed
            iou, seconds = np.array(scores), (time.perf_counter() - started) / len(samples)
            print(
                f"| {path}, {len(samples)} | {name} | {iou.mean():.3f} | {(iou > 0.9).mean():.0%} | "
                f"{(iou < 0.5).mean():.0%} | {refused} | {seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

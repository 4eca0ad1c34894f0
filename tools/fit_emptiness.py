"""Fits the weights of ``packshot.imaging.emptiness`` on renders and their plates, and measures it on held-out ones.

    python -m tools.fit_emptiness
Ten minutes on one core; writes ``src/packshot/imaging/emptiness.json`` and prints the figures of ``docs/datasets.md``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from scipy.optimize import minimize

from packshot.config.mask_models import MINI
from packshot.imaging.emptiness import signs_of
from packshot.imaging.matting_network import load_matting, predict_alpha

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "src/packshot/imaging/emptiness.json"
DECAY = 3e-4
SMALLEST = 0.6  # of the side: crops show products away from the middle, where renders have them
LIMITS = (0.12, 0.27, 0.5)


@dataclass
class Measured:
    """signs: (N, S). shown: whether there is a product. cropped: whether it is a crop."""

    signs: np.ndarray
    shown: np.ndarray
    cropped: np.ndarray


def read_picture(cell: dict[str, bytes], mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert(mode))


def window(mask_HW: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """A square crop with the whole product anywhere in it; None without a product."""
    rows, columns = map(np.flatnonzero, (mask_HW.any(1), mask_HW.any(0)))
    if not len(rows):
        return None
    full = mask_HW.shape[0]
    spans = [(int(found[0]), int(found[-1]) + 1) for found in (rows, columns)]
    needed = max(end - start for start, end in spans) + 4
    side = int(rng.integers(min(full, max(needed, int(full * SMALLEST))), full + 1))
    starts = []
    for start, end in spans:
        low, high = max(0, end + 2 - side), min(full - side, max(start - 2, 0))
        starts.append(int(rng.integers(low, high + 1)) if high >= low else min(max(0, start - 2), full - side))
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def views(folder: Path, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """(picture, whether it shows a product, whether it is a crop): each scene and its plate, whole and cropped."""
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file, columns=["image", "plate", "mask"]).to_pylist():
            part = window(read_picture(row["mask"], "L") > 127, rng)
            for name in ("image", "plate"):
                pixels = read_picture(row[name], "RGB")
                yield pixels, name == "image", False
                if part:
                    yield np.ascontiguousarray(pixels[part]), name == "image", True


def measure(folder: Path, rng: np.random.Generator) -> Measured:
    """The signs of all views."""
    network = load_matting(MINI)
    signs, shown, cropped = [], [], []
    for pixels, is_shown, is_crop in views(folder, rng):
        signs.append(signs_of(predict_alpha(network, pixels), pixels))
        shown.append(is_shown)
        cropped.append(is_crop)
    return Measured(np.array(signs), np.array(shown), np.array(cropped))


def fit(signs_NS: np.ndarray, shown_N: np.ndarray) -> dict[str, list[float]]:
    """Logistic regression on the signs and their squares."""
    inputs = np.concatenate([signs_NS, signs_NS**2], 1)
    mean, scale = inputs.mean(0), inputs.std(0) + 1e-6
    inputs = (inputs - mean) / scale
    side = np.where(shown_N, 1.0, -1.0)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        margin = side * (inputs @ values[:-1] + values[-1])
        pull = side / (1 + np.exp(np.clip(margin, -50, 50)))
        gradient = np.append(-(inputs * pull[:, None]).mean(0) + DECAY * values[:-1], -pull.mean())
        return float(np.logaddexp(0, -margin).mean() + DECAY / 2 * values[:-1] @ values[:-1]), gradient

    found = minimize(loss, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B").x
    parts = {"mean": mean, "scale": scale, "weight": found[:-1], "bias": found[-1:]}
    return {name: [float(f"{value:.6g}") for value in values] for name, values in parts.items()}


def confidences(fitted: dict[str, list[float]], signs_NS: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1]."""
    scaled = (np.concatenate([signs_NS, signs_NS**2], 1) - fitted["mean"]) / np.array(fitted["scale"])
    return 1 / (1 + np.exp(-(scaled @ fitted["weight"] + fitted["bias"][0])))


def main() -> None:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(7)
    heldout = measure(ROOT / "data/rendered/heldout", rng)
    training = measure(ROOT / "data/rendered/train", rng)
    fitted = fit(training.signs, training.shown)
    FILE.write_text(json.dumps(fitted) + "\n")
    values = confidences(fitted, heldout.signs)
    for cropped in (False, True):
        of_kind = heldout.cropped == cropped
        for limit in LIMITS:
            found = (values[of_kind & heldout.shown] > limit).mean()
            lost = (values[of_kind & ~heldout.shown] > limit).mean()
            print(f"{'crops' if cropped else 'whole'}, above {limit}: {found:.1%} of scenes, {lost:.1%} of plates")


if __name__ == "__main__":
    main()

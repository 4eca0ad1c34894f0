"""Fits the network of ``packshot.imaging.shadows`` on rendered shadows, and measures it on held-out ones.

    python -m tools.fit_shadows
Three minutes on one core; writes ``src/packshot/imaging/shadows.json`` and prints the figures of ``docs/log.md``.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from packshot.imaging import shadows
from packshot.imaging.shadows import DARKEST, REACH, Light, features, is_harsh, outline_of
from packshot.scene.light import light_angle

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "src/packshot/imaging/shadows.json"
HIDDEN = (24, 16)
PIXELS = 1400  # of each training scene
BATCH = 8192
GLOSSY = ("gloss", "water", "black", "marble")  # surfaces in which the layer shows a mirror image, too


@dataclass(frozen=True)
class Shot:
    """A rendered scene: the mask (bool), the light, the logarithm of the true layer, and the pixels that count."""

    mask_HW: np.ndarray
    light: Light
    truth_HW: np.ndarray
    area_HW: np.ndarray
    surface: str

    @property
    def is_matt(self) -> bool:
        """Whether the layer shows a shadow alone: in the others it is a mirror image as well, which is no shadow."""
        return not any(word in self.surface for word in GLOSSY)


def read_picture(cell: dict[str, bytes]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("L"))


def read_shots(folder: Path) -> Iterator[Shot]:
    """The scenes of a rendered set that have a product."""
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file, columns=["mask", "shadow", "scene"]).to_pylist():
            alpha = read_picture(row["mask"])
            mask = alpha >= 128
            outline = outline_of(mask)
            area = (alpha < 8) & (shadows.distance_to(mask) <= REACH * max(outline.height, outline.width))
            truth = np.log(np.maximum(read_picture(row["shadow"]) / 255, DARKEST))
            lighting = row["scene"]["lighting"]
            light = Light(light_angle(lighting), is_harsh(lighting))
            yield Shot(mask, light, truth.astype(np.float32), area, row["scene"]["surface"])


def training_pixels(shots: list[Shot]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and truth of some pixels of every scene."""
    rng = np.random.default_rng(0)
    inputs = []
    targets = []
    for shot in shots:
        chosen = np.flatnonzero(shot.area_HW)
        chosen = rng.choice(chosen, min(PIXELS, chosen.size), replace=False)
        seen = features(shot.mask_HW, shot.light)
        inputs.append(seen.reshape(-1, seen.shape[-1])[chosen])
        targets.append(shot.truth_HW.ravel()[chosen])
    return torch.from_numpy(np.concatenate(inputs)), torch.from_numpy(np.concatenate(targets))


def shadow_loss(found_N: torch.Tensor, truth_N: torch.Tensor) -> torch.Tensor:
    """Squared errors of the light left, which an eye sees, and of its logarithm, which tells dark from black."""
    return 4 * (found_N.exp() - truth_N.exp()).square().mean() + (found_N - truth_N).square().mean()


def fit(inputs_NF: torch.Tensor, targets_N: torch.Tensor, epochs: int) -> list[np.ndarray]:
    """The weights in the order of ``shadows.weights``."""
    torch.manual_seed(0)
    mean = inputs_NF.mean(0)
    spread = inputs_NF.std(0) + 1e-6
    sizes = (inputs_NF.shape[1], *HIDDEN, 1)
    layers: list[torch.nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    steps = epochs * len(targets_N) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(targets_N), (BATCH,))
        out = network((inputs_NF[chosen] - mean) / spread)[:, 0]
        loss = shadow_loss(-torch.nn.functional.softplus(out), targets_N[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = [mean.numpy(), spread.numpy()]
    for layer in network:
        if isinstance(layer, torch.nn.Linear):
            found += [layer.weight.detach().numpy().T, layer.bias.detach().numpy()]
    return found


def near_foot(shot: Shot, reach: float) -> np.ndarray:
    """Bool (H, W): the ground within ``reach`` px of the foot of a product."""
    outline = outline_of(shot.mask_HW)
    foot = shadows.foot_of(shot.mask_HW, outline)
    return shot.area_HW & (shadows.distance_to(foot) <= reach)


def errors(found_N: np.ndarray, truth_N: np.ndarray) -> np.ndarray:
    """Errors of logarithms, each next to that of no shadow: squares, absolute values, and squares of the light left."""
    light = np.exp(truth_N)
    pairs = [(found_N - truth_N) ** 2, truth_N**2, np.abs(found_N - truth_N), np.abs(truth_N)]
    pairs += [(np.exp(found_N) - light) ** 2, (1 - light) ** 2]
    return np.array([values.sum() for values in pairs])


def measure_groups(shots: list[Shot]) -> dict[str, np.ndarray]:
    """By area and kind of surface, :func:`errors` summed over scenes."""
    sums: dict[str, np.ndarray] = {}
    for shot in shots:
        found = shadows.log_layer(shot.mask_HW, shot.light)
        outline = outline_of(shot.mask_HW)
        areas = {
            "around the product": shot.area_HW,
            "within .2 heights of the foot": near_foot(shot, 0.2 * outline.height),
            "within .1 sizes of the foot": near_foot(shot, 0.1 * outline.size),
        }
        for name, area in areas.items():
            for kind in ("all", "matt" if shot.is_matt else "mirroring"):
                group = f"{name}, {kind} surfaces"
                sums[group] = sums.get(group, np.zeros(6)) + errors(found[area], shot.truth_HW[area])
    return sums


def measure(shots: list[Shot]) -> None:
    """Print the errors of the layer as shares of those of no shadow."""
    for group, (square, no_square, absolute, no_absolute, light, no_light) in sorted(measure_groups(shots).items()):
        print(
            f"{group}: RMSE {math.sqrt(square / no_square):.2f}, mean absolute {absolute / no_absolute:.2f}, "
            f"RMSE of the light left {math.sqrt(light / no_light):.2f}"
        )


def darkenings(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What ``ground_darkening`` finds on plates and on pictures of a rendered set; NaN where it finds nothing."""
    found: dict[str, list[float]] = {"plate": [], "image": []}
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file, columns=["mask", "plate", "image"]).to_pylist():
            matte = read_picture(row["mask"])
            for name, values in found.items():
                picture = np.asarray(Image.open(io.BytesIO(row[name]["bytes"])).convert("RGB"))
                value = shadows.ground_darkening(picture, matte)
                values.append(math.nan if value is None else value)
    return np.array(found["plate"]), np.array(found["image"])


def measure_darkening() -> None:
    """Print the threshold that tells pictures from plates best in training, and how well it does on held-out scenes."""
    plates, images = darkenings(ROOT / "data/rendered/train")
    thresholds = np.arange(-0.1, 0.5, 0.01)
    scores = [((images >= value).mean() + (plates < value).mean()) / 2 for value in thresholds]
    best = thresholds[int(np.argmax(scores))]
    print(f"darkening: threshold {best:.2f}, training scenes told apart {max(scores):.2f}")
    plates, images = darkenings(ROOT / "data/rendered/heldout")
    for value in (best, 0.1):
        print(
            f"at {value:.2f}: pictures with a shadow found {(images >= value).mean():.2f}, plates without one "
            f"{(plates < value).mean():.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--measure", action="store_true", help="only measure what is there")
    given = parser.parse_args()
    if not given.measure:
        shots = [shot for shot in read_shots(ROOT / "data/rendered/train") if shot.is_matt]
        found = fit(*training_pixels(shots), given.epochs)
        rounded = [np.round(values.astype(np.float64), 3).tolist() for values in found]
        FILE.write_text(json.dumps({"hidden": HIDDEN, "weights": rounded}, separators=(",", ":")) + "\n")
        shadows.weights.cache_clear()
    measure(list(read_shots(ROOT / "data/rendered/heldout")))
    measure_darkening()


if __name__ == "__main__":
    main()

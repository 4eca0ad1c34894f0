"""Trains the network behind ``product_repeated`` on second products planted in rendered scenes.

    OMP_NUM_THREADS=1 python -m tools.fit_repeats

Writes ``src/packshot/imaging/repeat_network.json``. Every sample is made anew: a scene of ``tools.fit_checks``, with
its product once more, with another product, or with none. The places that the search finds are compared, and the truth
is whether one lies where the second product was put. The even half of the held-out renders shows the progress.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packshot.generate.composite import blend
from packshot.imaging.repeats import PAIR, PLANES, Pairs, Place, RepeatNetwork, pairs_of
from tools.fit_checks import Scenes, cluttered, open_scenes, recoloured, softened
from tools.planted import Case, duplicate, open_cases
from tools.small_network import Batch, arguments, begin, fit, folded
from tools.variety import Piece, composed, put, varied

WEIGHTS = Path("src/packshot/imaging/repeat_network.json")
PICTURES = 12  # of a step
TONED = 0.3  # share of the scenes whose ground has the product's colour
SHOWN = 0.4  # share of a second product that must be seen
SAME, OTHER = 0.5, 0.2  # overlap of boxes from which on a place is the second product's, and up to which it is not


def piece_at(scenes: Scenes, number: int) -> Piece:
    return Piece(scenes.cases[number], scenes.shadows[number])


def piece_of(scenes: Scenes, rng: np.random.Generator) -> Piece:
    """A true picture: a render, or its product in its own shape or another before its own or another plate."""
    number, second = (int(value) for value in rng.integers(len(scenes.cases), size=2))
    piece = piece_at(scenes, number)
    ground = rng.random()
    if ground < 0.3:  # another scene behind the product and its shadow
        plate_HW3 = scenes.cases[int(rng.integers(len(scenes.cases)))].plate_HW3
        piece = replace(piece, case=replace(piece.case, plate_HW3=plate_HW3))
    if ground < 0.65:
        piece = varied(piece, piece if rng.random() < 0.5 else piece_at(scenes, second), rng)
    if rng.random() < 0.35:
        piece = replace(piece, case=cluttered(piece.case, rng))
    return piece


def any_blotches(rng: np.random.Generator) -> np.ndarray:
    """Blotches of several sizes, for :func:`softened`."""
    grid = int(rng.choice((6, 10, 16, 28)))
    return rng.normal(0, rng.uniform(2, 10), (grid, grid, 3))


def overlap(first: Place, second: Place) -> float:
    """Intersection of two boxes over their union."""
    across = min(first.left + first.width, second.left + second.width) - max(first.left, second.left)
    down = min(first.top + first.height, second.top + second.height) - max(first.top, second.top)
    common = max(0, across) * max(0, down)
    return common / (first.width * first.height + second.width * second.height - common)


def with_second(piece: Piece, second: Piece, rng: np.random.Generator) -> tuple[Case, Place] | None:
    """The picture with a product behind its own, 45 to 100 % as large, and where; None if no place was free for it."""
    matte_HW = piece.case.canvas.matte_HW
    height, width = matte_HW.shape
    fits = min(piece.size[0] / second.size[0], piece.size[1] / second.size[1])
    for _ in range(20):
        across = float(rng.uniform(0.45, 1.0)) * fits
        down = across * float(np.exp(rng.normal(0, 0.04)))
        foot = float(rng.uniform(0, width)), float(rng.uniform(0.35 * height, 1.1 * height))
        canvas = put(second, (across, down), foot, matte_HW.shape).case.canvas
        whole = across * down * float(second.case.canvas.matte_HW.sum())
        free_HW = matte_HW == 0
        if canvas.matte_HW[free_HW].sum() < SHOWN * whole:
            continue
        light = float(rng.uniform(0.75, 1.2))
        colours = np.clip(canvas.foreground_HW3 * light, 0, 255).astype(np.uint8)
        behind = blend(colours, canvas.matte_HW, piece.case.picture_HW3)
        size = across * second.size[0], down * second.size[1]
        box = Place(1.0, round(foot[0] - size[0] / 2), round(foot[1] - size[1]), round(size[0]), round(size[1]))
        return replace(piece.case, picture_HW3=piece.case.over(behind)), box
    return None


def toned(piece: Piece) -> Piece:
    """The product before its plate in the product's own mean colour, where plain places are mistaken for it."""
    canvas, plate_HW3 = piece.case.canvas, piece.case.plate_HW3
    shift = canvas.foreground_HW3[canvas.core_HW].mean(axis=0) - plate_HW3.mean(axis=(0, 1))
    shown_HW3 = np.clip(plate_HW3 + shift, 0, 255).astype(np.uint8)
    return composed(replace(piece, case=replace(piece.case, plate_HW3=shown_HW3)))


def truths(pairs: Pairs, second: Place | None) -> np.ndarray:
    """For each place 1 if it is the second product's, 0 if it is not, -1 if it is half of it; float32."""
    values = np.zeros(len(pairs.places), np.float32)
    if second is None:
        return values
    for index, place in enumerate(pairs.places):
        common = overlap(place, second)
        values[index] = 1 if common > SAME else 0 if common < OTHER else -1
    return values


def draw(scenes: Scenes, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Planes and truths of a fresh picture's places: half of the pictures have a second product, a quarter another."""
    piece = piece_of(scenes, rng)
    if rng.random() < TONED:
        piece = toned(piece)
    kind = rng.random()
    planted: tuple[Case, Place] | None = None
    if kind < 0.5:
        planted = with_second(piece, piece, rng)
    elif kind < 0.75:
        planted = with_second(piece, piece_at(scenes, int(rng.integers(len(scenes.cases)))), rng)
    case = piece.case if planted is None else planted[0]
    shown_HW3 = softened(case, rng, any_blotches) if rng.random() < 0.3 else case.picture_HW3
    pairs = pairs_of(recoloured(shown_HW3, rng), case.canvas.matte_HW)
    if pairs is None:
        return np.zeros((0, PLANES, PAIR, PAIR), np.float32), np.zeros(0, np.float32)
    planes = pairs.planes[..., :: 1 if rng.random() < 0.5 else -1]
    return planes, truths(pairs, planted[1] if planted is not None and kind < 0.5 else None)


def batch_of(scenes: Scenes, rng: np.random.Generator) -> Batch:
    drawn = [draw(scenes, rng) for _ in range(PICTURES)]
    planes, truth = (torch.from_numpy(np.concatenate(column)) for column in zip(*drawn, strict=True))
    return planes, truth


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    planes, truth = batch
    known = truth >= 0
    return F.binary_cross_entropy_with_logits(network(planes[known]), truth[known])


def held_out(renders: str) -> dict[str, list[Pairs | None]]:
    """Places of the even half: true pictures, and the same with a second product."""
    found: dict[str, list[Pairs | None]] = {"true": [], "duplicate": []}
    for number, case in open_cases(renders):
        if number % 2:
            continue
        second = duplicate(case, np.random.default_rng([number, 1]))
        for name, shown in (("true", case), ("duplicate", second)):
            found[name].append(pairs_of(shown.picture_HW3, shown.canvas.matte_HW))
    return found


@torch.inference_mode()
def scores(network: nn.Module, several: list[Pairs | None]) -> np.ndarray:
    """The highest logit of each picture; the lowest possible one where nothing is compared."""
    highest = [-99.0 if pairs is None else float(network(torch.from_numpy(pairs.planes)).max()) for pairs in several]
    return np.array(highest)


def progress(network: nn.Module, looks: dict[str, list[Pairs | None]]) -> str:
    """Shares of second products found at 1, 2 and 5 % of false alarms."""
    plain = folded(network)
    true, second = (scores(plain, looks[name]) for name in ("true", "duplicate"))
    shares = [f"{(second > np.quantile(true, 1 - alarms)).mean():.0%}" for alarms in (0.01, 0.02, 0.05)]
    return "/".join(shares)


def main() -> None:
    args = arguments(__doc__, WEIGHTS, steps=2000, step=f"{PICTURES} pictures").parse_args()
    scenes = open_scenes(args.renders)
    looks = held_out(args.held_out)
    training = begin(lambda: RepeatNetwork(norm=True), loss_of, args.seed, args.state)
    fit(training, lambda rng: batch_of(scenes, rng), lambda network: progress(network, looks), args)


if __name__ == "__main__":
    main()

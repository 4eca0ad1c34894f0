"""Trains the network behind ``product_extended`` and ``product_floats`` on failures planted in rendered scenes.

    OMP_NUM_THREADS=1 python -m tools.fit_checks

Writes ``src/packshot/imaging/check_network.json``. Every sample is made anew: a scene, or its product with its shadow
before another scene's plate; true or with a planted failure; then framed, mirrored and recoloured by chance. The
even half of the held-out renders shows the progress; the odd one is measured by benchmarks/verifier.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packshot.dataset.rows import load_rows
from packshot.generate.composite import blend
from packshot.imaging.check_network import LOOK, CheckNetwork, Look, close_look, cut, planes_of, square_around
from tools.planted import Case, enlarged, extended, floating, handle, lump, open_cases, prolonged, swollen
from tools.small_network import Batch, arguments, begin, fit, folded
from tools.variety import shaded

WEIGHTS = Path("src/packshot/imaging/check_network.json")
BATCH = 32
VISIBLE = 8  # steps of 255 by which planted pixels differ
DARKEST = -1.5  # logarithm of a shadow
OTHER = 60  # steps of 255 from the product's mean colour, from which on a thing is not taken for a part of it


@dataclass(frozen=True)
class Sample:
    """planes: float32 (PLANES, LOOK, LOOK). grown_HW, shadow_HW: float32 at half that size. extends, hangs: 0 or 1."""

    planes: np.ndarray
    grown_HW: np.ndarray
    shadow_HW: np.ndarray
    extends: float
    hangs: float


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes, and what each product does to the light around it, uint8 (H, W, 3)."""

    cases: list[Case]
    shadows: list[np.ndarray]


def open_scenes(renders: str) -> Scenes:
    rows = load_rows("renders", renders)
    shadows = [np.asarray(rows.read(number, ("shadow",))["shadow"].convert("RGB")) for number in range(len(rows))]
    return Scenes([case for _, case in open_cases(renders)], shadows)


def recoloured(picture_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture in another light, with noise, blur or a JPEG's marks by chance."""
    curve = np.linspace(0, 1, 256) ** np.exp(rng.normal(0, 0.2))
    gains = np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.06, 3))
    pixels = cv2.LUT(picture_HW3, np.asarray(curve[:, None] * gains, np.float32)[None])
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    pixels = grey + (pixels - grey) * float(rng.uniform(0.6, 1.3))
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), float(rng.uniform(0.4, 0.9)))
    if rng.random() < 0.4:
        pixels = pixels + rng.normal(0, rng.uniform(0.002, 0.015), pixels.shape).astype(np.float32)
    shown = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.4:
        _, data = cv2.imencode(".jpg", shown, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))])
        shown = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return shown


def cluttered(case: Case, rng: np.random.Generator) -> Case:
    """Up to four things of other colours around the product and behind it, some of them soft: none is part of it."""
    own = case.canvas.rgb_HW3[case.canvas.core_HW].mean(axis=0)
    left, top, right, bottom = case.box
    size = max(right - left, bottom - top)
    behind = case.picture_HW3
    for _ in range(int(rng.integers(1, 5))):
        layer = np.zeros_like(case.canvas.matte_HW)
        middle = int(rng.uniform(left - 0.3 * size, right + 0.3 * size)), int(rng.uniform(top, bottom + 0.3 * size))
        axes = int(rng.uniform(0.06, 0.35) * size) + 1, int(rng.uniform(0.06, 0.35) * size) + 1
        if rng.random() < 0.5:
            cv2.ellipse(layer, middle, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1)
        else:
            corners = (middle[0] - axes[0], middle[1] - axes[1]), (middle[0] + axes[0], middle[1] + axes[1])
            cv2.rectangle(layer, *corners, 255, -1)
        layer = cv2.GaussianBlur(layer, (0, 0), float(rng.uniform(0.4, 4)))
        row, column = int(rng.integers(layer.shape[0])), int(rng.integers(layer.shape[1]))
        scene_colour = case.plate_HW3[row, column].astype(np.float64)
        colour = scene_colour * rng.uniform(0.5, 1.4) if rng.random() < 0.6 else rng.uniform(0, 255, 3)
        if np.linalg.norm(colour - own) < OTHER:
            continue
        shade = np.linspace(1, float(rng.uniform(0.5, 1)), layer.shape[1])[None, :, None]
        thing = np.broadcast_to(np.clip(colour * shade, 0, 255), behind.shape)
        behind = blend(np.rint(thing).astype(np.uint8), layer, behind)
    return replace(case, picture_HW3=case.over(behind))


Blotches = Callable[[np.random.Generator], np.ndarray]


def small_blotches(rng: np.random.Generator) -> np.ndarray:
    """Steps of 255 that are added to the colours, on a coarse grid: (rows, columns, 3)."""
    return rng.normal(0, rng.uniform(2, 8), (16, 16, 3))


def softened(case: Case, rng: np.random.Generator, blotches: Blotches = small_blotches) -> np.ndarray:
    """The picture as a decoder might give it, blurred and blotchy, with the product's own pixels over it."""
    soft = cv2.GaussianBlur(case.picture_HW3, (0, 0), float(np.exp(rng.uniform(-0.7, 1.1))))
    height, width = case.canvas.matte_HW.shape
    added = cv2.resize(blotches(rng).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    drawn = np.clip(soft + added, 0, 255)
    return case.over(np.rint(drawn).astype(np.uint8))


def framed(box: tuple[int, int, int, int], shape: tuple[int, int], rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a part of the picture that has the product: its place in the frame must tell nothing."""
    left, top, right, bottom = box
    height, width = shape
    rows = slice(int(rng.uniform(0, top)), int(rng.uniform(bottom, height)) + 1)
    columns = slice(int(rng.uniform(0, left)), int(rng.uniform(right, width)) + 1)
    if rng.random() < 0.5:
        return slice(0, height), slice(0, width)
    return rows, columns


def sample_of(
    case: Case, before_HW3: np.ndarray, shadow_HW3: np.ndarray, hangs: bool, rng: np.random.Generator
) -> Sample:
    """A sample of a picture. before_HW3: it without what was planted. shadow_HW3: the layer that the picture shows."""
    matte_HW = case.canvas.matte_HW
    red, green, blue = cv2.split(cv2.absdiff(case.picture_HW3, before_HW3))
    planted_HW = np.maximum(np.maximum(red, green), blue) > VISIBLE
    grown_HW = planted_HW & (matte_HW < 128) & (not hangs)
    shown_HW3 = softened(case, rng) if rng.random() < 0.35 else case.picture_HW3
    window = framed(case.box, matte_HW.shape, rng)
    step = 1 if rng.random() < 0.5 else -1
    parts = []
    for array in (shown_HW3, matte_HW, grown_HW.astype(np.uint8) * 255, shadow_HW3):
        parts.append(np.ascontiguousarray(array[window][:, ::step]))
    picture, matte, grown, shadow = parts
    look = close_look(recoloured(picture, rng), matte)
    square = square_around(matte)
    assert look is not None
    assert square is not None  # the frame is drawn around the product
    half = LOOK // 2
    goes_on = cut(grown, square, cv2.BORDER_CONSTANT, half).astype(np.float32) / 255
    light = cv2.cvtColor(cut(shadow, square, cv2.BORDER_REPLICATE, half), cv2.COLOR_RGB2GRAY)
    darkness = np.maximum(np.log(light.astype(np.float32) / 255 + 1e-3), DARKEST)
    return Sample(planes_of(look), goes_on, darkness, float(grown_HW.sum() > 12), float(hangs))


def hung(case: Case, rng: np.random.Generator) -> Case:
    """The product without a shadow: lifted, among other things by chance."""
    hanging = floating(case, rng)
    return cluttered(hanging, rng) if rng.random() < 0.35 else hanging


WAYS = (enlarged, handle, prolonged, swollen, lump)
WAY_SHARES = (0.12, 0.38, 0.2, 0.15, 0.15)  # thin rings are the hardest to learn


def draw(scenes: Scenes, rng: np.random.Generator) -> Sample:
    """A fresh sample: 35 % grown, 30 % hanging, the others true."""
    number = int(rng.integers(len(scenes.cases)))
    case = scenes.cases[number]
    shadow = scenes.shadows[number]
    ground = rng.random()
    if ground < 0.3:  # another scene behind the product and its shadow
        case = replace(case, plate_HW3=scenes.cases[int(rng.integers(len(scenes.cases)))].plate_HW3)
    if ground < 0.6:  # composed, as planted failures are
        case = replace(case, picture_HW3=case.over(shaded(case.plate_HW3, shadow)))
    if rng.random() < 0.35:
        case = cluttered(case, rng)
    kind = rng.random()
    if kind < 0.35:
        planted = WAYS[int(rng.choice(len(WAYS), p=WAY_SHARES))](case, rng)
        return sample_of(planted, case.picture_HW3, shadow, False, rng)
    if kind < 0.65:
        hanging = hung(case, rng)
        return sample_of(hanging, hanging.picture_HW3, np.full_like(shadow, 255), True, rng)
    return sample_of(case, case.picture_HW3, shadow, False, rng)


def batch_of(samples: list[Sample]) -> Batch:
    columns = zip(*(vars(sample).values() for sample in samples), strict=True)
    planes, grown, shadow, extends, hangs = (torch.from_numpy(np.array(column, np.float32)) for column in columns)
    return planes, grown, shadow, extends, hangs


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    planes, grown, shadow, extends, hangs = batch
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(planes.to(memory_format=torch.channels_last))
    pixels, grows, floats = (output.float() for output in outputs)
    matte, valid = planes[:, 3], planes[:, 4]
    seen = F.avg_pool2d(valid * (matte < 0.5), 2)
    by_pixel = F.binary_cross_entropy_with_logits(pixels[:, 0], grown, pos_weight=torch.tensor(3.0), reduction="none")
    by_light = F.smooth_l1_loss(pixels[:, 1], shadow, beta=0.1, reduction="none")
    dense = ((4 * by_pixel + 2 * by_light) * seen).sum() / seen.sum()
    whole = F.binary_cross_entropy_with_logits(grows, extends) + F.binary_cross_entropy_with_logits(floats, hangs)
    return dense + whole


def held_out(renders: str) -> dict[str, list[Look]]:
    """Looks at the even half: true pictures, grown and hanging ones."""
    found: dict[str, list[Look]] = {"true": [], "extension": [], "floating": []}
    for number, case in open_cases(renders):
        if number % 2:
            continue
        rng = np.random.default_rng([number, 1])
        for name, shown in (("true", case), ("extension", extended(case, rng)), ("floating", floating(case, rng))):
            look = close_look(shown.picture_HW3, shown.canvas.matte_HW)
            assert look is not None
            found[name].append(look)
    return found


@torch.inference_mode()
def scores(network: nn.Module, looks: list[Look]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of growth and of hanging."""
    grown: list[float] = []
    hangs: list[float] = []
    for look in looks:
        _, grows, floats = network(torch.from_numpy(planes_of(look))[None])
        grown.append(float(grows))
        hangs.append(float(floats))
    return np.array(grown), np.array(hangs)


def progress(network: nn.Module, looks: dict[str, list[Look]]) -> str:
    """Shares of planted failures found at 1, 2 and 5 % of false alarms."""
    plain = folded(network)
    of = {name: scores(plain, several) for name, several in looks.items()}
    words = []
    for index, kind in enumerate(("extension", "floating")):
        true = of["true"][index]
        shares = []
        for alarms in (0.01, 0.02, 0.05):
            limit = np.quantile(true, 1 - alarms)
            shares.append(f"{(of[kind][index] > limit).mean():.0%}")
        words.append(f"{kind} {'/'.join(shares)}")
    return ", ".join(words)


def main() -> None:
    args = arguments(__doc__, WEIGHTS, steps=9000, step=f"{BATCH} samples").parse_args()
    scenes = open_scenes(args.renders)
    looks = held_out(args.held_out)

    def draw_batch(rng: np.random.Generator) -> Batch:
        return batch_of([draw(scenes, rng) for _ in range(BATCH)])

    training = begin(lambda: CheckNetwork(norm=True), loss_of, args.seed, args.state)
    fit(training, draw_batch, lambda network: progress(network, looks), args)


if __name__ == "__main__":
    main()

"""Trains the network that judges masks, on masks found in composed photographs.

    OMP_NUM_THREADS=1 python -m tools.fit_mask_judge --cutouts FOLDER

Writes ``src/packshot/imaging/mask_judge.json``. FOLDER has pictures with alpha, such as the assets of the npm package
``@lobehub/fluent-emoji-3d`` (MIT). Besides them products are drawn, or taken from rendered scenes. Each is composed
before a drawn ground, its mask is found as a user would find it, and further masks are made from the truth or from
other ways, most of them wrong. What was found is kept in ``--findings`` and used again. Every fifth cut-out is held
out: the curve that is printed is of these.
"""

from __future__ import annotations

import argparse
import math
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packshot.dataset.rows import Rows, load_rows
from packshot.imaging.mask_doubt import Finding, Measured, iou, measure_signs
from packshot.imaging.mask_edge import narrowed, widened
from packshot.imaging.mask_judge import LOOK, RIGHT, MaskJudge, MaskLook, cut, look_at, planes_of, square_of
from packshot.imaging.masks import seek
from tools import composites, small_network
from tools.composites import GROUNDS, Cutout, Photograph, Rng, Setting
from tools.small_network import Batch, begin, folded

WEIGHTS = Path("src/packshot/imaging/mask_judge.json")
FINDINGS_PER_FILE = 40
HELD_OUT = 5  # one cut-out in so many
SOURCES = {"cutouts": 0.52, "packages": 0.26, "tools": 0.14, "renders": 0.08}
DRAWN: dict[str, Callable[[Rng], Cutout]] = {
    "packages": composites.drawn_package,
    "tools": composites.drawn_tool,
}
GROUND_SHARES = {
    "white": 0.12, "grey": 0.08, "black": 0.05, "sweep": 0.09, "wall": 0.22, "wood": 0.1, "texture": 0.13,
    "clutter": 0.13, "plate": 0.08,
}  # fmt: skip
VARIANTS = 3  # further masks of a picture
SHAPES = ((304, 304), (304, 250), (250, 304), (400, 400))  # px; larger pictures are judged at 400


@dataclass(frozen=True)
class Judged:
    """A mask and the truth. truth_HW: uint8, LOOK px. found: whether it is what a user gets, not a variant."""

    look: MaskLook
    truth_HW: np.ndarray
    overlap: float
    found: bool


@dataclass(frozen=True)
class Studied:
    """The masks of one photograph, the found one first. evidence, signs: of that; signs only where it is held out."""

    held_out: bool
    source: str
    ground: str
    evidence: float
    signs: dict[str, Measured]
    judged: list[Judged]


# ---- photographs ----


@dataclass(frozen=True)
class Material:
    """files: pictures with alpha. renders: a rendered set."""

    files: list[Path]
    renders: Rows


def is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def some_product(material: Material, rng: Rng) -> tuple[str, Cutout, bool]:
    """Where it comes from, the product, and whether it is held out."""
    source = str(rng.choice(list(SOURCES), p=list(SOURCES.values())))
    if source in DRAWN:
        return source, DRAWN[source](rng), bool(rng.random() < 1 / HELD_OUT)
    if source == "cutouts":
        cutout = composites.read_cutout(material.files[int(rng.integers(len(material.files)))])
        return source, cutout, is_held_out(cutout.name)
    row = material.renders.read(int(rng.integers(len(material.renders))), ("cutout",))
    name = str(row["product_id"])
    return source, composites.crop(name, np.asarray(row["cutout"].convert("RGBA"))), is_held_out(name)


def some_ground(material: Material, shape: tuple[int, int], rng: Rng) -> tuple[str, np.ndarray]:
    name = str(rng.choice(list(GROUND_SHARES), p=list(GROUND_SHARES.values())))
    if name != "plate":
        return name, GROUNDS[name](rng, shape)
    plate = material.renders.read(int(rng.integers(len(material.renders))), ("plate",))["plate"].convert("RGB")
    return name, cv2.resize(np.asarray(plate), shape[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)


def some_photograph(material: Material, rng: Rng) -> tuple[str, Photograph, bool]:
    """Where the product comes from, the photograph, and whether it is held out."""
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    ground, ground_HW3 = some_ground(material, shape, rng)
    source, cutout, held_out = some_product(material, rng)
    if rng.random() < 0.3:
        cutout = composites.in_colour(cutout, composites.some_colour(rng), float(rng.uniform(0.2, 0.9)))
    elif rng.random() < 0.25:
        row = int(rng.uniform(0.2, 0.95) * shape[0])
        cutout = composites.in_colour(cutout, ground_HW3[row].mean(axis=0), float(rng.uniform(0.6, 1)))
    if rng.random() < 0.35:
        cutout = composites.of_material(cutout, rng)
    setting: Setting = composites.some_setting(rng)
    fill = float(rng.uniform(0.4, 0.85)) if rng.random() < 0.92 else 0.95
    return source, composites.compose(cutout, ground_HW3, ground, setting, rng, fill), held_out


# ---- masks of a photograph ----


def one_colour(rgb_HW3: np.ndarray, row: int, column: int, tolerance: float) -> np.ndarray:
    """The region around a pixel whose colour changes little from pixel to pixel, bool (H, W)."""
    region = np.zeros((rgb_HW3.shape[0] + 2, rgb_HW3.shape[1] + 2), np.uint8)
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | (255 << 8)
    cv2.floodFill(rgb_HW3.copy(), region, (column, row), (0, 0, 0), (tolerance,) * 3, (tolerance,) * 3, flags)
    return region[1:-1, 1:-1] > 0


def some_pixel(mask_HW: np.ndarray, rng: Rng) -> tuple[int, int]:
    rows, columns = np.nonzero(mask_HW)
    index = int(rng.integers(len(rows)))
    return int(rows[index]), int(columns[index])


def cut_off(rgb_HW3: np.ndarray, mask_HW: np.ndarray, rng: Rng) -> np.ndarray:
    """The mask without what is below a row, or above it, as where a table begins or a cap ends."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    cut_HW = mask_HW.copy()
    if rng.random() < 0.6:
        cut_HW[int(np.quantile(rows, rng.uniform(0.3, 0.95))) :] = False
    else:
        cut_HW[: int(np.quantile(rows, rng.uniform(0.05, 0.6)))] = False
    return cut_HW


def without_colour(rgb_HW3: np.ndarray, mask_HW: np.ndarray, rng: Rng) -> np.ndarray:
    """The mask without a region of one colour."""
    inner_HW = narrowed(mask_HW, 3)
    pixel = some_pixel(inner_HW if inner_HW.any() else mask_HW, rng)
    return mask_HW & ~one_colour(rgb_HW3, *pixel, float(rng.uniform(1, 8)))


def with_ground(rgb_HW3: np.ndarray, mask_HW: np.ndarray, rng: Rng) -> np.ndarray:
    """The mask with a region of the ground next to it, more often below, where shadows and mirror images are."""
    reach = int(rng.uniform(0.03, 0.35) * max(mask_HW.shape))
    near_HW = widened(mask_HW, reach) & ~mask_HW
    rows = np.flatnonzero(mask_HW.any(axis=1))
    if rng.random() < 0.6:
        near_HW[: int(np.quantile(rows, 0.8))] = False
    if not near_HW.any():
        return mask_HW
    start_HW = near_HW & widened(mask_HW, 6)
    pixel = some_pixel(start_HW if start_HW.any() else near_HW, rng)
    return mask_HW | (one_colour(rgb_HW3, *pixel, float(rng.uniform(1, 8))) & near_HW)


def shifted_edge(rgb_HW3: np.ndarray, mask_HW: np.ndarray, rng: Rng) -> np.ndarray:
    """The mask wider or narrower by some pixels."""
    steps = int(rng.integers(1, 9))
    changed_HW = widened(mask_HW, steps) if rng.random() < 0.5 else narrowed(mask_HW, steps)
    return changed_HW if changed_HW.any() else mask_HW


def as_it_is(rgb_HW3: np.ndarray, mask_HW: np.ndarray, rng: Rng) -> np.ndarray:
    return mask_HW


CHANGES = (cut_off, without_colour, with_ground, shifted_edge, as_it_is)
CHANGE_SHARES = (0.25, 0.25, 0.3, 0.08, 0.12)


def variants(found: Finding, truth_HW: np.ndarray, rng: Rng) -> list[np.ndarray]:
    """Other masks of the same picture: by other ways, and made from the truth or from the found one."""
    assert found.network_HW is not None
    soft_HW3 = cv2.GaussianBlur(found.rgb_HWC, (0, 0), 1.5)
    masks = []
    ways = (found.salient_HW, found.network_HW >= 0.5)
    other = ways[int(rng.integers(2))]
    if rng.random() < 0.5 and iou(other, found.mask_HW) < 0.97:
        masks.append(other)
    while len(masks) < VARIANTS:
        start_HW = truth_HW if rng.random() < 0.6 else found.mask_HW
        change = CHANGES[int(rng.choice(len(CHANGES), p=CHANGE_SHARES))]
        masks.append(change(soft_HW3, start_HW, rng))
    return [mask_HW for mask_HW in masks if mask_HW.any()]


def study(source: str, photograph: Photograph, held_out: bool, rng: Rng) -> Studied | None:
    """The found mask of a photograph and its variants; None where nothing is found."""
    sought = seek(photograph.rgb_HW3, "mini")
    found = sought.finding
    if found is None:
        return None
    truth_HW = cv2.resize(photograph.alpha_HW, found.mask_HW.shape[::-1], interpolation=cv2.INTER_AREA) >= 0.5
    square = square_of(found)
    seen_HW = cut(truth_HW.astype(np.uint8) * 255, square, cv2.BORDER_CONSTANT, LOOK)
    judged = []
    for mask_HW in [found.mask_HW, *variants(found, truth_HW, rng)]:
        look = look_at(replace(found, mask_HW=mask_HW), square)
        if look is not None:
            judged.append(Judged(look, seen_HW, iou(mask_HW, truth_HW), mask_HW is found.mask_HW))
    signs = measure_signs(found) if held_out else {}
    return Studied(held_out, source, photograph.ground, sought.evidence, signs, judged)


def find_all(material: Material, folder: Path, count: int, seed: int) -> None:
    """Compose photographs and keep their masks in files, those that are there already left out."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for number in range(math.ceil(count / FINDINGS_PER_FILE)):
        file = folder / f"{seed}-{number:04d}.pkl"
        if file.exists():
            continue
        studied = []
        for index in range(FINDINGS_PER_FILE):
            rng = np.random.default_rng([seed, number, index])
            one = study(*some_photograph(material, rng), rng)
            if one is not None:
                studied.append(one)
        half = file.with_suffix(".part")
        half.write_bytes(pickle.dumps(studied))
        half.rename(file)


# ---- training ----

BATCH = 32
DECAY = 0.05  # of the weights; there are fewer masks than scenes
FOUND_SHARE = 0.45  # of a batch, masks as users get them
BLURRED = 0.06  # of the IoU around RIGHT, in which a mask is neither right nor wrong
PIXELS_MATTER = 3.0  # the loss of wrong pixels by that of the whole mask
LEAST_EVIDENCE = 0.5  # ``matte.min_confidence``


def recoloured(look: MaskLook, rng: Rng) -> MaskLook:
    """The look in other colours, now and then without any."""
    curve = np.linspace(0, 1, 256) ** np.exp(rng.normal(0, 0.25))
    gains = np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.08, 3))
    table = np.clip(curve[:, None] * gains * 255, 0, 255).astype(np.uint8)
    rgb_HW3 = cv2.LUT(look.rgb_HW3[..., rng.permutation(3)], table[None])
    if rng.random() < 0.08:
        rgb_HW3 = cv2.cvtColor(cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return replace(look, rgb_HW3=rgb_HW3)


def moved(judged: Judged, rng: Rng) -> Judged:
    """The look nearer or farther, moved a little and mirrored by chance; beyond its frame lies nothing."""
    zoom = float(np.exp(rng.uniform(-0.25, 0.12)))
    across = -zoom if rng.random() < 0.5 else zoom
    middle = (LOOK - 1) / 2
    shift = rng.uniform(-0.06, 0.06, 2) * LOOK
    matrix = np.array(
        [[across, 0, middle - across * middle + shift[0]], [0, zoom, middle - zoom * middle + shift[1]]], np.float32
    )

    def warped(array: np.ndarray, border: int = cv2.BORDER_CONSTANT) -> np.ndarray:
        return cv2.warpAffine(array, matrix, (LOOK, LOOK), flags=cv2.INTER_LINEAR, borderMode=border)

    planes = {name: warped(value) for name, value in vars(judged.look).items() if name.endswith("_HW")}
    rgb_HW3 = warped(judged.look.rgb_HW3, cv2.BORDER_REPLICATE)
    return replace(judged, look=replace(judged.look, rgb_HW3=rgb_HW3, **planes), truth_HW=warped(judged.truth_HW))


def target_of(overlap: float) -> float:
    """1 for a right mask and 0 for a wrong one, between them near the limit."""
    return float(np.clip((overlap - RIGHT) / BLURRED + 0.5, 0, 1))


def batch_of(pools: tuple[list[Judged], list[Judged]], rng: Rng) -> Batch:
    """Planes, truth (B, LOOK / 2, LOOK / 2) and whether the mask is right (B,). pools: found masks, and variants."""
    planes, truths, rights = [], [], []
    for _ in range(BATCH):
        pool = pools[0] if rng.random() < FOUND_SHARE else pools[1]
        judged = moved(pool[int(rng.integers(len(pool)))], rng)
        planes.append(planes_of(recoloured(judged.look, rng)))
        truths.append(judged.truth_HW.astype(np.float32) / 255)
        rights.append(target_of(judged.overlap))
    truth = F.avg_pool2d(torch.from_numpy(np.array(truths)), 2)
    return torch.from_numpy(np.array(planes)), truth, torch.tensor(rights)


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    planes, truth, right = batch
    with torch.autocast("cpu", torch.bfloat16):
        pixels, whole = network(planes.to(memory_format=torch.channels_last))
    mask = F.avg_pool2d(planes[:, 3], 2)
    valid = F.avg_pool2d(planes[:, 4], 2)
    wrong = (truth - mask).abs()
    by_pixel = F.binary_cross_entropy_with_logits(pixels.float(), wrong, reduction="none")
    by_mask = F.binary_cross_entropy_with_logits(whole.float(), right)
    return PIXELS_MATTER * (by_pixel * valid).sum() / valid.sum() + by_mask


@torch.inference_mode()
def probabilities(network: nn.Module, judged: list[Judged]) -> np.ndarray:
    found = []
    for one in judged:
        planes = torch.from_numpy(planes_of(one.look))
        found.append(float(network(torch.stack([planes, planes.flip(-1)]))[1].mean().sigmoid()))
    return np.array(found)


def passes_besides(studied: Studied) -> bool:
    """Whether nothing else speaks against the found mask."""
    others = (sign for name, sign in studied.signs.items() if name != "probability_right")
    return studied.evidence >= LEAST_EVIDENCE and all(sign.passed for sign in others)


def curve(network: nn.Module, held_out: list[Studied]) -> str:
    """Share of the right masks that are accepted, where so many of the accepted are right, and the limit for it."""
    likely = probabilities(network, [studied.judged[0] for studied in held_out])
    right = np.array([studied.judged[0].overlap >= RIGHT for studied in held_out])
    passed = np.array([passes_besides(studied) for studied in held_out])
    words = []
    for wanted in (0.96, 0.97, 0.98, 0.99):
        best = (0.0, 1.0)
        for limit in np.arange(0.3, 0.99, 0.01):
            accepted = passed & (likely >= limit)
            if accepted.any() and right[accepted].mean() >= wanted:
                best = max(best, (float((accepted & right).sum() / right.sum()), -float(limit)))
        words.append(f"{wanted:.0%} right: {best[0]:.1%} from {-best[1]:.2f}")
    return ", ".join(words)


def fit(studied: list[Studied], args: argparse.Namespace) -> None:
    """Train; weights are written, and the curve of the held-out photographs printed. args: see :func:`main`."""
    learnt = [judged for one in studied if not one.held_out for judged in one.judged]
    pools = [judged for judged in learnt if judged.found], [judged for judged in learnt if not judged.found]
    held_out = [one for one in studied if one.held_out]
    print(f"{len(pools[0])} found masks, {len(pools[1])} variants, {len(held_out)} held out", flush=True)
    training = begin(lambda: MaskJudge(norm=True), loss_of, args.seed, args.state)
    for group in training.optimizer.param_groups:
        group["weight_decay"] = DECAY
    small_network.fit(
        training, lambda rng: batch_of(pools, rng), lambda network: curve(folded(network), held_out), args
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutouts", type=Path, required=True, help="folder of pictures with alpha")
    parser.add_argument("--renders", default="data/rendered/train")
    parser.add_argument("--findings", type=Path, default=Path("outputs/findings"), help="folder that keeps found masks")
    parser.add_argument("--photographs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2400, help=f"of {BATCH} masks each")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--state", type=Path, help="file that keeps the training; it is continued if it is there")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    files = sorted(file for file in args.cutouts.iterdir() if file.suffix in (".png", ".webp"))
    find_all(Material(files, load_rows("renders", args.renders)), args.findings, args.photographs, args.seed)
    studied: list[Studied] = []
    for file in sorted(args.findings.glob("*.pkl")):
        studied += pickle.loads(file.read_bytes())
    fit(studied, args)


if __name__ == "__main__":
    main()

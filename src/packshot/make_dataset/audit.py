"""Measure a rendered set: how often it shows what, how similar its pictures are, how exact its layers.

    python -m packshot.make_dataset.audit data/rendered/train data/rendered/heldout --out docs/rendered.md

writes Markdown. The first folder is the training set; later ones are compared with it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from packshot.dataset.near_duplicates import find_duplicates, perceptual_hash
from packshot.dataset.rows import Rows, load_rows
from packshot.errors import PackshotError
from packshot.imaging.color import to_lab
from packshot.lists import column, in_words, select
from packshot.runs.markdown import markdown_table
from packshot.runs.progress import progress
from packshot.scene import SLOTS, Scene
from packshot.scene.scene import COUNTED
from packshot.scene.vocabulary import split_position, without_position

THUMBNAIL = 16  # px: two pictures are similar when their layout and colours are
NEAR_DUPLICATE = 4  # Hamming distance of two perceptual hashes, as build_data's default


def first_phrase(scene: Scene, slot: str) -> str:
    """The first value of a slot without its position, or "nothing"."""
    texts = scene.slots()[slot]
    return without_position(texts[0]) if texts else "nothing"


@dataclass(frozen=True)
class Measures:
    """Figures of every row. lab_NF: thumbnails in CIELAB, flattened; truth: name -> one value per row."""

    lab_NF: np.ndarray
    hashes: list[int]
    truth: dict[str, np.ndarray]


def mask_iou(mask_HW: np.ndarray, cutout_HWC: np.ndarray) -> float:
    """Intersection over union of the mask and the cut-out's alpha, both cut at one half."""
    a, b = mask_HW > 127, cutout_HWC[..., 3] > 127
    return float((a & b).sum() / max((a | b).sum(), 1))


def recomposed(plate_HWC: np.ndarray, shadow_HW: np.ndarray, cutout_HWC: np.ndarray) -> np.ndarray:
    """The photograph from its layers: plate x shadow under the cut-out, uint8 (height, width, 3)."""
    alpha = cutout_HWC[..., 3:] / 255.0
    below = plate_HWC * (shadow_HW[..., None] / 255.0)
    return np.rint(below * (1 - alpha) + cutout_HWC[..., :3] * alpha).astype(np.uint8)


def _delta_e(a_HWC: np.ndarray, b_HWC: np.ndarray) -> np.ndarray:
    return np.linalg.norm(to_lab(a_HWC) - to_lab(b_HWC), axis=-1)


def measure(rows: Rows) -> Measures:
    """Read every row once."""
    thumbnails, hashes, truth = [], [], []
    with progress(f"measure {rows.path}", len(rows)) as advance:
        for row in rows:
            image: Image.Image = row["image"]
            small = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
            thumbnails.append(to_lab(np.asarray(small)).ravel())
            hashes.append(perceptual_hash(image))
            truth.append(_truth(row))
            advance()
    columns = {name: np.array(column(truth, name)) for name in truth[0]}
    return Measures(np.stack(thumbnails), hashes, columns)


def _truth(row: dict) -> dict[str, float]:
    pixels, plate, mask = map(np.asarray, select(row, ("image", "plate", "mask")).values())
    cutout = np.asarray(row["cutout"])
    together = recomposed(plate, np.asarray(row["shadow"]), cutout)
    product = mask > 127
    kernel = np.ones((3, 3), np.uint8)
    edge = (cv2.dilate(product.astype(np.uint8), kernel) - cv2.erode(product.astype(np.uint8), kernel)) > 0
    error = _delta_e(together, pixels)
    return {
        "mask IoU with the cut-out": mask_iou(mask, cutout),
        "layers put together, ΔE": float(error.mean()),
        "the same on the product's edge, ΔE": float(error[edge].mean()),
        "product's share of the picture": float(product.mean()),
        "product's height in the picture": float(np.ptp(np.flatnonzero(product.any(1))) + 1) / mask.shape[0],
        "pixels of the product at the frame": float(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).max()),
    }


def cramers_v(pairs: Sequence[tuple[str, str]]) -> float:
    """Association of two slots in [0, 1], corrected for chance (Bergsma 2013): 0 when they are independent."""
    first, second = (sorted(set(column)) for column in zip(*pairs, strict=True))
    table = np.zeros((len(first), len(second)))
    for a, b in pairs:
        table[first.index(a), second.index(b)] += 1
    total = table.sum()
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / total
    phi2 = (((table - expected) ** 2) / expected).sum() / total
    r, k = table.shape
    phi2 = max(0.0, phi2 - (k - 1) * (r - 1) / (total - 1))
    limit = min(r - (r - 1) ** 2 / (total - 1), k - (k - 1) ** 2 / (total - 1)) - 1
    return float(np.sqrt(phi2 / limit)) if limit > 0 else 0.0


def distances(a_NF: np.ndarray, b_MF: np.ndarray) -> np.ndarray:
    """Mean colour difference (CIE76) of thumbnails, (N, M)."""
    channels = a_NF.reshape(len(a_NF), -1, 3), b_MF.reshape(len(b_MF), -1, 3)
    return np.stack([np.linalg.norm(channels[1] - one, axis=-1).mean(-1) for one in channels[0]])


# ---------------------------------------------------------------------------------------------------------- report


def _percentiles(values: np.ndarray, digits: int) -> list[str]:
    return list(map(f"{{:.{digits}f}}".format, np.percentile(values, (0, 1, 50, 99, 100))))


def _slots(scenes: Sequence[Scene]) -> list[str]:
    lines = []
    slots = list(map(Scene.slots, scenes))
    for slot in SLOTS:
        values = column(slots, slot)
        phrases = Counter(map(without_position, itertools.chain(*values)))
        lines.append((slot, len(phrases), values.count(()), in_words(dict(phrases.most_common()), "{} {}")))
    things = map(split_position, itertools.chain(*column(slots, "surroundings")))
    places = Counter(place or "unsaid" for _, place in things)
    lines.append(("where things stand", len(places), "", in_words(dict(places.most_common()), "{} {}")))
    return markdown_table(("slot", "phrases", "empty in", "how often"), lines)


def _together(scenes: Sequence[Scene]) -> list[str]:
    lines = []
    first = {slot: [first_phrase(scene, slot) for scene in scenes] for slot in COUNTED}
    for a, b in itertools.combinations(COUNTED, 2):
        pairs = list(zip(first[a], first[b], strict=True))
        possible = len(set(first[a])) * len(set(first[b]))
        (most, count), *_ = Counter(pairs).most_common(1)
        lines.append((f"{a} x {b}", f"{cramers_v(pairs):.2f}", f"{len(set(pairs))} of {possible}", f"{most} {count}"))
    return markdown_table(("slots", "Cramér's V", "pairs seen", "most frequent pair"), lines)


def _section(rows: Rows, measures: Measures) -> list[str]:
    scenes = column(rows, "scene")
    products = Counter(column(rows, "product_id"))
    apart = distances(measures.lab_NF, measures.lab_NF)
    pairs = apart[np.triu_indices(len(apart), 1)]
    np.fill_diagonal(apart, np.inf)
    head = ("", "least", "1 %", "median", "99 %", "most")
    twins = len(rows) - find_duplicates(measures.hashes, NEAR_DUPLICATE).count(None)
    return [
        f"## `{rows.path}`",
        f"{len(rows)} scenes, {len(products)} products (each in {min(products.values())} to "
        f"{max(products.values())}), {len(set(rows.texts))} different captions.\n",
        *_slots(scenes),
        "Which slots give another away (0: not at all):\n",
        *_together(scenes),
        f"Likeness, as mean colour difference of {THUMBNAIL} px thumbnails. Near-duplicates by their hash: {twins}.\n",
        *markdown_table(
            head,
            [
                ("any two pictures, ΔE", *_percentiles(pairs, 1)),
                ("a picture and its nearest, ΔE", *_percentiles(apart.min(1), 1)),
            ],
        ),
        "Truth of the layers:\n",
        *markdown_table(head, [(name, *_percentiles(values, 4)) for name, values in measures.truth.items()]),
    ]


def grounds(rows: Rows) -> set[tuple[str, str]]:
    """The pairs of surface and background that a set shows."""
    return set(map(attrgetter("surface", "background"), column(rows, "scene")))


def _between(first: tuple[Rows, Measures], other: tuple[Rows, Measures]) -> list[str]:
    (train, seen), (rest, new) = first, other
    products = set(column(train, "product_id")) & set(column(rest, "product_id"))
    nearest = distances(new.lab_NF, seen.lab_NF).min(1)
    twins = find_duplicates([*seen.hashes, *new.hashes], NEAR_DUPLICATE)[len(seen.hashes) :]
    across = sum(match is not None and match < len(seen.hashes) for match in twins)
    return [
        f"## `{rest.path}` against `{train.path}`",
        *markdown_table(
            ("shared", "count"),
            [
                ("products", len(products)),
                ("pairs of surface and background", len(grounds(train) & grounds(rest))),
                ("captions", len(set(train.texts) & set(rest.texts))),
                ("near-duplicate pictures", across),
            ],
        ),
        f"Nearest training picture, ΔE: least {nearest.min():.1f}, median {np.median(nearest):.1f}.\n",
    ]


def report(folders: Sequence[str]) -> str:
    """Markdown over the folders.

    Raises:
        PackshotError: a folder is not a rendered set.
    """
    sets = []
    for folder in folders:
        rows = load_rows("folder", folder)
        missing = {"plate", "shadow", "cutout", "product_id"} - set(rows[0])
        if missing:
            raise PackshotError(
                f"{folder} lacks {', '.join(sorted(missing))}.",
                "Only sets of build_data.py dataset=rendered have them.",
            )
        sets.append((rows, measure(rows)))
    lines = ["# Rendered sets, measured", f"`python -m packshot.make_dataset.audit {' '.join(folders)}`\n"]
    for one in sets:
        lines += _section(*one)
    for other in sets[1:]:
        lines += _between(sets[0], other)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    args = parser.parse_args()
    try:
        text = report(args.folders)
    except PackshotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.out:
        args.out.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Bulk captioning compared with one picture at a time: the same model, pictures and words.

    python -m benchmarks.caption_speed --adapter outputs/demo/captioner/export --batch-size 32 --rounds 3

Alternates the two in one process and prints images per second, their ratio, and how many captions differ.
"""

from __future__ import annotations

import argparse
import statistics
import time

from packshot.caption.models.captioner import Captioner
from packshot.caption.models.load import load_captioner
from packshot.config.schema import CaptionerConfig, CaptionerKind, Constraint, ModelConfig
from packshot.dataset.rows import load_rows


def timed(captioner: Captioner, pictures: list, masks: list) -> tuple[float, list[str]]:
    """(images per second, captions)."""
    started = time.monotonic()
    captions = captioner.caption(pictures, masks)
    return len(pictures) / (time.monotonic() - started), captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("florence2", "llama32_vision"), default="florence2")
    parser.add_argument("--adapter", help="export/ of caption_vlm.py; default: the family's base")
    parser.add_argument("--data", default="data/rendered/heldout")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--constraint", choices=("none", "scene"), default="scene")
    args = parser.parse_args()
    rows = load_rows("--data", args.data, pictures=("image", "mask"))
    samples = [rows[index] for index in range(min(args.images, len(rows)))]
    pictures, masks = [sample["image"] for sample in samples], [sample["mask"] for sample in samples]
    rates: dict[int, list[float]] = {1: [], args.batch_size: []}
    words: dict[int, list[str]] = {}
    for size in rates:  # the first captions of a process compile the grammar and warm the kernels
        timed(_captioner(args, size), pictures[:size], masks[:size])
    for _ in range(args.rounds):
        for size in rates:
            rate, words[size] = timed(_captioner(args, size), pictures, masks)
            rates[size].append(rate)
    alone, together = rates.values()
    ratios = [b / a for a, b in zip(alone, together, strict=True)]
    differing = sum(a != b for a, b in zip(*words.values(), strict=True))
    print(
        f"{args.kind}, {len(pictures)} pictures, constraint {args.constraint}, median (least to most) of {args.rounds}"
    )
    for name, values in (("one at a time", alone), (f"batches of {args.batch_size}", together), ("ratio", ratios)):
        print(f"| {name} | {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g}) |")
    print(f"| captions that differ | {differing} of {len(pictures)} |")


def _captioner(args: argparse.Namespace, batch_size: int) -> Captioner:
    config = CaptionerConfig(
        kind=CaptionerKind[args.kind],
        adapter=args.adapter,
        batch_size=batch_size,
        constraint=Constraint[args.constraint],
    )
    return load_captioner(ModelConfig(), config)


if __name__ == "__main__":
    main()

"""Aspect-ratio buckets: the shapes that training sees, all of about the same area."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from packshot.lists import pick

MAX_RATIO = 2.0  # longer side / shorter side


def shapes(resolution: int, step: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket, the square first.

    Sides are multiples of ``step``; each width takes the largest height whose area stays within ``resolution``²
    (SDXL, arXiv 2307.01952, section 2.3 and appendix I, which lists them for 1024 and 64).

    Raises:
        ValueError: ``resolution`` is not a multiple of ``step``.
    """
    if resolution % step:
        raise ValueError(f"resolution {resolution} is not a multiple of {step}")
    found = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = resolution * resolution // short // step * step
        if long / short <= MAX_RATIO:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda shape: (abs(math.log(shape[0] / shape[1])), shape))


def bucket_step(resolution: int, cell: int) -> int:
    """The step of :func:`shapes` for a network whose sides are multiples of ``cell`` px: near a sixteenth of the
    resolution, as SDXL's (64 px at 1024), so that there are not hundreds of buckets.

    Raises:
        ValueError: ``resolution`` is not a multiple of ``cell``.
    """
    if resolution % cell:
        raise ValueError(f"resolution {resolution} is not a multiple of {cell}")
    fitting = filter(lambda step: resolution % step == 0, range(cell, resolution // 16 + 1, cell))
    return max(fitting, default=cell)


def nearest(size: tuple[int, int], buckets: list[tuple[int, int]]) -> int:
    """Index of the bucket whose aspect ratio is nearest to that of ``size`` (h, w); of equal ones the first."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(buckets)), key=lambda index: abs(math.log(buckets[index][0] / buckets[index][1]) - ratio))


def sort_into(sizes: Sequence[tuple[int, int]], buckets: list[tuple[int, int]], smallest: int = 1) -> list[int]:
    """The index of each picture's bucket. sizes: (h, w).

    smallest: buckets with fewer pictures are closed, and their pictures go to the nearest of the others; where all are
    so small, the fullest stays.
    """
    found = [nearest(size, buckets) for size in sizes]
    counts = Counter(found)
    kept = sorted(index for index, count in counts.items() if count >= smallest)
    if found and not kept:
        kept = [max(counts, key=lambda index: (counts[index], -index))]
    shapes_kept = pick(buckets, kept)
    for place, index in enumerate(found):
        if index not in kept:
            found[place] = kept[nearest(sizes[place], shapes_kept)]
    return found

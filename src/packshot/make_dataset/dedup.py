"""Near-duplicates: a 64-bit perceptual hash, and one pass over a dataset in its order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from PIL import Image


def perceptual_hash(image: Image.Image) -> int:
    """64-bit pHash of an RGB image: signs of the 8x8 lowest DCT terms of its 32x32 grey version, about their median.

    Re-encoding and scaling change a few bits; another picture about 32.
    """
    grey_HW = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
    low = cv2.dct(grey_HW)[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the first term is the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hamming(a: int, b: int) -> int:
    """Number of bits that differ."""
    return (a ^ b).bit_count()


def find_duplicates(hashes: Sequence[int], max_distance: int) -> list[int | None]:
    """For each hash the position of the earliest kept one within ``max_distance``, or None: it is kept.

    Only pairs that agree in one of ``max_distance + 1`` bands of bits are compared. By the pigeonhole principle no
    near pair is missed, and the pass stays far from quadratic.
    """
    count = min(max_distance + 1, 64)
    edges = np.linspace(0, 64, count + 1).round().astype(int).tolist()
    bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    result: list[int | None] = []
    for position, value in enumerate(hashes):
        keys = [(low, value >> low & mask) for low, mask in bands]
        near = {other for key in keys for other in seen[key]}
        match = min((other for other in near if hamming(value, hashes[other]) <= max_distance), default=None)
        result.append(match)
        if match is None:
            for key in keys:
                seen[key].append(position)
    return result

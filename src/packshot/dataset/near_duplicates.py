"""Near-duplicates: a 64-bit perceptual hash and a coarse map of colours, and one pass over a dataset in its order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from PIL import Image

from packshot.imaging.color import to_lab

COLOR_CELLS = 8
# ΔE of one cell. Re-encoded, scaled and slightly cropped copies stay below 10, five colours of one mug are 29 apart.
COLOR_LIMIT = 12.0


def perceptual_hash(image: Image.Image) -> int:
    """64-bit pHash of an RGB image: signs of the 8x8 lowest DCT terms of its 32x32 grey version, about their median.

    Re-encoding and scaling change a few bits; another picture about 32.
    """
    grey_HW = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
    low = cv2.dct(grey_HW)[:8, :8].ravel()
    bits = low > np.median(low[1:])  # the first term is the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def color_map(image: Image.Image) -> bytes:
    """Colours of an RGB image on a grid of 8x8 cells, CIELAB, one signed byte a channel.

    The hash sees brightness alone: to it a red and a blue mug of one form are one picture.
    """
    small = np.asarray(image.resize((COLOR_CELLS, COLOR_CELLS), Image.Resampling.BOX))
    return np.round(to_lab(small)).clip(-128, 127).astype(np.int8).tobytes()


def colors_differ(a: bytes, b: bytes) -> bool:
    """Whether some cell of two colour maps has another colour."""
    maps = [np.frombuffer(value, np.int8).reshape(-1, 3).astype(np.float32) for value in (a, b)]
    return bool(np.linalg.norm(maps[0] - maps[1], axis=1).max() > COLOR_LIMIT)


def hamming(a: int, b: int) -> int:
    """Number of bits that differ."""
    return (a ^ b).bit_count()


def find_duplicates(
    hashes: Sequence[int], max_distance: int, colors: Sequence[bytes] | None = None
) -> list[int | None]:
    """For each hash the position of the earliest kept one within ``max_distance``, or None: it is kept.

    colors: maps by :func:`color_map`; pictures whose colours differ are not duplicates.

    Only pairs that agree in one of ``max_distance + 1`` bands of bits are compared. By the pigeonhole principle no
    near pair is missed, and the pass stays far from quadratic.
    """
    bands = hash_bands(max_distance)
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    result: list[int | None] = []
    for position, value in enumerate(hashes):
        keys = [(low, value >> low & mask) for low, mask in bands]
        match = None
        for other in sorted(set().union(*map(seen.__getitem__, keys))):
            near = hamming(value, hashes[other]) <= max_distance
            if near and not (colors and colors_differ(colors[position], colors[other])):
                match = other
                break
        result.append(match)
        if match is None:
            for key in keys:
                seen[key].append(position)
    return result


def hash_bands(max_distance: int) -> list[tuple[int, int]]:
    """(lowest bit, mask) of bands of a 64-bit hash, of which near hashes have one in common."""
    count = min(max_distance + 1, 64)
    edges = np.linspace(0, 64, count + 1).round().astype(int).tolist()
    return [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]


class Groups:
    """Members that are joined pair by pair: a group has one root, its first member."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def root(self, member: int) -> int:
        """The first member of the group."""
        while self._above[member] != member:
            self._above[member] = self._above[self._above[member]]  # shorter ways for the next who asks
            member = self._above[member]
        return member

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        first, second = sorted((self.root(one), self.root(other)))
        self._above[second] = first


def join_near(groups: Groups, hashes: Sequence[int], max_distance: int, colors: Sequence[bytes]) -> None:
    """Join all pictures whose hashes are within ``max_distance`` and whose colours do not differ."""
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for position, value in enumerate(hashes):
        for low, mask in hash_bands(max_distance):
            band = seen[low, value >> low & mask]
            for other in band:
                if groups.root(position) == groups.root(other) or hamming(value, hashes[other]) > max_distance:
                    continue
                if not colors_differ(colors[position], colors[other]):
                    groups.join(position, other)
            band.append(position)

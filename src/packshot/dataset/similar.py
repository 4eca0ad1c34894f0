"""Near-duplicates by embedding: one pass over a dataset in its order, with the same result on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVELS = 127
_BLOCK = 1024
# Sums of products of bytes are exact in float32 up to this many of them, in whatever order a library adds.
_EXACT = 2**24 // LEVELS**2


def to_levels(vector: np.ndarray) -> bytes:
    """A vector as signed bytes, the largest entry at 127: similarities of such vectors are exact integers."""
    largest = float(np.abs(vector).max())
    if largest == 0:
        return bytes(len(vector))
    return np.round(vector * (LEVELS / largest)).astype(np.int8).tobytes()


def find_similar(vectors: Sequence[bytes], limit: float) -> list[tuple[int | None, float]]:
    """For each vector the most similar kept one before it, None without any, and the cosine of the two.

    A vector is kept if that cosine is below ``limit``. vectors: by :func:`to_levels`, all of one length. Each is
    compared with all kept ones, block by block: time grows with the square of their number, memory with the number.
    """
    if not vectors:
        return []
    kind = np.float32 if len(vectors[0]) <= _EXACT else np.float64
    values_ND = np.frombuffer(b"".join(vectors), np.int8).reshape(len(vectors), -1)
    squares_N = np.einsum("nd,nd->n", values_ND, values_ND, dtype=np.int64)
    norms_N = np.sqrt(np.maximum(squares_N, 1).astype(np.float64))
    found: list[tuple[int | None, float]] = []
    kept = np.zeros(len(vectors), bool)
    for start in range(0, len(vectors), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(vectors)))
        best_B, other_B = best_before(values_ND, norms_N, kept, block, kind)
        own_BB = cosines(values_ND[block], values_ND[block], norms_N[block], norms_N[block], kind)
        for row in range(block.stop - start):
            best, other = float(best_B[row]), int(other_B[row])
            inside = np.where(kept[start : start + row], own_BB[row, :row], -np.inf)
            if row and inside.max() > best:
                best, other = float(inside.max()), start + int(inside.argmax())
            kept[start + row] = other < 0 or best < limit
            found.append((None, 0.0) if other < 0 else (other, best))
    return found


def cosines(a_ND: np.ndarray, b_MD: np.ndarray, a_norms: np.ndarray, b_norms: np.ndarray, kind: type) -> np.ndarray:
    """(N, M) float64 cosines of byte vectors."""
    sums_NM = (a_ND.astype(kind) @ b_MD.astype(kind).T).astype(np.float64)
    return sums_NM / a_norms[:, None] / b_norms[None]


def best_before(
    values_ND: np.ndarray, norms_N: np.ndarray, kept: np.ndarray, block: slice, kind: type
) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, position) of the most similar kept vector before a block, for each of its rows; -1 without any."""
    size = block.stop - block.start
    best_B = np.full(size, -np.inf)
    other_B = np.full(size, -1)
    for start in range(0, block.start, _BLOCK):
        places = np.flatnonzero(kept[start : start + _BLOCK]) + start
        if not len(places):
            continue
        near_BM = cosines(values_ND[block], values_ND[places], norms_N[block], norms_N[places], kind)
        nearest_B = near_BM.argmax(1)
        values_B = near_BM[np.arange(size), nearest_B]
        better = values_B > best_B
        best_B = np.where(better, values_B, best_B)
        other_B = np.where(better, places[nearest_B], other_B)
    return best_B, other_B

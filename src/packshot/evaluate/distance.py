"""How far two sets of pictures are apart, from any embedding of them."""

from __future__ import annotations

import numpy as np

from packshot.errors import PackshotError

SIGMA = 10.0
SCALE = 1000.0


def cmmd(a_ND: np.ndarray, b_MD: np.ndarray, sigma: float = SIGMA) -> float:
    """Maximum mean discrepancy between two sets of embeddings (Jayasumana et al. 2024, arXiv 2401.09603, section 4).

    Squared, with the kernel exp(-|x - y|² / 2σ²) on embeddings of length 1, times 1000; on CLIP embeddings it is the
    paper's CMMD. As in the authors' code every pair counts, a vector with itself too: the same set is at 0, nothing is
    below 0, and two samples of one source are a little above 0, the more the smaller they are. Say what two real
    samples of the same size give.

    a_ND, b_MD: one embedding per picture, of any length but 0.

    Raises:
        PackshotError: no embeddings, unequal widths, or one that has no direction (zero, NaN, infinite).
    """
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1] or 0 in a_ND.shape + b_MD.shape:
        raise PackshotError(
            f"Embeddings of shapes {a_ND.shape} and {b_MD.shape} cannot be compared.",
            "Give two non-empty tables (pictures, width) that one encoder made.",
        )
    a_ND, b_MD = _unit("first", a_ND), _unit("second", b_MD)
    means = (_kernel(x, y, sigma).mean() for x, y in ((a_ND, a_ND), (b_MD, b_MD), (a_ND, b_MD)))
    within_a, within_b, between = means
    return SCALE * float(within_a + within_b - 2 * between)


def _unit(name: str, embeddings_ND: np.ndarray) -> np.ndarray:
    """Each row at length 1, float64: means of kernels that are all near 1 are subtracted from each other."""
    wide = embeddings_ND.astype(np.float64)
    length_N1 = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length_N1) & (length_N1 > 0)))
    if len(bad):
        raise PackshotError(
            f"Embedding {bad[0]} of the {name} set has no direction: it is zero or not finite.",
            "Look at that picture and at the encoder's precision.",
        )
    return wide / length_N1


def _kernel(x_ND: np.ndarray, y_MD: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian kernel of vectors of length 1, shape (N, M)."""
    squared_NM = np.maximum(2 - 2 * x_ND @ y_MD.T, 0)
    return np.exp(-squared_NM / (2 * sigma**2))

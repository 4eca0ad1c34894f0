"""The distance between two sets of pictures, from any embedding of them."""

from __future__ import annotations

import numpy as np

from packshot.errors import PackshotError

SIGMA = 10.0
SCALE = 1000.0


def cmmd(a_ND: np.ndarray, b_MD: np.ndarray, sigma: float = SIGMA) -> float:
    """Maximum mean discrepancy between two sets of embeddings (Jayasumana et al. 2024, arXiv 2401.09603, section 4).

    Squared, with the kernel exp(-|x - y|² / 2σ²) on embeddings of length 1, times 1000; on CLIP embeddings it is the
    paper's CMMD. As in the authors' code, every pair counts, also that of a vector with itself. Equal sets therefore
    have distance 0, and no distance is below 0. Two samples of one source are a little above 0, and smaller samples
    are further apart, so report the distance of two real samples of the same size as well.

    a_ND, b_MD: one embedding per picture, of any length except 0.

    Raises:
        PackshotError: there are no embeddings, widths differ, or one has no direction (zero, NaN, infinite).
    """
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1] or 0 in a_ND.shape + b_MD.shape:
        raise PackshotError(
            f"Embeddings of shapes {a_ND.shape} and {b_MD.shape} cannot be compared.",
            "Give two non-empty tables (pictures, width) from one encoder.",
        )
    a_ND = unit_rows("first", a_ND)
    b_MD = unit_rows("second", b_MD)
    within_a = gaussian_kernel(a_ND, a_ND, sigma).mean()
    within_b = gaussian_kernel(b_MD, b_MD, sigma).mean()
    between = gaussian_kernel(a_ND, b_MD, sigma).mean()
    return SCALE * float(within_a + within_b - 2 * between)


def unit_rows(name: str, embeddings_ND: np.ndarray) -> np.ndarray:
    """Each row scaled to length 1, in float64, because the caller subtracts means that are all close to 1."""
    wide = embeddings_ND.astype(np.float64)
    length_N1 = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length_N1) & (length_N1 > 0)))
    if len(bad):
        raise PackshotError(
            f"Embedding {bad[0]} of the {name} set has no direction: it is zero or not finite.",
            "Check that picture and the encoder's precision.",
        )
    return wide / length_N1


def gaussian_kernel(x_ND: np.ndarray, y_MD: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian kernel of vectors of length 1, shape (N, M)."""
    squared_NM = np.maximum(2 - 2 * x_ND @ y_MD.T, 0)
    return np.exp(-squared_NM / (2 * sigma**2))


def kid(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Kernel inception distance (Bińkowski et al. 2018, arXiv 1801.01401), times 1000.

    The unbiased estimate with the kernel (x·y / D + 1)³, over all pictures instead of subsets. It may be below 0. The
    paper embeds by Inception; here the embedding is the caller's, so name it beside the figure.

    a_ND, b_MD: one embedding per picture; at least two pictures in each.

    Raises:
        PackshotError: a set has fewer than two embeddings, or their widths differ.
    """
    if a_ND.ndim != 2 or b_MD.ndim != 2 or a_ND.shape[1] != b_MD.shape[1] or min(len(a_ND), len(b_MD)) < 2:
        raise PackshotError(
            f"Embeddings of shapes {a_ND.shape} and {b_MD.shape} cannot be compared.",
            "Give two tables (pictures, width) from one encoder, each of at least two pictures.",
        )
    within_a = mean_of_pairs(cubic_kernel(a_ND, a_ND))
    within_b = mean_of_pairs(cubic_kernel(b_MD, b_MD))
    return SCALE * (within_a + within_b - 2 * float(cubic_kernel(a_ND, b_MD).mean()))


def cubic_kernel(x_ND: np.ndarray, y_MD: np.ndarray) -> np.ndarray:
    """(x·y / D + 1)³ in float64, shape (N, M)."""
    return (x_ND.astype(np.float64) @ y_MD.astype(np.float64).T / x_ND.shape[1] + 1) ** 3


def mean_of_pairs(kernel_NN: np.ndarray) -> float:
    """Mean over pairs of different pictures."""
    count = len(kernel_NN)
    return float((kernel_NN.sum() - np.trace(kernel_NN)) / (count * (count - 1)))

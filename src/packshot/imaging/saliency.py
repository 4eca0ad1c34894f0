"""What stands out from the frame of a picture: a first guess at the product, without any training.

Two cheap measures of "differs from the frame" are averaged: the geodesic distance to the border (Wei et al., "Geodesic
Saliency Using Background Priors", ECCV 2012), which knows regions, and the Mahalanobis distance to the colours along
the border, which knows colours. Each alone fails on textured tables and on objects of several materials.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from packshot.imaging.color import to_lab


def saliency(rgb_HWC: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1]: how much a pixel differs from the frame of the picture; all 0 when nothing does."""
    flat_HWC = to_lab(cv2.pyrMeanShiftFiltering(rgb_HWC, 8, 16))  # texture goes, edges stay
    geodesic_HW = _geodesic_from_border(flat_HWC)
    top = float(np.percentile(geodesic_HW, 98))
    if top < 4.0:  # ΔE: no region stands out from the border at all
        return np.zeros(rgb_HWC.shape[:2], np.float32)
    colour_HW = _distance_to_border_colours(to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), 1.5)))
    colour_top = max(float(np.percentile(colour_HW, 98)), 1e-6)
    return (np.clip(geodesic_HW / top, 0, 1) / 2 + np.clip(colour_HW / colour_top, 0, 1) / 2).astype(np.float32)


def _geodesic_from_border(lab_HWC: np.ndarray, free: float = 1.0) -> np.ndarray:
    """(H, W) cost in ΔE of the cheapest way to the border; steps below ``free`` cost nothing (shading)."""
    height, width = lab_HWC.shape[:2]
    index = np.arange(height * width).reshape(height, width)
    starts, ends, costs = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = (slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        b = (slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        difference = np.linalg.norm(lab_HWC[a] - lab_HWC[b], axis=-1)
        starts.append(index[a].ravel())
        ends.append(index[b].ravel())
        costs.append(np.maximum(difference - free, 0).ravel() + 1e-4)  # 0 would mean "no edge" to scipy
    edges = (np.concatenate(costs), (np.concatenate(starts), np.concatenate(ends)))
    graph = coo_matrix(edges, shape=(index.size, index.size)).tocsr()
    border = np.concatenate([index[0], index[-1], index[:, 0], index[:, -1]])
    distance = dijkstra(graph, directed=False, indices=border, min_only=True)
    return distance.reshape(height, width)


def _distance_to_border_colours(lab_HWC: np.ndarray, clusters: int = 5) -> np.ndarray:
    """(H, W) Mahalanobis distance to the nearest of the colour clusters along the border."""
    height, width = lab_HWC.shape[:2]
    ring = max(2, round(0.04 * min(height, width)))
    frame = np.ones((height, width), bool)
    frame[ring : height - ring, ring : width - ring] = False
    pixels = np.ascontiguousarray(lab_HWC[frame])
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.1)
    _, labels, centres = cv2.kmeans(
        pixels, min(clusters, len(pixels)), np.empty(0, np.int32), criteria, 3, cv2.KMEANS_PP_CENTERS
    )
    nearest = np.full((height, width), np.inf)
    for k, centre in enumerate(centres):
        members = pixels[labels[:, 0] == k]
        if len(members) < 4:
            continue
        covariance = np.cov(members.T) + 4.0 * np.eye(3)  # colours within 2 ΔE count as noise
        delta = lab_HWC - centre
        squared = np.einsum("hwi,ij,hwj->hw", delta, np.linalg.inv(covariance), delta)
        nearest = np.minimum(nearest, squared)
    return np.sqrt(nearest)


@dataclass(frozen=True)
class Ground:
    """The ground of a picture as one smoothly shaded colour, fitted along the frame.

    lab_HW3: the fit, also under the product. spread: how far the frame is from it, ΔE at the 90th percentile. A
    studio's ground stays under 5; most scenes have 15 and more.
    """

    lab_HW3: np.ndarray
    spread: float


def fit_rows(rgb_HWC: np.ndarray) -> Ground:
    """A ground that each row continues from its two ends, such as a wall above a table, bowed across as the first and
    last rows are."""
    lab_HWC = to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), 1.0))
    height, width = lab_HWC.shape[:2]
    ring = max(2, round(0.06 * min(height, width)))
    x_W1 = np.linspace(0, 1, width)[:, None]
    y_H11 = np.linspace(0, 1, height)[:, None, None]
    left_H13 = np.median(lab_HWC[:, :ring], axis=1, keepdims=True)
    right_H13 = np.median(lab_HWC[:, -ring:], axis=1, keepdims=True)
    ground_HW3 = left_H13 * (1 - x_W1) + right_H13 * x_W1
    bow_W1 = 4 * x_W1 * (1 - x_W1)
    middle = bow_W1[:, 0] > 0.3  # where the bow is large enough to divide by
    if middle.any():
        residual_HW3 = (lab_HWC - ground_HW3)[:, middle] / bow_W1[middle]
        top_3 = np.median(residual_HW3[:ring], axis=(0, 1))
        bottom_3 = np.median(residual_HW3[-ring:], axis=(0, 1))
        ground_HW3 = ground_HW3 + bow_W1 * (top_3 * (1 - y_H11) + bottom_3 * y_H11)
    inner_HW = np.zeros((height, width), bool)
    inner_HW[ring : height - ring, ring : width - ring] = True
    distance_HW = np.linalg.norm(lab_HWC - ground_HW3, axis=-1)
    return Ground(ground_HW3, float(np.percentile(distance_HW[~inner_HW], 90)))


def fit_ground(rgb_HWC: np.ndarray) -> Ground:
    """A surface of second order through the colours along the frame, robust because a product may touch the frame."""
    lab_HWC = to_lab(cv2.GaussianBlur(rgb_HWC, (0, 0), 1.0))
    height, width = lab_HWC.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width]
    x = columns.ravel() / max(1, width - 1) * 2 - 1
    y = rows.ravel() / max(1, height - 1) * 2 - 1
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    ring = max(2, round(0.06 * min(height, width)))
    inner = np.zeros((height, width), bool)
    inner[ring : height - ring, ring : width - ring] = True
    frame = np.flatnonzero(~inner)
    colors = lab_HWC.reshape(-1, 3)[frame]
    weights = np.ones(len(frame))
    fit = np.zeros((6, 3))
    residuals = np.zeros(len(frame))
    for _ in range(8):  # Cauchy weights; they have settled by then
        fit = np.linalg.lstsq(terms[frame] * weights[:, None], colors * weights[:, None], rcond=None)[0]
        residuals = np.linalg.norm(colors - terms[frame] @ fit, axis=1)
        scale = max(0.5, 1.4826 * float(np.median(residuals)))
        weights = 1 / np.sqrt(1 + (residuals / (2 * scale)) ** 2)
    return Ground((terms @ fit).reshape(height, width, 3), float(np.percentile(residuals, 90)))

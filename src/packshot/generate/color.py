"""Colour differences, and the colour drift of the autoencoder measured where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from packshot.generate.json_types import Json
from packshot.imaging.color import to_lab

MIN_PIXELS = 64
MAX_ERROR_LEFT = 0.6  # share of the median error that a believed fit may leave
MAX_DRIFT = 0.15  # mean change in [0, 1] units beyond which a fit is not believed
_RIDGE = 0.01  # variance of colour directions that the product hardly has: there the fit stays the identity


def ciede2000(lab_1: np.ndarray, lab_2: np.ndarray) -> np.ndarray:
    """CIEDE2000 difference of CIELAB colours (..., 3), weights 1 (Sharma, Wu, Dalal 2005, doi 10.1002/col.20070)."""
    l1, a1, b1 = np.moveaxis(np.asarray(lab_1, np.float64), -1, 0)
    l2, a2, b2 = np.moveaxis(np.asarray(lab_2, np.float64), -1, 0)
    mean_chroma7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - np.sqrt(mean_chroma7 / (mean_chroma7 + 25.0**7)))
    a1 = (1 + g) * a1
    a2 = (1 + g) * a2
    c1 = np.hypot(a1, b1)
    c2 = np.hypot(a2, b2)
    h1 = np.degrees(np.arctan2(b1, a1)) % 360
    h2 = np.degrees(np.arctan2(b2, a2)) % 360
    coloured = c1 * c2 > 0
    turn = np.where(coloured, (h2 - h1 + 180) % 360 - 180, 0.0)
    delta_l = l2 - l1
    delta_c = c2 - c1
    delta_h = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    lightness = (l1 + l2) / 2
    c = (c1 + c2) / 2
    # The mean hue lies half a turn from either; a colourless partner has no hue, then the other's counts.
    h = np.where(coloured, (h1 + turn / 2) % 360, h1 + h2)
    t = (
        1
        - 0.17 * np.cos(np.radians(h - 30))
        + 0.24 * np.cos(np.radians(2 * h))
        + 0.32 * np.cos(np.radians(3 * h + 6))
        - 0.20 * np.cos(np.radians(4 * h - 63))
    )
    s_l = 1 + 0.015 * (lightness - 50) ** 2 / np.sqrt(20 + (lightness - 50) ** 2)
    s_c = 1 + 0.045 * c
    s_h = 1 + 0.015 * c * t
    rotation = -np.sin(np.radians(60 * np.exp(-(((h - 275) / 25) ** 2)))) * 2 * np.sqrt(c**7 / (c**7 + 25.0**7))
    dl = delta_l / s_l
    dc = delta_c / s_c
    dh = delta_h / s_h
    return np.sqrt(np.maximum(dl**2 + dc**2 + dh**2 + rotation * dc * dh, 0))


def delta_e(rgb_1: np.ndarray, rgb_2: np.ndarray) -> np.ndarray:
    """CIEDE2000 between sRGB uint8 arrays (..., 3)."""
    return ciede2000(to_lab(rgb_1), to_lab(rgb_2))


@dataclass(frozen=True)
class ColourFit:
    """An affine colour map ``rgb @ matrix_33 + offset_3`` on values in [0, 1], and what is known of it.

    applied: False when the fit was not trusted; matrix and offset are then the identity. report: for the certificate.
    """

    matrix_33: np.ndarray
    offset_3: np.ndarray
    applied: bool
    report: Json

    def apply(self, rgb_HW3: np.ndarray) -> np.ndarray:
        """Float32 (H, W, 3) in [0, 1]."""
        return np.clip(rgb_HW3 @ self.matrix_33 + self.offset_3, 0, 1).astype(np.float32) if self.applied else rgb_HW3


def fit_colour(decoded_N3: np.ndarray, truth_N3: np.ndarray) -> ColourFit:
    """Affine map from decoded to true product colours, both (N, 3) in [0, 1].

    Ridge regression towards the identity, so colour directions the product does not have are left alone, refitted
    once without the pixels that fit worst (detail that the autoencoder lost is not colour drift). Not applied, with
    the reason in the report, for few pixels, for a map that leaves most of the error (it would tint the background and
    mend nothing), or one that would move colours too far to be believed.
    """
    count = len(decoded_N3)
    if count < MIN_PIXELS:
        return unapplied(f"only {count} product pixels at the working size, {MIN_PIXELS} are needed")
    inliers = np.ones(count, bool)
    for _ in range(2):
        matrix, offset = ridge_regression(decoded_N3[inliers], truth_N3[inliers])
        residual = np.abs(decoded_N3 @ matrix + offset - truth_N3).mean(axis=1)
        inliers = residual <= np.quantile(residual, 0.9)
    # The median over pixels: what the typical pixel gains; the edges hardly count.
    before = float(np.median(np.abs(decoded_N3 - truth_N3).mean(axis=1)))
    after = float(np.median(residual))
    probe = np.stack(np.meshgrid(*[np.linspace(0, 1, 5)] * 3), -1).reshape(-1, 3)
    moved = float(np.abs(np.clip(probe @ matrix + offset, 0, 1) - probe).mean())
    measures = {"pixels": count, "error_before": before, "error_after": after, "mean_change": moved}
    if after >= MAX_ERROR_LEFT * before:
        return unapplied("the fit explains too little: the product lost detail, its colours did not drift", measures)
    if moved > MAX_DRIFT:
        return unapplied(f"the fit would move colours by {moved:.2f} on average, {MAX_DRIFT} is believed", measures)
    report = {"applied": True, **measures, "matrix": matrix.round(5).tolist(), "offset": offset.round(5).tolist()}
    return ColourFit(matrix, offset, True, report)


def unapplied(reason: str, measures: Json | None = None) -> ColourFit:
    return ColourFit(np.eye(3), np.zeros(3), False, {"applied": False, "reason": reason, **(measures or {})})


def ridge_regression(x_N3: np.ndarray, y_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x_mean = x_N3.mean(axis=0)
    y_mean = y_N3.mean(axis=0)
    x = x_N3 - x_mean
    y = y_N3 - y_mean
    penalty = _RIDGE * len(x) * np.eye(3)
    matrix = np.linalg.solve(x.T @ x + penalty, x.T @ y + penalty)
    return matrix, y_mean - x_mean @ matrix

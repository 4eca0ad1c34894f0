"""How sure a mean is, and which of two systems is better: by resampling items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its bootstrap interval (percentiles, 95 %). items: how many were measured."""

    mean: float
    low: float
    high: float
    items: int


@dataclass(frozen=True)
class Comparison:
    """Item by item, the first system against the second. difference: mean of first minus second, with its interval."""

    wins: int
    ties: int
    losses: int
    difference: Estimate


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The entries that are numbers: neither nan nor infinite."""
    return {name: value for name, value in values.items() if np.isfinite(value)}


def estimate(values: Mapping[str, float]) -> Estimate | None:
    """The mean of the finite values of items; None where there is none. The order of items plays no role."""
    kept = finite(values)
    kept_N = np.array(list(map(kept.__getitem__, sorted(kept))))
    if not len(kept_N):
        return None
    drawn_RN = np.random.default_rng(0).integers(0, len(kept_N), (RESAMPLES, len(kept_N)))
    means_R = kept_N[drawn_RN].mean(axis=1)
    edges = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(kept_N.mean()), float(edges[0]), float(edges[1]), len(kept_N))


def compare(first: Mapping[str, float], second: Mapping[str, float], lower_is_better: bool) -> Comparison | None:
    """Wins and losses over the items that both systems have; None where they share none."""
    theirs = finite(second)
    differences = {}
    for name, value in finite(first).items():
        if name in theirs:
            differences[name] = value - theirs[name]
    mean = estimate(differences)
    if mean is None:
        return None
    gains_N = np.array(list(differences.values())) * (-1 if lower_is_better else 1)
    wins = int((gains_N > 0).sum())
    losses = int((gains_N < 0).sum())
    return Comparison(wins, len(gains_N) - wins - losses, losses, mean)

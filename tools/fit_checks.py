"""Fits the two checks that weigh several signs, ``imaging.growth`` and ``imaging.footing``, on planted failures.

    python -m tools.fit_checks
Three minutes on one core; prints the weights that stand in those modules. Training scenes only: the held-out ones
measure the result (benchmarks/verifier.py).
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import minimize

from packshot.imaging import footing, growth
from tools.planted import Case, extended, floating, open_cases

DECAY = 0.003  # of the standardised weights


def growth_signs(case: Case) -> np.ndarray | None:
    """What ``growth`` looks at; None where it proposes nothing, which needs no weights."""
    proposal = growth.propose(case.picture_HW3, case.canvas.matte_HW)
    if proposal is None or proposal.grown_HW.sum() < growth.FEWEST:
        return None
    return growth.looks(proposal)


def footing_signs(case: Case) -> np.ndarray | None:
    return footing.signs(case.picture_HW3, case.canvas.matte_HW)


def fit(true: list[np.ndarray], planted: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """Weights and offset of a logistic regression, both kinds weighing the same, for signs as they are measured."""
    signs = np.array(true + planted)
    kind = np.array([-1.0] * len(true) + [1.0] * len(planted))
    share = np.where(kind > 0, 1 / len(planted), 1 / len(true))
    mean = signs.mean(axis=0)
    spread = signs.std(axis=0) + 1e-6
    scaled = (signs - mean) / spread

    def loss(weights: np.ndarray) -> float:
        margins = kind * (scaled @ weights[:-1] + weights[-1])
        return float((np.logaddexp(0, -margins) * share).sum() + DECAY * (weights[:-1] ** 2).sum())

    found = minimize(loss, np.zeros(signs.shape[1] + 1)).x
    return found[:-1] / spread, float(found[-1] - (found[:-1] * mean / spread).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renders", default="data/rendered/train")
    parser.add_argument("--every", type=int, default=3, help="take one scene of so many")
    args = parser.parse_args()
    kinds = {"growth": (growth_signs, extended), "footing": (footing_signs, floating)}
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {name: ([], []) for name in kinds}
    for number, case in open_cases(args.renders, args.every):
        for name, (signs, plant) in kinds.items():
            failure = plant(case, np.random.default_rng(number))
            for shown, into in zip((case, failure), found[name], strict=True):
                seen = signs(shown)
                if seen is not None:
                    into.append(seen)
    for name, (true, planted) in found.items():
        weights, offset = fit(true, planted)
        print(f"{name}: {len(true)} true, {len(planted)} planted")
        print("WEIGHTS =", tuple(round(float(weight), 4) for weight in weights))
        print("OFFSET =", round(offset, 4), flush=True)


if __name__ == "__main__":
    main()

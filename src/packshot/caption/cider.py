"""CIDEr-D of captions (Vedantam et al. 2015, arXiv 1411.5726, section 5 and equation 5), as a secondary figure.

Rarity is counted on the training captions, not on the captions at hand: a set of equal captions would score nothing
against itself. N-grams alone mislead on captions that share a form; the slot scores stand first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4  # n-grams
SIGMA = 6.0  # of the Gaussian penalty on a difference in length, in words


def _grams(text: str) -> list[Counter[tuple[str, ...]]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, LONGEST + 1)]


def cider(captions: Sequence[str], references: Sequence[str], corpus: Sequence[str]) -> float:
    """Mean CIDEr-D of captions with one reference each, from 0 to 10.

    corpus: the captions on which the rarity of every n-gram is counted.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for text in corpus:
        seen.update({gram for grams in _grams(text) for gram in grams})
    log_size = math.log(max(len(corpus), 2))

    def weigh(grams: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_size - math.log(max(1, seen[gram]))) for gram, count in grams.items()}

    def one(caption: str, reference: str) -> float:
        guess, truth = _grams(caption), _grams(reference)
        gap = sum(guess[0].values()) - sum(truth[0].values())
        penalty = math.exp(-(gap**2) / (2 * SIGMA**2))
        return 10 * penalty * sum(_cosine(weigh(g), weigh(t)) for g, t in zip(guess, truth, strict=True)) / LONGEST

    return sum(map(one, captions, references)) / len(captions)


def _cosine(guess: dict[tuple[str, ...], float], truth: dict[tuple[str, ...], float]) -> float:
    """Cosine of two weighted n-gram counts, where a repetition counts as often as the truth has it."""
    norm = math.sqrt(sum(v * v for v in guess.values())) * math.sqrt(sum(v * v for v in truth.values()))
    return sum(min(guess[g], truth[g]) * truth[g] for g in guess.keys() & truth.keys()) / norm if norm else 0.0

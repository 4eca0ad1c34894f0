"""CIDEr-D of captions (Vedantam et al. 2015, arXiv 1411.5726, section 5 and equation 5), as a secondary figure.

Rarity is counted on the training captions, not on the captions at hand: a set of equal captions would score nothing
against itself. N-grams alone mislead on captions that share a form; the slot scores stand first.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

LONGEST = 4  # n-grams
SIGMA = 6.0  # of the Gaussian penalty on a difference in length, in words
Gram = tuple[str, ...]


def count_grams(text: str) -> list[Counter[Gram]]:
    """The n-grams of a text with their counts, for each n from 1 to ``LONGEST``."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    counts: list[Counter[Gram]] = []
    for n in range(1, LONGEST + 1):
        counts.append(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)))
    return counts


class Rarity:
    """The weight of every n-gram: how rare it is among the captions of a corpus."""

    def __init__(self, corpus: Sequence[str]) -> None:
        self._captions: Counter[Gram] = Counter()  # in how many captions an n-gram occurs
        for text in corpus:
            for grams in count_grams(text):
                self._captions.update(grams.keys())
        self._log_size = math.log(max(len(corpus), 2))

    def weigh(self, grams: Counter[Gram]) -> dict[Gram, float]:
        """Counts times rarity (TF-IDF)."""
        weighted: dict[Gram, float] = {}
        for gram, count in grams.items():
            weighted[gram] = count * (self._log_size - math.log(max(1, self._captions[gram])))
        return weighted


def cider(captions: Sequence[str], references: Sequence[str], corpus: Sequence[str]) -> float:
    """Mean CIDEr-D of captions with one reference each, from 0 to 10.

    corpus: the captions on which the rarity of every n-gram is counted.
    """
    rarity = Rarity(corpus)
    return sum(map(partial(score_pair, rarity), captions, references)) / len(captions)


def score_pair(rarity: Rarity, caption: str, reference: str) -> float:
    """CIDEr-D of one caption."""
    guess = count_grams(caption)
    truth = count_grams(reference)
    gap = guess[0].total() - truth[0].total()
    penalty = math.exp(-(gap**2) / (2 * SIGMA**2))
    agreement = 0.0
    for n in range(LONGEST):
        agreement += clipped_cosine(rarity.weigh(guess[n]), rarity.weigh(truth[n]))
    return 10 * penalty * agreement / LONGEST


def clipped_cosine(guess: dict[Gram, float], truth: dict[Gram, float]) -> float:
    """Cosine of two weighted n-gram counts, in which a repetition counts at most as often as in the truth."""
    norm = math.hypot(*guess.values()) * math.hypot(*truth.values())
    if not norm:
        return 0.0
    agreement = 0.0
    for gram in guess.keys() & truth.keys():
        agreement += min(guess[gram], truth[gram]) * truth[gram]
    return agreement / norm

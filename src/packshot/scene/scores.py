"""How well one Scene matches another, slot by slot, and whether a caption gives the product away."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from scipy.optimize import linear_sum_assignment

from packshot.lists import column, pick, select
from packshot.scene.scene import SLOTS, Scene

_STOP = frozenset("a an the of on in is which with and by to from side".split())
# The opposite of a direction differs in one word of five; token F1 would call that nearly right.
_OPPOSITES = ({"left", "right"}, {"harsh", "soft"}, {"hard", "soft"}, {"warm", "cool"}, {"light", "dark"})

PRODUCT_NOUNS = frozenset(
    """bottle jar tube can box package packaging perfume fragrance cosmetic cosmetics cream lotion serum shampoo soap
    lipstick mascara makeup spray dispenser flask container shoe sneaker boot sandal bag handbag backpack purse wallet
    watch ring necklace bracelet earring jewelry jewellery camera phone smartphone headphone headphones earphones
    speaker laptop tablet keyboard mouse lamp chair sofa cup mug glass teapot kettle vase candle book bowl plate
    drink beverage wine beer coffee tea juice chocolate candy toy shirt dress hat cap glasses sunglasses product item
    toothbrush toothpaste razor medicine vitamin supplement detergent cleaner gift""".split()
)
# Things that a packshot may have *around* the product although each could be a product itself.
PROP_NOUNS = frozenset("box candle book vase bowl plate glass cup mug gift".split())


def content_words(text: str) -> list[str]:
    """The lower-case words of a text that carry meaning."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _STOP]


def token_f1(guess: str, truth: str) -> float:
    """F1 over content words, in [0, 1]; 0 when the two name opposites (left/right, soft/harsh)."""
    a = Counter(content_words(guess))
    b = Counter(content_words(truth))
    if not a or not b:
        return float(a == b)
    for pair in _OPPOSITES:
        in_a = pair & a.keys()
        in_b = pair & b.keys()
        if len(in_a) == 1 and len(in_b) == 1 and in_a != in_b:
            return 0.0
    return 2 * (a & b).total() / (a.total() + b.total())


def set_f1(guess: Sequence[str], truth: Sequence[str]) -> float:
    """Soft F1 between two sets of texts under the best one-to-one matching (Hungarian), in [0, 1]."""
    if not guess or not truth:
        return float(len(guess) == len(truth))
    agreeing = 0.0
    for text, real in paired(guess, truth):
        if text and real:
            agreeing += token_f1(text, real)
    return 2 * agreeing / (len(guess) + len(truth))


def paired(guess: Sequence[str], truth: Sequence[str]) -> list[tuple[str, str]]:
    """(guess, truth) pairs of two sets of texts that agree best together (Hungarian); "" where one has no partner."""
    similarity = np.zeros((len(guess), len(truth)))
    for i, text in enumerate(guess):
        for j, real in enumerate(truth):
            similarity[i, j] = token_f1(text, real)
    rows, columns = linear_sum_assignment(-similarity)
    pairs = list(zip(pick(guess, rows), pick(truth, columns), strict=True))
    pairs += [(text, "") for text in np.delete(np.asarray(guess, object), rows)]
    pairs += [("", text) for text in np.delete(np.asarray(truth, object), columns)]
    return pairs


@dataclass(frozen=True)
class SlotScore:
    """Exact and soft agreement of one slot, both in [0, 1]. Both absent counts as agreement."""

    exact: float
    soft: float


def score(guess: Scene, truth: Scene) -> dict[str, SlotScore]:
    """Agreement per slot. Surroundings and style compare as sets."""
    result = {}
    for slot in SLOTS:
        a = guess.slots()[slot]
        b = truth.slots()[slot]
        same = sorted(map(str.lower, a)) == sorted(map(str.lower, b))
        result[slot] = SlotScore(exact=float(same), soft=set_f1(a, b))
    return result


def mean_scores(scores: Iterable[dict[str, SlotScore]]) -> dict[str, dict[str, float]]:
    """Average over samples: ``{slot: {"exact": …, "soft": …}}`` plus the macro average under ``"mean"``.

    The macro average counts a slot by the weight of its row; style is reported but does not count.
    """
    rows = list(scores)
    if not rows:
        raise ValueError("no scores to average")
    table: dict[str, dict[str, float]] = defaultdict(dict)
    weights = [row.weight for row in SLOTS.values()]
    for kind in ("exact", "soft"):
        for name in SLOTS:
            table[name][kind] = float(np.mean(list(map(attrgetter(kind), column(rows, name)))))
        table["mean"][kind] = float(np.average(column(select(table, SLOTS).values(), kind), weights=weights))
    return dict(table)


def singular(word: str) -> str:
    """The product noun of which the word is the plural, else the word itself."""
    if word in PRODUCT_NOUNS:
        return word
    for plural, ending in (("ies", "y"), ("es", ""), ("s", "")):
        noun = word.removesuffix(plural) + ending
        if word.endswith(plural) and noun in PRODUCT_NOUNS:
            return noun
    return word


def product_words(caption: str | Scene, product: Iterable[str] = ()) -> list[str]:
    """Words of a caption that name a product, in order; empty when it names none.

    A prop (box, candle, book, …) is allowed inside the surroundings, nowhere else. ``product`` lists names that are
    refused everywhere, props included: the known category or title of this very product.
    """
    scene, loose = (caption, "") if isinstance(caption, Scene) else _parsed(caption)
    own = set(map(singular, re.findall(r"[a-z]+", " ".join(product).lower()))) - {"object"}
    hits = []
    for slot, texts in (*scene.slots().items(), ("leftover", (loose,))):
        allowed = PROP_NOUNS if slot == "surroundings" else frozenset()
        for text in texts:
            if slot == "style":
                text = re.sub(r"\bproduct (?=photo|shot|photography)", "", text, flags=re.IGNORECASE)
            for word in re.findall(r"[a-z]+", text.lower()):
                noun = singular(word)
                if noun in own or (noun in PRODUCT_NOUNS and noun not in allowed):
                    hits.append(word)
    return hits


def _parsed(caption: str) -> tuple[Scene, str]:
    parsed = Scene.parse(caption)
    return parsed.scene, " ".join(parsed.leftover)

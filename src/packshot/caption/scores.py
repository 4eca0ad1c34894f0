"""Scores of captions: does a captioner see the scene, and does it keep the product out of the caption?

Every figure stands next to two baselines. One constant caption shows what the habits of the vocabulary alone score; the
captions of other images show how much of a score comes from looking at the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypedDict

import numpy as np

from packshot.caption.models.adapter import Caption
from packshot.errors import PackshotError
from packshot.lists import column, pick
from packshot.scene import SLOTS, Scene, SceneSyntaxError
from packshot.scene.scene import COUNTED
from packshot.scene.scores import SlotScore, mean_scores, paired, product_words, score, token_f1

Confusion = dict[str, dict[str, dict[str, int]]]  # {slot: {truth: {caption: count}}}


class Mean(TypedDict):
    """Mean over the slots that count, with a 95 % bootstrap interval of the soft F1 over samples."""

    exact: float
    soft: float
    soft_interval_95: list[float]


class Leakage(TypedDict):
    """Captions of one category of product, and the share that names a product or this category."""

    captions: int
    rate: float


class Figures(TypedDict):
    """Figures of one set of captions; all but the count in [0, 1].

    parse_rate: captions in the strict grammar. leakage_rate: captions that name a product. truncated_rate: captions
    without an end. slots: exact and soft F1 of each slot. invented: see :func:`invented`.
    """

    captions: int
    parse_rate: float
    leakage_rate: float
    truncated_rate: float
    mean: Mean
    slots: dict[str, dict[str, float]]
    invented: dict[str, float]


class ConstantFigures(Figures):
    """Figures of one caption for all images."""

    caption: str


class Baselines(TypedDict):
    """Scores that a captioner has to exceed."""

    constant_caption: ConstantFigures
    shuffled_images: Figures


class Compared(TypedDict):
    """A captioner's figures and those of the baselines."""

    captioner: Figures
    baselines: Baselines


def soft_f1(guess: str, truth: Scene) -> float:
    """Mean soft F1 of the five slots of one caption, in [0, 1]."""
    return mean_soft(score(Scene.parse(guess).scene, truth))


def mean_soft(scores: dict[str, SlotScore]) -> float:
    """Mean soft F1 over the slots that count."""
    return float(np.mean([scores[slot].soft for slot in COUNTED]))


def without_errors(captions: Sequence[Caption]) -> tuple[list[int], dict[str, int]]:
    """Positions of the captions that exist, and the counts of the errors of the others, by their first words.

    An error is not scored as an empty caption: it is not evidence about what a model sees.

    Raises:
        PackshotError: fewer than two captions, which the baselines need.
    """
    kept: list[int] = []
    errors: list[str] = []
    for index, caption in enumerate(captions):
        if caption.error is None:
            kept.append(index)
        else:
            errors.append(caption.error)
    if len(kept) < 2:
        raise PackshotError(
            f"{len(kept)} of {len(captions)} pictures have a caption; the first error: {next(iter(errors), '')}",
            "Two captions or more can be scored.",
        )
    return kept, first_words(errors)


def first_words(errors: Iterable[str]) -> dict[str, int]:
    """How often each error occurs, by its words before the first colon."""
    return dict(Counter(error.split(":")[0] for error in errors))


def measure(captions: Sequence[Caption], truths: Sequence[Scene]) -> Figures:
    """:class:`Figures` of captions without errors (see :func:`without_errors`)."""
    texts = [caption.text for caption in captions]
    guesses = read_scenes(texts)
    scores = list(map(score, guesses, truths))
    slots = mean_scores(scores)
    mean = slots.pop("mean")
    interval = bootstrap_interval(list(map(mean_soft, scores)))
    return {
        "captions": len(captions),
        "parse_rate": float(np.mean(list(map(is_strict, texts)))),
        "leakage_rate": float(np.mean(list(map(bool, map(product_words, texts))))),
        "truncated_rate": float(np.mean([caption.truncated for caption in captions])),
        "mean": {"exact": mean["exact"], "soft": mean["soft"], "soft_interval_95": interval},
        "slots": slots,
        "invented": invented(guesses, truths),
    }


def invented(guesses: Sequence[Scene], truths: Sequence[Scene]) -> dict[str, float]:
    """Surroundings that do not exist: CHAIR of Rohrbach et al. 2018 (arXiv 1809.02156), section 2.

    ``things``: their share among the things named. ``captions``: the share of captions with one. A thing exists if it
    shares half of its words, as token F1 counts them, with a true one. Both are 0 if nothing was named.
    """
    things: list[bool] = []
    captions: list[bool] = []
    for guess, truth in zip(guesses, truths, strict=True):
        wrong = [best_match(thing, truth.surroundings) < 0.5 for thing in guess.surroundings]
        things += wrong
        captions.append(any(wrong))
    return {"things": float(np.mean(things)) if things else 0.0, "captions": float(np.mean(captions))}


def best_match(thing: str, real: Sequence[str]) -> float:
    """The highest token F1 of a thing with one of the real ones; 0 if there are none."""
    return max(map(partial(token_f1, thing), real), default=0.0)


def leakage(captions: Sequence[Caption], products: Sequence[str]) -> dict[str, Leakage]:
    """:class:`Leakage` of each category of product."""
    hits: dict[str, list[bool]] = {}
    for caption, product in zip(captions, products, strict=True):
        hits.setdefault(product, []).append(bool(product_words(caption.text, product=[product])))
    table: dict[str, Leakage] = {}
    for product, named in sorted(hits.items()):
        table[product] = {"captions": len(named), "rate": float(np.mean(named))}
    return table


def confusion(captions: Sequence[Caption], truths: Sequence[Scene]) -> Confusion:
    """Per slot, how often the captions gave each true value which name.

    "" stands for an absent value. Several values of a slot are paired so that they agree best.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for caption, truth in zip(captions, truths, strict=True):
        guess = Scene.parse(caption.text).scene
        for slot in COUNTED:
            for name, real in paired(guess.slots()[slot], truth.slots()[slot]) or [("", "")]:
                counts.setdefault((slot, real), Counter())[name] += 1
    tables: Confusion = {slot: {} for slot in COUNTED}
    for slot, real in sorted(counts):
        tables[slot][real] = dict(counts[slot, real].most_common())
    return tables


def read_scenes(texts: Iterable[str]) -> list[Scene]:
    """The scenes of any captions."""
    return [Scene.parse(text).scene for text in texts]


def is_strict(text: str) -> bool:
    """Whether a text is a caption in the strict grammar."""
    try:
        Scene.parse_strict(text)
    except SceneSyntaxError:
        return False
    return True


def bootstrap_interval(values: Sequence[float]) -> list[float]:
    """The 95 % interval of the mean, from 1000 draws."""
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(1000, len(values)))
    return np.percentile(draws.mean(axis=1), [2.5, 97.5]).tolist()


def constant_caption(texts: Sequence[str]) -> str:
    """The best caption that knows no image: the most frequent value of every slot in the training captions."""
    scenes = list(map(Scene.slots, read_scenes(texts)))
    usual: dict[str, tuple[str, ...]] = {}
    for slot in SLOTS:
        values = Counter(column(scenes, slot))
        usual[slot] = values.most_common(1)[0][0]
    return Scene.from_slots(usual).render()


def deal_to_others(count: int, seed: int) -> list[int]:
    """A permutation of ``range(count)`` that leaves nothing in its place (one random cycle)."""
    cycle = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, dtype=int)
    others[cycle] = np.roll(cycle, 1)
    return others.tolist()


def with_baselines(captions: Sequence[Caption], truths: Sequence[Scene], constant: str, seed: int) -> Compared:
    """:func:`measure` of the captions, of one constant caption, and of every image under another image's caption."""
    shuffled = pick(captions, deal_to_others(len(captions), seed))
    same = measure([Caption(constant, truncated=False)] * len(truths), truths)
    return {
        "captioner": measure(captions, truths),
        "baselines": {
            "constant_caption": {"caption": constant, **same},
            "shuffled_images": measure(shuffled, truths),
        },
    }

"""``task=evaluate``: does a captioner see the scene, and does it keep the product out of the caption?

Every figure stands beside two baselines. One constant caption shows what the vocabulary's habits alone are worth; the
model's own captions dealt to other images show how much of its score comes from looking.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.caption.models.adapter import Caption
from packshot.errors import PackshotError
from packshot.imaging.data_url import data_url
from packshot.runs.files import replacing_file
from packshot.scene import SLOTS, Scene, SceneSyntaxError
from packshot.scene.scores import SlotScore, mean_scores, paired, product_words, score, token_f1

THUMBNAIL = 320  # px, longer side

_COUNTED = [name for name, row in SLOTS.items() if row.weight]


def soft_f1(guess: str, truth: Scene) -> float:
    """Mean soft F1 of the five slots of one caption, in [0, 1]."""
    return _mean_soft(score(Scene.parse(guess).scene, truth))


def _mean_soft(scores: dict[str, SlotScore]) -> float:
    return float(np.mean([scores[slot].soft for slot in _COUNTED]))


def written(captions: Sequence[Caption]) -> tuple[list[int], dict[str, int]]:
    """Positions of the captions there are, and what stands in place of the others: errors by their first words.

    An error says nothing of what a model sees: scored as an empty caption it would.

    Raises:
        PackshotError: fewer than two captions, which the baselines need.
    """
    kept = [index for index, caption in enumerate(captions) if caption.error is None]
    if len(kept) < 2:
        example = next((caption.error for caption in captions if caption.error), "")
        raise PackshotError(
            f"{len(kept)} of {len(captions)} pictures have a caption; the first error: {example}",
            "Two captions or more can be scored.",
        )
    return kept, dict(Counter(caption.error.split(":")[0] for caption in captions if caption.error is not None))


def measure(captions: Sequence[Caption], truths: Sequence[Scene]) -> dict[str, Any]:
    """Figures of one set of captions, none of them an error (see :func:`written`); all but the count in [0, 1].

    ``parse_rate``: captions in the strict grammar. ``leakage_rate``: captions that name a product.
    ``truncated_rate``: captions without an end. ``slots``: exact and soft F1 per slot. ``mean``: over the five slots,
    with a 95 % bootstrap interval of the soft F1 over samples. ``invented``: see :func:`invented`.
    """
    guesses = [Scene.parse(caption.text).scene for caption in captions]
    scores = [score(guess, truth) for guess, truth in zip(guesses, truths, strict=True)]
    slots: dict[str, Any] = mean_scores(scores)
    mean = {**slots.pop("mean"), "soft_interval_95": _interval([_mean_soft(sample) for sample in scores])}
    return {
        "captions": len(captions),
        "parse_rate": float(np.mean([_is_strict(caption.text) for caption in captions])),
        "leakage_rate": float(np.mean([bool(product_words(caption.text)) for caption in captions])),
        "truncated_rate": float(np.mean([caption.truncated for caption in captions])),
        "mean": mean,
        "slots": slots,
        "invented": invented(guesses, truths),
    }


def invented(guesses: Sequence[Scene], truths: Sequence[Scene]) -> dict[str, float]:
    """Things said to stand around the product that do not: CHAIR of Rohrbach et al. 2018 (arXiv 1809.02156), section 2.

    ``things``: their share among the things named. ``captions``: the share of captions with one. A thing is there if
    it shares half of its words, as token F1 counts them, with a true one; 0 if nothing was named.
    """
    named = [
        [max((token_f1(thing, real) for real in truth.surroundings), default=0.0) < 0.5 for thing in guess.surroundings]
        for guess, truth in zip(guesses, truths, strict=True)
    ]
    things = [wrong for caption in named for wrong in caption]
    return {"things": float(np.mean(things)) if things else 0.0, "captions": float(np.mean([any(c) for c in named]))}


def leakage(captions: Sequence[Caption], products: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per category of product: how many captions there are, and the share that names a product or this category."""
    table: dict[str, list[bool]] = {}
    for caption, product in zip(captions, products, strict=True):
        table.setdefault(product, []).append(bool(product_words(caption.text, product=[product])))
    return {product: {"captions": len(hits), "rate": float(np.mean(hits))} for product, hits in sorted(table.items())}


def confusion(captions: Sequence[Caption], truths: Sequence[Scene]) -> dict[str, dict[str, dict[str, int]]]:
    """Per slot, how often each true value was called what: ``{slot: {truth: {caption: count}}}``.

    "" stands for an absent value. Several values of a slot are paired so that they agree best.
    """
    tables: dict[str, dict[str, Counter[str]]] = {slot: {} for slot in _COUNTED}
    for caption, truth in zip(captions, truths, strict=True):
        guess = Scene.parse(caption.text).scene
        for slot in _COUNTED:
            for said, real in paired(guess.slots()[slot], truth.slots()[slot]) or [("", "")]:
                tables[slot].setdefault(real, Counter())[said] += 1
    return {slot: {real: dict(found.most_common()) for real, found in sorted(t.items())} for slot, t in tables.items()}


def _is_strict(text: str) -> bool:
    try:
        Scene.parse_strict(text)
    except SceneSyntaxError:
        return False
    return True


def _interval(values: Sequence[float]) -> list[float]:
    draws = np.random.default_rng(0).choice(np.asarray(values), size=(1000, len(values)))
    return [float(bound) for bound in np.percentile(draws.mean(axis=1), [2.5, 97.5])]


def constant_caption(texts: Sequence[str]) -> str:
    """The best caption that knows no image: every slot's most frequent value among the training captions."""
    scenes = [Scene.parse(text).scene for text in texts]
    usual = {slot: Counter(scene.slots()[slot] for scene in scenes).most_common(1)[0][0] for slot in SLOTS}
    return Scene.from_slots(usual).render()


def deal_to_others(count: int, seed: int) -> list[int]:
    """A permutation of ``range(count)`` that leaves nothing in its place (one random cycle)."""
    cycle = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, dtype=int)
    others[cycle] = np.roll(cycle, 1)
    return others.tolist()


def with_baselines(captions: Sequence[Caption], truths: Sequence[Scene], constant: str, seed: int) -> dict[str, Any]:
    """:func:`measure` of the captions, of one constant caption, and of every image under another image's caption."""
    others = deal_to_others(len(captions), seed)
    return {
        "captioner": measure(captions, truths),
        "baselines": {
            "constant_caption": {
                "caption": constant,
                **measure([Caption(constant, truncated=False)] * len(truths), truths),
            },
            "shuffled_images": measure([captions[i] for i in others], truths),
        },
    }


_CONFUSION = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Confusions</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .6rem; text-align: left; vertical-align: top; }}
tr {{ border-top: 1px solid #ddd; }} .right {{ color: #176b1e; }} .wrong {{ color: #a00000; }}
</style>
<h1>What was called what</h1>
<p>{count} captions. Per slot: the truth, how often it was said right, and what was said instead.</p>
{tables}
</html>
"""


def confusion_page(file: Path, tables: dict[str, dict[str, dict[str, int]]], count: int) -> None:
    """Write :func:`confusion` as an HTML page, the most frequent truths first."""
    parts = []
    for slot, table in tables.items():
        rows = sorted(table.items(), key=lambda item: -sum(item[1].values()))
        cells = "".join(_confusion_row(real, said) for real, said in rows)
        parts.append(f"<h2>{slot}</h2><table><tr><th>truth<th>right<th>said instead</tr>{cells}</table>")
    with replacing_file(file) as temporary:
        temporary.write_text(_CONFUSION.format(count=count, tables="\n".join(parts)), encoding="utf-8")


def _confusion_row(real: str, said: dict[str, int]) -> str:
    total, right = sum(said.values()), said.get(real, 0)
    others = [f"{html.escape(name) or 'nothing'} {number}" for name, number in said.items() if name != real]
    more = f", and {len(others) - 6} others" if len(others) > 6 else ""
    return (
        f'<tr><td>{html.escape(real) or "nothing"}<td class="right">{right} of {total}'
        f'<td class="wrong">{", ".join(others[:6])}{more}</tr>'
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Worst captions</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ display: flex; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0; }}
img {{ width: 160px; height: 160px; object-fit: contain; background: #eee; flex: none; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .5rem; }} .wrong {{ color: #a00000; }}
</style>
<h1>The {count} worst captions</h1>
<p>Sorted by the mean soft F1 of the five slots. Slots below 1 are listed with their score.</p>
{rows}
</html>
"""


def worst_page(
    file: Path,
    images: Sequence[Image.Image],
    names: Sequence[str],
    captions: Sequence[Caption],
    truths: Sequence[Scene],
) -> None:
    """Write an HTML page, complete in itself, with the samples in the order given."""
    rows = "\n".join(map(_article, images, names, captions, truths))
    with replacing_file(file) as temporary:
        temporary.write_text(_PAGE.format(count=len(images), rows=rows), encoding="utf-8")


def _article(image: Image.Image, name: str, caption: Caption, truth: Scene) -> str:
    scores = score(Scene.parse(caption.text).scene, truth)
    wrong = ", ".join(f"{slot} {scores[slot].soft:.2f}" for slot in SLOTS if scores[slot].soft < 1) or "none"
    note = " (cut at the longest length)" if caption.truncated else ""
    return (
        f'<article><img alt="{html.escape(name)}" src="{data_url(image, THUMBNAIL)}"><dl>'
        f"<dt>{html.escape(name)}, soft F1 {soft_f1(caption.text, truth):.2f}</dt>"
        f'<dd class="wrong">{wrong}</dd>'
        f"<dt>Truth</dt><dd>{html.escape(truth.render())}</dd>"
        f"<dt>Caption{note}</dt><dd>{html.escape(caption.text)}</dd></dl></article>"
    )

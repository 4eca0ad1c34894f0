"""``task=evaluate``: does a captioner see the scene, and does it keep the product out of the caption?

Every figure stands beside two baselines. One constant caption shows what the vocabulary's habits alone are worth; the
model's own captions dealt to other images show how much of its score comes from looking.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.caption.adapter import Caption
from packshot.core.storage import replacing_file
from packshot.scene import SLOTS, Scene, SceneSyntaxError
from packshot.scene.scores import SlotScore, mean_scores, product_words, score

_COUNTED = [slot for slot in SLOTS if slot != "style"]


def soft_f1(guess: str, truth: Scene) -> float:
    """Mean soft F1 of the five slots of one caption, in [0, 1]."""
    return _mean_soft(score(Scene.parse(guess).scene, truth))


def _mean_soft(scores: dict[str, SlotScore]) -> float:
    return float(np.mean([scores[slot].soft for slot in _COUNTED]))


def measure(captions: Sequence[Caption], truths: Sequence[Scene]) -> dict[str, Any]:
    """Figures of one set of captions, all in [0, 1].

    ``parse_rate``: captions in the strict grammar. ``leakage_rate``: captions that name a product.
    ``truncated_rate``: captions without an end. ``slots``: exact and soft F1 per slot. ``mean``: over the five slots,
    with a 95 % bootstrap interval of the soft F1 over samples.
    """
    scores = [score(Scene.parse(c.text).scene, truth) for c, truth in zip(captions, truths, strict=True)]
    slots: dict[str, Any] = mean_scores(scores)
    mean = {**slots.pop("mean"), "soft_interval_95": _interval([_mean_soft(sample) for sample in scores])}
    return {
        "parse_rate": float(np.mean([_is_strict(caption.text) for caption in captions])),
        "leakage_rate": float(np.mean([bool(product_words(caption.text)) for caption in captions])),
        "truncated_rate": float(np.mean([caption.truncated for caption in captions])),
        "mean": mean,
        "slots": slots,
    }


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
    single = {slot: (usual[slot] or ("",))[0] for slot in ("surface", "background", "lighting", "mood")}
    return Scene(**single, surroundings=usual["surroundings"], style=usual["style"]).render()


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
        f'<article><img alt="{html.escape(name)}" src="{_data_url(image)}"><dl>'
        f"<dt>{html.escape(name)}, soft F1 {soft_f1(caption.text, truth):.2f}</dt>"
        f'<dd class="wrong">{wrong}</dd>'
        f"<dt>Truth</dt><dd>{html.escape(truth.render())}</dd>"
        f"<dt>Caption{note}</dt><dd>{html.escape(caption.text)}</dd></dl></article>"
    )


def _data_url(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((320, 320))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Pages of ``task=evaluate``: the confusions of every slot, and the worst captions."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import starmap
from pathlib import Path

from PIL.Image import Image

from packshot.caption.models.adapter import Caption
from packshot.caption.scores import Confusion, soft_f1
from packshot.imaging.data_url import data_url
from packshot.lists import without
from packshot.runs.files import replacing_file
from packshot.scene import SLOTS, Scene
from packshot.scene.scores import score

THUMBNAIL = 320  # px, longer side
MOST_OTHERS = 6  # wrong names that are listed for one truth

CONFUSION_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Confusions</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .15rem .6rem; text-align: left; vertical-align: top; }}
tr {{ border-top: 1px solid #ddd; }} .right {{ color: #176b1e; }} .wrong {{ color: #a00000; }}
</style>
<h1>What was called what</h1>
<p>{count} captions. Per slot: the truth, how often the captions were right, and what they named instead.</p>
{tables}
</html>
"""


def confusion_page(file: Path, tables: Confusion, count: int) -> None:
    """Write the confusions of ``count`` captions as an HTML page, the most frequent truths first."""
    parts = []
    for slot, table in tables.items():
        rows = sorted(table.items(), key=lambda item: -sum(item[1].values()))
        cells = "".join(starmap(confusion_row, rows))
        parts.append(f"<h2>{slot}</h2><table><tr><th>truth<th>right<th>named instead</tr>{cells}</table>")
    with replacing_file(file) as temporary:
        temporary.write_text(CONFUSION_PAGE.format(count=count, tables="\n".join(parts)), encoding="utf-8")


def confusion_row(real: str, names: dict[str, int]) -> str:
    """A table row for one truth. names: how often each name was given to it."""
    right = names.get(real, 0)
    others: list[str] = []
    for name, number in without(names, real).items():
        others.append(f"{html.escape(name) or 'nothing'} {number}")
    more = f", and {len(others) - MOST_OTHERS} others" if len(others) > MOST_OTHERS else ""
    return (
        f'<tr><td>{html.escape(real) or "nothing"}<td class="right">{right} of {sum(names.values())}'
        f'<td class="wrong">{", ".join(others[:MOST_OTHERS])}{more}</tr>'
    )


WORST_PAGE = """<!doctype html>
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


def worst_page(file: Path, articles: Sequence[str]) -> None:
    """Write an HTML page, complete in itself, with an :func:`article` for each sample."""
    with replacing_file(file) as temporary:
        temporary.write_text(WORST_PAGE.format(count=len(articles), rows="\n".join(articles)), encoding="utf-8")


def article(image: Image, name: str, caption: Caption, truth: Scene) -> str:
    """One sample of the page of the worst captions."""
    scores = score(Scene.parse(caption.text).scene, truth)
    wrong = [f"{slot} {scores[slot].soft:.2f}" for slot in SLOTS if scores[slot].soft < 1]
    note = " (cut at the longest length)" if caption.truncated else ""
    return (
        f'<article><img alt="{html.escape(name)}" src="{data_url(image, THUMBNAIL)}"><dl>'
        f"<dt>{html.escape(name)}, soft F1 {soft_f1(caption.text, truth):.2f}</dt>"
        f'<dd class="wrong">{", ".join(wrong) or "none"}</dd>'
        f"<dt>Truth</dt><dd>{html.escape(truth.render())}</dd>"
        f"<dt>Caption{note}</dt><dd>{html.escape(caption.text)}</dd></dl></article>"
    )

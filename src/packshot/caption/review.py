"""``task=review``: the doubtful captions of a dataset, as a page to look at and a table to edit."""

from __future__ import annotations

import csv
import html
from itertools import starmap
from pathlib import Path

from packshot.caption.data import CONFIDENCE_COLUMN, ERROR_COLUMN, PICTURES, shard_files
from packshot.caption.score_pages import THUMBNAIL
from packshot.config.schema import CaptionVLM
from packshot.dataset.rows import Rows, load_rows
from packshot.engine.processes import start
from packshot.engine.task import Sample
from packshot.errors import PackshotError
from packshot.imaging.data_url import data_url
from packshot.lists import without_none
from packshot.runs.files import replacing_file
from packshot.runs.folder import answer

COLUMNS = ("id", "doubt", "text", "corrected")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Captions to review</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ display: flex; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0; }}
img {{ width: 220px; height: 220px; object-fit: contain; background: #eee; flex: none; }}
code {{ overflow-wrap: anywhere; }} .doubt {{ color: #a00000; }}
</style>
<h1>{count} captions to review</h1>
<p>Failures first, then by the least certain slot. Write a better caption into the column <code>corrected</code> of
review.csv and leave the others empty; then: python caption_vlm.py task=correct data.input={folder}
data.corrections=review.csv</p>
{rows}
</html>
"""


def review(config: CaptionVLM) -> None:
    """Write the doubtful captions of ``data.input`` to ``review.csv`` and ``review.html``."""
    assert config.data.input is not None  # the task's row needs it
    shard_files("data.input", config.data.input)
    rows = load_rows("data.input", config.data.input, captions=False, pictures=PICTURES)
    session = start("caption_vlm", config, config.train)
    try:
        if session.run:
            samples = doubtful(rows, config.data.review)
            write_review(session.path, samples, rows.path)
            answer.info("%d captions to review in %s", len(samples), session.path / "review.html")
    finally:
        session.finish()


def doubtful(rows: Rows, count: int) -> list[tuple[Sample, str]]:
    """Up to ``count`` samples with the reason for doubt: failures, then by the least certain slot.

    Samples without a confidence (a person's words, a server's) are not doubted.
    """
    found: list[tuple[float, int, str]] = []
    for index in range(len(rows)):
        row = rows.read(index, ())
        certainty: dict[str, float] = without_none(row.get(CONFIDENCE_COLUMN) or {})
        if row.get(ERROR_COLUMN):
            found.append((-1.0, index, str(row[ERROR_COLUMN])))
        elif certainty:
            slot = min(certainty, key=certainty.__getitem__)
            found.append((certainty[slot], index, f"{slot} {certainty[slot]:.2f}"))
    return [(shown_row(rows, index), reason) for _, index, reason in sorted(found)[:count]]


def shown_row(rows: Rows, index: int) -> Sample:
    """A row with its picture; without one where that cannot be decoded, which is why captioning failed."""
    try:
        return rows.read(index, ("image",))
    except PackshotError:
        return {**rows.read(index, ()), "image": None}


def write_review(folder: Path, samples: list[tuple[Sample, str]], dataset: str) -> None:
    """``review.csv``, to be edited, and ``review.html``, to look at."""
    table_file = folder / "review.csv"
    # The byte order mark tells Excel that the file is UTF-8; without it, Excel shows é as Ã©.
    with replacing_file(table_file) as temporary, temporary.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row, reason in samples:
            table.writerow([row["id"], reason, row["text"] or "", ""])
    articles = "\n".join(starmap(article, samples))
    page = PAGE.format(count=len(samples), folder=html.escape(dataset), rows=articles)
    with replacing_file(folder / "review.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def article(row: Sample, reason: str) -> str:
    """One sample of the page."""
    source = data_url(row["image"], THUMBNAIL) if row["image"] is not None else ""
    return (
        f'<article><img alt="" src="{source}"><div>'
        f'<p class="doubt">{html.escape(reason)}</p>'
        f"<p>{html.escape(row['text'] or '')}</p><code>{html.escape(str(row['id']))}</code></div></article>"
    )

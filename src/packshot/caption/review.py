"""Captions for people to look at: the doubtful ones as a page and a table to edit, and the edited table taken back."""

from __future__ import annotations

import csv
import html
from pathlib import Path
from typing import Any

from packshot.caption.data import CONFIDENCE_COLUMN, ERROR_COLUMN
from packshot.caption.evaluate import THUMBNAIL
from packshot.dataset.rows import Rows
from packshot.dataset.text_files import EncodingError, csv_rows, decode_text
from packshot.errors import ConfigError
from packshot.imaging.data_url import data_url
from packshot.runs.files import replacing_file
from packshot.runs.folder import log
from packshot.scene import Scene
from packshot.scene.scores import product_words

COLUMNS = ("id", "doubt", "text", "corrected")
_PAGE = """<!doctype html>
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


def doubtful(rows: Rows, count: int) -> list[tuple[dict[str, Any], str]]:
    """Up to ``count`` samples with the reason for doubt: failures, then by the least certain slot.

    Samples without a confidence (a person's words, a server's) are not doubted.
    """
    found: list[tuple[float, int, str]] = []
    for index in range(len(rows)):
        row = rows.read(index, ())
        known = {slot: value for slot, value in (row.get(CONFIDENCE_COLUMN) or {}).items() if value is not None}
        if row.get(ERROR_COLUMN):
            found.append((-1.0, index, str(row[ERROR_COLUMN])))
        elif known:
            slot = min(known, key=lambda name: known[name])
            found.append((known[slot], index, f"{slot} {known[slot]:.2f}"))
    return [(rows.read(index, ("image",)), why) for _, index, why in sorted(found)[:count]]


def write_review(folder: Path, samples: list[tuple[dict[str, Any], str]], dataset: str) -> None:
    """``review.csv``, to be edited, and ``review.html``, to look at."""
    table_file = folder / "review.csv"
    # The byte order mark tells Excel that it is UTF-8; without one it shows é as Ã©.
    with replacing_file(table_file) as temporary, temporary.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows([row["id"], why, row["text"] or "", ""] for row, why in samples)
    articles = "\n".join(
        f'<article><img alt="" src="{data_url(row["image"], THUMBNAIL)}"><div><p class="doubt">{html.escape(why)}</p>'
        f"<p>{html.escape(row['text'] or '')}</p><code>{html.escape(str(row['id']))}</code></div></article>"
        for row, why in samples
    )
    page = _PAGE.format(count=len(samples), folder=html.escape(dataset), rows=articles)
    with replacing_file(folder / "review.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def read_corrections(path: Path, known: set[str]) -> dict[str, str]:
    """The corrections of an edited ``review.csv``, rendered in the caption grammar, by sample id.

    Raises:
        ConfigError: it is no such table, or a correction names no sample of the dataset, describes no scene or names
            a product. All of them are listed, and nothing is taken over.
    """
    try:
        text, encoding = decode_text(path.read_bytes())
        lines = csv_rows(text)
    except (OSError, EncodingError, csv.Error) as error:
        raise ConfigError(
            f"data.corrections={path} cannot be read ({error}).", "Save it as CSV UTF-8; task=review writes it."
        ) from error
    if encoding == "windows-1252":
        log.warning("data.corrections=%s is not UTF-8: read as %s; save it as CSV UTF-8", path, encoding)
    if not lines or not {"id", "corrected"} <= set(lines[0]):
        raise ConfigError(f"data.corrections={path} has no columns id and corrected.", "task=review writes it.")
    found, wrong = {}, []
    for number, line in enumerate(lines, 2):
        text = (line["corrected"] or "").strip()
        if not text:
            continue
        scene = Scene.parse(text).scene
        if line["id"] not in known:
            wrong.append(f"line {number}: the dataset has no sample {line['id']}")
        elif words := product_words(text):
            wrong.append(f"line {number} names the product ({', '.join(words)})")
        elif scene == Scene():
            wrong.append(f"line {number} describes no scene: {text}")
        found[line["id"]] = scene.render()
    if wrong:
        raise ConfigError(f"data.corrections={path}: {'; '.join(wrong)}.", "Mend these; nothing was taken over.")
    return found

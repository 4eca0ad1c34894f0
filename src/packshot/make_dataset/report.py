"""``report.html``: what a build let in and what it left out, to look at before training."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from packshot.dataset import buckets
from packshot.errors import PackshotError
from packshot.imaging.data_url import data_url
from packshot.imaging.decode import DecodeError, decode_image, flatten
from packshot.make_dataset.card import count
from packshot.make_dataset.curation import MEANING
from packshot.make_dataset.pictures import open_png
from packshot.make_dataset.sources import read_items
from packshot.pipeline import Report
from packshot.pipeline.step import Sample
from packshot.runs.files import replacing_file, resolve, sha256

SHOWN = 8  # pictures per reason, and of what was accepted
THUMBNAIL = 160  # px
BINS = 12
TOKENS = 77  # that SDXL's text encoders read, with start and end
BASE = (1024, 64)  # resolution and step of SDXL's buckets
TOKENIZER = "data/models/sdxl/tokenizer"  # CLIP's own vocabulary
# Columns of numbers that are shown as histograms where a set has them, with their titles.
MEASURES = {"mask_confidence": "Confidence of the mask", "repeats": "Repeats in an epoch", **MEANING}
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
figure {{ display: inline-block; width: {side}px; margin: 0 .5rem .5rem 0; vertical-align: top; }}
figure img {{ width: {side}px; height: {side}px; object-fit: contain; background: #eee; }}
figcaption {{ font-size: .75rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; margin: .5rem 0 1rem; }}
td, th {{ padding: .1rem .8rem .1rem 0; text-align: left; }}
td.bar div {{ background: #4477aa; height: .8rem; }} td.bar {{ width: 20rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def table(head: Sequence[str], rows: Iterable[tuple[object, int]]) -> str:
    """A table of names and counts, with a bar for each count."""
    known = list(rows)
    most = max((number for _, number in known), default=1) or 1
    lines = ["<table><tr>", *(f"<th>{html.escape(name)}</th>" for name in head), "</tr>"]
    for name, number in known:
        bar = f'<td class="bar"><div style="width:{100 * number / most:.1f}%"></div></td>'
        lines.append(f"<tr><td>{html.escape(str(name))}</td><td>{number}</td>{bar}</tr>")
    return "".join([*lines, "</table>"])


def histogram(values: Sequence[float], what: str) -> str:
    """Counts of values in ``BINS`` equal steps; one line for each different value where there are no more."""
    different = sorted(set(values))
    if len(different) <= BINS:
        counts = Counter(values)
        return table((what, "images"), [(f"{value:g}", counts[value]) for value in different])
    low, high = different[0], different[-1]
    width = (high - low) / BINS
    bins: Counter[int] = Counter(min(int((value - low) / width), BINS - 1) for value in values)
    lines = []
    for number in range(BINS):
        lines.append((f"{low + number * width:.4g} to {low + (number + 1) * width:.4g}", bins[number]))
    return table((what, "images"), lines)


def figure(image: str, caption: str) -> str:
    """A picture with a line of text; the text alone where there is no picture."""
    shown = f'<img alt="" src="{image}">' if image else ""
    return f"<figure>{shown}<figcaption>{html.escape(caption)}</figcaption></figure>"


def thumbnail(item: Sample | None) -> str:
    """The picture behind an item of the source as a data URL; "" where there is none that can be read."""
    if item is None or "place" not in item:
        return ""
    try:
        raw = next(read_items([item]))
        if raw.data is None:
            return ""
        return data_url(flatten(decode_image(raw.data, raw.name)), THUMBNAIL)
    except (DecodeError, PackshotError, OSError):
        return ""  # what could not be decoded has its reason under it


def shown_picture(stored: Sample) -> str:
    """A picture of the set as a data URL; a large JPEG is decoded at a fraction of its size."""
    picture = open_png(stored)
    picture.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
    return data_url(picture, THUMBNAIL)


def rejected_section(rejected: Sequence[Sample], items: Sequence[Sample]) -> str:
    """A grid of samples for each reason, those left out first."""
    by_name = {item.get("name"): item for item in items}
    sections = []
    for kept, title in ((False, "Left out"), (True, "Kept with a remark")):
        rows = [row for row in rejected if row["kept"] is kept]
        for reason, number in count(row["reason"] for row in rows).items():
            chosen = [row for row in rows if row["reason"] == reason][:SHOWN]
            grid = ""
            for row in chosen:
                grid += figure(thumbnail(by_name.get(row["source"])), f"{row['source']}: {row['measure']}")
            sections.append(f"<h2>{title}: {html.escape(reason)} ({number})</h2>{grid}")
    return "".join(sections) or "<p>Nothing was left out.</p>"


def bucket_table(sizes: Sequence[tuple[int, int]]) -> str:
    """How many pictures of (height, width) px fall into each bucket of SDXL."""
    shapes = buckets.shapes(*BASE)
    counts = Counter(buckets.nearest(size, shapes) for size in sizes)
    lines = [(f"{shapes[number][1]} x {shapes[number][0]}", images) for number, images in counts.most_common()]
    return table(("bucket at 1024 px, width x height", "images"), lines)


def token_counts(texts: Sequence[str]) -> list[int] | None:
    """Tokens of each caption with start and end; None where CLIP's vocabulary is not at hand."""
    folder = resolve(TOKENIZER)
    if not folder.is_dir():
        return None
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return [len(tokenizer(text).input_ids) for text in texts]


def caption_section(texts: Sequence[str | None]) -> str:
    """Lengths of the captions against what a text encoder reads, and how many there are."""
    captions = [text for text in texts if text]
    lines = [f"<p>{len(captions)} of {len(texts)} images have a caption.</p>"]
    lengths = token_counts(captions) if captions else []
    if lengths is None:
        lines.append(f"<p>Tokens are not counted: there is no {TOKENIZER}.</p>")
    elif lengths:
        longer = sum(length > TOKENS for length in lengths)
        lines.append(f"<p>{longer} captions are longer than {TOKENS} tokens: the rest of their words is not read.</p>")
        lines.append(histogram(lengths, "tokens, with start and end"))
    return "".join(lines)


def accepted_section(parts: Sequence[Path]) -> str:
    """Figures of the rows: first pictures, sizes, buckets, captions, licences, measures."""
    if not parts:
        return "<p>Nothing was accepted.</p>"
    names = ["width", "height", "text", "license", "source", *MEASURES]
    known = pq.read_schema(parts[0]).names
    rows = []
    for part in parts:
        rows += pq.read_table(part, columns=[name for name in names if name in known]).to_pylist()
    if not rows:
        return "<p>Nothing was accepted.</p>"
    with pq.ParquetFile(parts[0]) as first:
        shown = next(first.iter_batches(SHOWN, columns=["image", "text"])).to_pylist()
    pictures = [figure(shown_picture(row["image"]), row["text"] or "no caption") for row in shown]
    sections = [
        f"<h2>Accepted ({len(rows)})</h2>{''.join(pictures)}",
        "<h2>Licences</h2>" + table(("licence", "images"), count(row["license"] or "unknown" for row in rows).items()),
        "<h2>Sizes</h2>" + histogram([max(row["width"], row["height"]) for row in rows], "longer side, px"),
        "<h2>Buckets</h2>" + bucket_table([(row["height"], row["width"]) for row in rows]),
        "<h2>Captions</h2>" + caption_section([row["text"] for row in rows]),
    ]
    for name, title in MEASURES.items():
        if name in known:
            values = [round(row[name], 4) for row in rows if row[name] is not None]
            sections.append(f"<h2>{title}</h2>" + histogram(values, name))
    return "".join(sections)


def write_report(report: Report, kind: str, rejected: Sequence[Sample], items: Sequence[Sample]) -> Path:
    """``report.html``. A page of the same shards is left alone, and no picture is read for it again.

    kind: of the dataset. rejected: rows of ``rejected.parquet``. items: of the source.
    """
    page = report.folder / "report.html"
    files = [(entry.step, entry.shard, entry.sha256) for entry in chain.from_iterable(report.entries.values())]
    identity = f"<!-- made from shards {sha256(repr(files).encode())} -->"
    if page.exists() and identity in page.read_text(encoding="utf-8"):
        return page
    body = accepted_section(report.files("part")) + rejected_section(rejected, items)
    text = PAGE.format(title=f"Packshot {html.escape(kind)} set", side=THUMBNAIL, body=f"{identity}\n{body}")
    with replacing_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return page

"""report.html of evaluate.py: pictures side by side, tables, and what every number means."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from packshot.evaluate.samples import HARD_PASTE, FinishedRun, Json
from packshot.generate.report import picture, write_page


def write_report(folder: Path, report: Json, runs: list[FinishedRun]) -> None:
    """Write ``report.html`` from the content of ``report.json``."""
    write_page(folder / "report.html", "Packshot evaluation", page_body(folder, report, runs))


def page_body(folder: Path, report: Json, runs: list[FinishedRun]) -> Iterator[str]:
    """The page part by part, so that never more than one row of pictures is in memory."""
    yield f'<h1>Evaluation</h1><p class="note">{html.escape(" · ".join(report["runs"].values()))}</p>'
    if "preservation" in report:
        yield preservation_part(report["preservation"], report["definitions"])
    if "scene" in report:
        yield scene_part(report["scene"])
    yield "<h2>Pictures</h2>"
    for stem in runs[0].certificates:
        yield picture_row(folder, runs, stem)


def number(value: float | None) -> str:
    """A number for a cell; a dash where it is not defined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def row(tag: str, cells: Iterable[str]) -> str:
    """One row of a table. tag: the opening tag of its cells, with attributes."""
    name = tag.split()[0]
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{name}>" for cell in cells) + "</tr>"


def preservation_part(scored: Json, definitions: dict[str, str]) -> str:
    """The table of the product's measures, a column per system, with the definition of each measure."""
    systems = scored["systems"]
    parts = [
        "<h2>The product</h2>"
        f'<p class="note">Outlines by {html.escape(scored["segmenter"])}. Hard paste: the same layers through a '
        "binarised mask taken to the model's size and back by nearest neighbour, nothing un-mixed. Noise floor: the "
        "same measure where nothing was extended. Raw decode: the model's drawing before the product is laid over "
        "it.</p><table>",
        row("th", ["measure", *systems]),
    ]
    for key in definitions:
        parts.append(row('td class="n"', [key, *(number(values.get(key)) for values in systems.values())]))
    parts.append("</table><dl>")
    for key, text in definitions.items():
        parts.append(f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>")
    return "".join([*parts, "</dl>"])


def scene_part(scored: Json) -> str:
    """A table of slot scores per run, or why the run was not scored."""
    parts = [
        "<h2>The scene</h2>",
        '<p class="note">A captioner describes each picture and the grammar reads its caption; soft agreement '
        "(token F1) with the requested slots, 0 to 1. The baseline is the score of ignoring the request.</p>",
    ]
    for name, result in scored.items():
        if not result["measured"]:
            parts.append(f"<p><b>{html.escape(name)}</b>: not measured, {html.escape(result['reason'])}</p>")
            continue
        baseline = result["baseline"]["scores"]
        parts.append(f"<p><b>{html.escape(name)}</b>. Baseline: {html.escape(result['baseline']['kind'])}.</p><table>")
        parts.append(row("th", ["slot", "score", "baseline"]))
        for slot, value in result["scores"].items():
            parts.append(row('td class="n"', [slot, number(value), number(baseline.get(slot))]))
        parts.append("</table>")
    return "".join(parts)


def picture_row(folder: Path, runs: list[FinishedRun], stem: str) -> str:
    """The same picture of every run, and the hard paste."""
    files = [(run.name, run.path / f"{stem}.png") for run in runs]
    files.append((HARD_PASTE, folder / f"hard-paste-{stem}.png"))
    figures = ""
    for name, file in files:
        if file.exists():
            caption = html.escape(f"{stem} · {name}")
            figures += f"<figure>{picture(file, folder, name)}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="grid" style="margin-bottom:1rem">{figures}</div>'

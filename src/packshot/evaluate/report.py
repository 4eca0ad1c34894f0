"""report.html of evaluate.py: pictures side by side, tables, and what every number means."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packshot.evaluate.samples import RunFolder
from packshot.generate.report import picture, write_page


def write_report(folder: Path, report: dict[str, Any], runs: list[RunFolder]) -> None:
    """Write ``report.html`` from the content of ``report.json``."""
    write_page(folder / "report.html", "Packshot evaluation", _body(folder, report, runs))


def _body(folder: Path, report: dict[str, Any], runs: list[RunFolder]) -> Iterator[str]:
    yield f'<h1>Evaluation</h1><p class="note">{html.escape(" · ".join(map(str, report["runs"].values())))}</p>'
    if "preservation" in report:
        yield _preservation(report["preservation"], report["definitions"])
    if "scene" in report:
        yield _scene(report["scene"])
    yield from _pictures(folder, runs)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f'<td class="n">{html.escape(c)}</td>' for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{lines}</table>"


def _preservation(scored: dict[str, Any], definitions: dict[str, str]) -> str:
    systems = scored["systems"]
    rows = [[key, *(_number(values.get(key)) for values in systems.values())] for key in definitions]
    notes = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>" for key, text in definitions.items())
    return (
        "<h2>The product</h2>"
        f'<p class="note">Outlines by {html.escape(scored["segmenter"])}. Hard paste: the same layers through a '
        "binarised mask taken to the model's size and back by nearest neighbour, nothing un-mixed. Noise floor: the "
        "same measure where nothing was extended. Raw decode: the model's drawing before the product is laid over "
        "it.</p>"
        f"{_table(['measure', *systems], rows)}<dl>{notes}</dl>"
    )


def _scene(scored: dict[str, Any]) -> str:
    parts = [
        "<h2>The scene</h2>",
        '<p class="note">A captioner describes each picture and the grammar reads its caption; soft agreement '
        "(token F1) with the slots that were asked for, 0 to 1. The baseline is what ignoring the request gets.</p>",
    ]
    for name, result in scored.items():
        if not result["measured"]:
            parts.append(f"<p><b>{html.escape(name)}</b>: not measured, {html.escape(result['reason'])}</p>")
            continue
        scores, baseline = result["scores"], result["baseline"]["scores"]
        rows = [[slot, _number(value), _number(baseline.get(slot))] for slot, value in scores.items()]
        parts.append(f"<p><b>{html.escape(name)}</b>. Baseline: {html.escape(result['baseline']['kind'])}.</p>")
        parts.append(_table(["slot", "score", "baseline"], rows))
    return "".join(parts)


def _pictures(folder: Path, runs: list[RunFolder]) -> Iterator[str]:
    yield "<h2>Pictures</h2>"
    for stem in runs[0].certificates:
        files = [(run.name, run.path / f"{stem}.png") for run in runs]
        files.append(("hard paste", folder / f"hard-paste-{stem}.png"))
        figures = "".join(
            f"<figure>{picture(file, folder, name)}<figcaption>{html.escape(f'{stem} · {name}')}</figcaption></figure>"
            for name, file in files
            if file.exists()
        )
        yield f'<div class="grid" style="margin-bottom:1rem">{figures}</div>'

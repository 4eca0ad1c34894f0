"""report.html of anybody's pictures: tables with intervals, systems side by side, and the worst cases as pictures."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path

from packshot.evaluate.intervals import finite
from packshot.evaluate.items import Item, by_ids
from packshot.evaluate.report import number, row
from packshot.evaluate.results import System
from packshot.evaluate.samples import Json
from packshot.generate.report import picture, write_page
from packshot.lists import column

WORST = 4  # pictures shown for each measure
BETTER = {True: "lower", False: "higher", None: "–"}


def write_trial_report(folder: Path, report: Json, items: list[Item], systems: list[System]) -> None:
    """Write ``report.html`` from the content of ``report.json``."""
    write_page(folder / "report.html", "Packshot evaluation", page(folder, report, items, systems))


def page(folder: Path, report: Json, items: list[Item], systems: list[System]) -> Iterator[str]:
    """The page part by part."""
    yield f"<h1>Evaluation</h1><p class=note>{report['items']['count']} items. Means over items, with 95 % intervals "
    yield "from resampled items. A measure of the whole set has no interval.</p>"
    yield measures_table(report)
    for title, compared in report["comparisons"].items():
        yield comparison_table(title, compared)
    yield "<h2>What is measured</h2><dl>"
    for name, text in report["definitions"].items():
        yield f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
    yield "</dl>"
    for system in systems:
        yield f"<h2>Worst cases of {html.escape(system.name)}</h2>"
        yield from worst_cases(folder, report, by_ids(items), system)


def measures_table(report: Json) -> str:
    """A row per measure, a column per system."""
    systems = report["systems"]
    parts = ["<table>", row("th", ["measure", "better", *systems])]
    for name in report["definitions"]:
        cells = [cell(found, name) for found in systems.values()]
        parts.append(row('td class="n"', [name, BETTER[report["lower_is_better"][name]], *cells]))
    missing = map(len, column(systems.values(), "missing"))
    parts.append(row('td class="n"', ["items without a picture", "lower", *map(str, missing)]))
    return "".join([*parts, "</table>"])


def cell(found: Json, name: str) -> str:
    """A mean with its interval, or the number of a whole set."""
    if name in found["measures"]:
        known = found["measures"][name]
        return f"{number(known['mean'])} ({number(known['low'])} to {number(known['high'])})"
    return number(found["set"].get(name))


def comparison_table(title: str, compared: Json) -> str:
    """Wins, ties and losses of the first system, measure by measure."""
    parts = [f"<h2>{html.escape(title)}</h2><table>"]
    parts.append(row("th", ["measure", "wins", "ties", "losses", "mean difference (95 % interval)"]))
    for name, found in compared.items():
        known = found["difference"]
        difference = f"{number(known['mean'])} ({number(known['low'])} to {number(known['high'])})"
        parts.append(
            row('td class="n"', [name, str(found["wins"]), str(found["ties"]), str(found["losses"]), difference])
        )
    return "".join([*parts, "</table>"])


def worst_cases(folder: Path, report: Json, items: Mapping[str, Item], system: System) -> Iterator[str]:
    """For every measure of one picture, the items that are worst, each beside its photograph and, if known, truth."""
    for name, values in report["systems"][system.name]["by_item"].items():
        direction = report["lower_is_better"][name]
        if direction is None:
            continue
        figures = ""
        for item in worst(values, direction, WORST):
            figures += figure(folder, system.pictures[item][0].file, f"{item}: {number(values[item])}")
            for beside in ("photo", "truth"):
                if beside in items[item].pictures:
                    figures += figure(folder, items[item].pictures[beside], f"{item}: {beside}")
        if figures:
            yield f'<h3>{html.escape(name)}</h3><div class="grid sources">{figures}</div>'


def figure(folder: Path, file: Path, caption: str) -> str:
    """A picture with its caption."""
    text = html.escape(caption)
    return f"<figure>{picture(file, folder, caption)}<figcaption>{text}</figcaption></figure>"


def worst(by_item: Mapping[str, float], lower_is_better: bool, count: int) -> list[str]:
    """The items with the worst finite values, the worst first; ties by id. A value that all share shows nothing."""
    known = finite(by_item)
    if len(set(known.values())) < 2:
        return []
    sign = -1 if lower_is_better else 1
    return sorted(known, key=lambda name: (sign * known[name], name))[:count]

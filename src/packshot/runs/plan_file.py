"""What a plan found: ``plan.json`` in the run folder, and a table on standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping

from packshot.runs.files import replacing_file
from packshot.runs.folder import Run, answer


def write_plan(run: Run, figures: Mapping[str, object]) -> None:
    """Write ``plan.json``."""
    with replacing_file(run.path / "plan.json") as file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def answer_figures(figures: Mapping[str, object]) -> None:
    """One line for each figure that there is; what is None or empty has none."""
    for name, value in figures.items():
        if value is not None and value != "":
            answer.info("%-22s %s", name, as_figure(value))


def as_figure(value: object) -> str:
    """A figure as people read it: three decimals, or two digits where these would all be zero; a span as its ends."""
    if isinstance(value, tuple):
        return " to ".join(map(as_figure, value))
    if isinstance(value, float):
        return f"{value:.2g}" if 0 < abs(value) < 0.0005 else f"{value:,.3f}"
    return str(value)

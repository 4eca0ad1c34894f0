"""The model card of every exported adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packshot.base.places import find_place
from packshot.config.schema import TrainScript, script_of
from packshot.dataset.rows import Rows
from packshot.engine.checkpoints import exported_step, weights_line
from packshot.lists import in_words
from packshot.runs.folder import read_metrics
from packshot.runs.provenance import provenance_lines, write_provenance


def hub_head(name: str, base: str) -> list[str]:
    """What the hub reads of a card. It has no licence: the publisher chooses one, within those of base and data."""
    place = find_place("model.base", base)
    published = [f"base_model: {place.repository}"] if place.path is None else []
    tags = ("packshot", "stable-diffusion-xl", name.replace("_", "-"))
    return ["---", *published, "library_name: diffusers", "tags:", *map("- {}".format, tags), "---", ""]


def write_card(
    folder: Path,
    run: Path,
    rows: Rows,
    config: TrainScript,
    used_as: str,
    sets: Sequence[Mapping[str, object]] = (),
) -> dict[str, Any]:
    """Provenance, and a ``README.md`` with the pictures of the last validation until the exported step.

    used_as: see ``methods.base.Method``. sets: a record for each set that ``rows`` were read from. Returns what the
    adapter was made from: ``base``, ``step`` and the identity of the data.
    """
    data = write_provenance(folder, rows, config, sets)
    name = script_of(config).removeprefix("train_")
    step = exported_step(run, config.train)
    lines = [
        *hub_head(name, config.model.base),
        f"# {name} trained by Packshot",
        "",
        f"- base: `{config.model.base}`",
        *provenance_lines(data),
        weights_line(run, config.train),
        f"- samples per step and process: {config.train.batch_size * config.train.gradient_accumulation_steps}",
        *in_words(last_figures(run, step), "- {}: {:.4g}", "\n").splitlines(),
        "",
        f"    python generate.py product=photo.png {used_as}",
        "",
        "with the `model` keys of `config.yaml`, which holds the full configuration. Validation pictures: the held-out "
        "truth, then what the model draws around the held product, before the product's own pixels are laid over it.",
        "",
        *map("![sample](samples/{})".format, copy_samples(run / "samples", folder / "samples", step)),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    return {"base": config.model.base, "step": step, **data}


def copy_samples(samples: Path, target: Path, step: int) -> list[str]:
    """The sheet of the last validation until a step: single pictures would make a large folder of a small adapter."""
    validated = [int(path.name) for path in samples.glob("*") if path.name.isdigit()]
    for number in sorted(validated, reverse=True):
        sheet = samples / str(number) / "grid.png"
        if number <= step and sheet.exists():
            target.mkdir()
            shutil.copyfile(sheet, target / sheet.name)
            return [sheet.name]
    return []


def last_figures(run: Path, step: int) -> dict[str, float]:
    """The newest value, until a step, of each figure of a run."""
    figures: dict[str, float] = {}
    for line in read_metrics(run):
        if line["step"] <= step:
            figures.update(line)
    for name in ("step", "time"):
        figures.pop(name, None)
    return figures

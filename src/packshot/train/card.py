"""The model card beside every exported adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from packshot.config.compose import to_yaml
from packshot.config.schema import SCRIPTS
from packshot.data.dataset import Rows


def write_provenance(folder: Path, rows: Rows, config: Any) -> dict[str, Any]:
    """``config.yaml`` and ``data.json`` (the training data: manifest hash, licences); returns the latter."""
    (folder / "config.yaml").write_text(to_yaml(config))
    data = {"path": rows.path, "rows": len(rows), "sha256": rows.fingerprint(), "licenses": rows.licenses}
    (folder / "data.json").write_text(json.dumps(data, indent=2) + "\n")
    return data


def write_card(folder: Path, run: Path, rows: Rows, config: Any) -> None:
    """Provenance, and a ``README.md`` with the last validation pictures."""
    data = write_provenance(folder, rows, config)
    script = next(name for name, schema in SCRIPTS.items() if schema is type(config))
    pictures = _copy_samples(run / "samples", folder / "samples")
    figures = _last_figures(run / "metrics.jsonl")
    lines = [
        f"# {script.removeprefix('train_')} trained by Packshot",
        "",
        f"- base: `{config.model.base}`",
        f"- data: `{data['path']}`, {data['rows']} samples, manifest sha256 `{data['sha256']}`",
        f"- licences of the data: {', '.join(data['licenses']) or 'not recorded'}",
        f"- optimizer steps: {config.train.max_steps}, samples per step and process: "
        f"{config.train.batch_size * config.train.gradient_accumulation_steps}",
        *(f"- {name}: {value:.4g}" for name, value in figures.items()),
        "",
        "The full configuration is in `config.yaml`. Validation pictures (left: held-out truth, right: generated):",
        "",
        *(f"![sample](samples/{name})" for name in pictures),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _copy_samples(samples: Path, target: Path) -> list[str]:
    steps = sorted((path for path in samples.glob("*") if path.is_dir()), key=lambda path: int(path.name))
    if not steps:
        return []
    target.mkdir()
    files = sorted(steps[-1].glob("*.png"))
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def _last_figures(metrics: Path) -> dict[str, float]:
    """The newest value of each figure of a run."""
    figures: dict[str, float] = {}
    if metrics.exists():
        for line in metrics.read_text().splitlines():
            figures.update(json.loads(line))
    figures.pop("step", None)
    return figures

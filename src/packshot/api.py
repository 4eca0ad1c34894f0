"""Stages from Python: ``packshot.run("train_lora", {"train.max_steps": 200})`` instead of a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from os import PathLike
from pathlib import Path

from packshot.cli import STAGES, run_target
from packshot.config.compose import compose
from packshot.errors import ConfigError
from packshot.runs.folder import default_dir


def override_text(value: object) -> str:
    """A Python value in the grammar of overrides."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(list_item, value))}]"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (str, PathLike)):
        return str(value)
    return json.dumps(value)


def list_item(value: object) -> str:
    """A value inside a list; texts are quoted, so that commas and brackets in file names stay what they are."""
    text = override_text(value)
    if not isinstance(value, (str, PathLike)):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def run(stage: str, keys: Mapping[str, object] | None = None, **options: object) -> Path:
    """Run a stage in this process, as its script would, and return its run folder.

    stage: ``build_data``, ``train_lora``, ``generate``, …, as ``packshot --help`` lists them. keys: values of keys by
    their dotted names, such as ``{"data.train": "outputs/products"}``; ``options`` are keys and groups without a dot,
    such as ``model="sdxl"``.

    Raises:
        ConfigError: the stage or a key does not exist, a value is wrong, or the stage cannot work with it.
        PackshotError: the run failed.
    """
    if stage not in STAGES:
        raise ConfigError(f"There is no stage {stage!r}.", f"Known are {', '.join(STAGES)}.")
    values = {**(keys or {}), **options}
    values.setdefault("run.dir", default_dir(stage))
    overrides = [f"{key}={override_text(value)}" for key, value in values.items()]
    run_target(STAGES[stage].target, compose(stage, overrides))
    return Path(str(values["run.dir"]))

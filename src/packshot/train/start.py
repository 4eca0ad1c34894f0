"""What the three training scripts call: a run that imports what it has a use for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packshot.config.schema import ModelConfig, OptimizerKind, Quantization, TrainScript
from packshot.core.startup import collecting_nothing, without
from packshot.core.storage import resolve


def train(config: TrainScript) -> None:
    """Entry point of train_lora.py, train_ip_adapter.py and train_controlnet.py; see ``train.run``."""
    configs = part_configs(config.model)
    with without(unused(config, configs)):
        with without(unused_at_import(configs)), collecting_nothing():
            from packshot.models.load import import_libraries
            from packshot.train import run

            import_libraries()
        run.train(config)


def part_configs(model: ModelConfig) -> list[dict[str, Any]]:
    """The configurations of a local base's parts; none of one on the hub, or of a file that is broken."""
    return [found for file in sorted(resolve(model.base).glob("*/*config.json")) if (found := _read(file))]


def unused(config: TrainScript, configs: list[dict[str, Any]]) -> list[str]:
    """Packages that diffusers and peft import although this run needs nothing of them.

    bitsandbytes is for quantised bases and eight-bit optimizers, and drags torch's compiler along: a tenth of the
    start, 50 MiB. Of a base whose ``configs`` are not known it may be needed.
    """
    plain = config.model.quantization is Quantization.none and config.optim.kind is not OptimizerKind.adam8bit
    quantised = any("quantization_config" in found for found in configs)
    return ["bitsandbytes"] if plain and configs and not quantised else []


def unused_at_import(configs: list[dict[str, Any]]) -> list[str]:
    """Packages that diffusers and transformers need not find when they are imported; later they are there.

    They have scipy for schedulers with beta sigmas and for the losses of object detectors: a tenth of the start,
    50 MiB.
    """
    return ["scipy"] if configs and not any(found.get("use_beta_sigmas") for found in configs) else []


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # who loads the part will say so
        return {}
    return found if isinstance(found, dict) else {}

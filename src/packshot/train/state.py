"""Checkpoints: whole or absent, verified on load, the same weights after a kill as without one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packshot.core.errors import PackshotError
from packshot.core.run import log
from packshot.core.storage import replacing_folder


@dataclass
class Progress:
    """Where a run is. ``samples_seen`` is the cursor into the stream of samples."""

    step: int = 0
    samples_seen: int = 0


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class EMA:
    """Exponential moving average of the trained parameters, with the warm-up (1 + n)/(10 + n) of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.shadow = {name: p.detach().clone() for name, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """After every optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in trainable(module).items():
            self.shadow[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the average with the module's weights; calling it twice restores both."""
        for name, parameter in trainable(module).items():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(
    folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, scaler: Any, progress: Progress
) -> None:
    """Write ``<folder>/<step>``; it appears under this name only when every file is whole."""
    with replacing_folder(folder / str(progress.step)) as temporary:
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(module).items()}
        save_file(tensors, temporary / "trainable.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        if ema:
            save_file({n: t.cpu().contiguous() for n, t in ema.shadow.items()}, temporary / "ema.safetensors")
        state = {
            "progress": asdict(progress),
            "ema_updates": ema.updates if ema else 0,
            "scaler": scaler.state_dict() if scaler else None,
            "files": {file.name: _digest(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=2))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; called after a new one is safe."""
    for old in _checkpoints(folder)[keep:]:
        shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their digests; damaged ones are skipped with a message."""
    for path in _checkpoints(folder):
        try:
            state = json.loads((path / "state.json").read_text())
            damaged = [name for name, digest in state["files"].items() if _digest(path / name) != digest]
        except (OSError, ValueError, KeyError) as error:
            damaged = [f"state.json ({error})"]
        if not damaged:
            return path
        log.warning("checkpoint %s is damaged (%s) and is skipped", path, ", ".join(damaged))
    return None


def _copy_into(parameters: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    if set(parameters) != set(tensors):
        odd = sorted(set(parameters) ^ set(tensors))[:3]
        raise PackshotError(
            f"{path} holds other parameters than this configuration trains (for example {odd}).",
            "Resume with the configuration in the run's config.yaml.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, scaler: Any) -> Progress:
    """Restore everything :func:`save` wrote.

    Raises:
        PackshotError: the checkpoint belongs to another configuration.
    """
    state = json.loads((path / "state.json").read_text())
    _copy_into(trainable(module), load_file(path / "trainable.safetensors"), path)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    if ema:
        if not (path / "ema.safetensors").exists():
            raise PackshotError(f"{path} has no moving average.", "Resume with train.ema_decay=0 or start a new run.")
        _copy_into(ema.shadow, load_file(path / "ema.safetensors"), path)
        ema.updates = state["ema_updates"]
    if scaler:
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])

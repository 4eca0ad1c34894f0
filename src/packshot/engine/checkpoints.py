"""Checkpoints: whole or absent, verified on load, the same weights after a kill as without one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packshot.config.schema import KeepBest
from packshot.engine.compatibility import MadeWith, check
from packshot.engine.optimizers import load_optimizer
from packshot.errors import PackshotError
from packshot.runs.files import file_sha256, replacing_file, replacing_folder, writing
from packshot.runs.folder import log

VERSION = 2  # raise it when a checkpoint of before cannot be resumed from


@dataclass
class Progress:
    """Where a run is. ``samples_seen`` is the cursor into the stream of samples."""

    step: int = 0
    samples_seen: int = 0


# What is compared, the smaller the better; where the first is equal (no product of either grew), the next decides.
FIGURES: dict[KeepBest, tuple[str, ...]] = {
    KeepBest.validation_loss: ("validation_loss",),
    KeepBest.extension: ("extension", "validation_loss"),
}


@dataclass
class Best:
    """The best validation so far, kept in ``checkpoints/best.json`` beside the checkpoint it is about.

    figure: what is compared. step, value: of the best, None before there is one. figures: all that were compared.
    validated: the last step whose validation is accounted for; a run that was killed before that does it again.
    """

    figure: str
    step: int | None = None
    value: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    validated: int = 0

    def take(self, figures: dict[str, float], step: int, names: tuple[str, ...]) -> bool:
        """Account for a validation; whether it is the best. One that has no such figure, or NaN, never is."""
        self.validated = step
        compared = {name: figures.get(name, math.nan) for name in names}
        if not all(map(math.isfinite, compared.values())):
            return False
        if self.step is not None and tuple(compared.values()) >= tuple(self.figures.values()):
            return False
        self.step, self.value, self.figures = step, compared[self.figure], compared
        return True

    def write(self, folder: Path) -> None:
        """``<folder>/best.json``."""
        with replacing_file(folder / "best.json") as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_best(folder: Path) -> Best | None:
    """What ``<folder>/best.json`` says, or None when there is no such file or it is damaged."""
    try:
        return Best(**json.loads((folder / "best.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def open_best(folder: Path, keep: KeepBest, step: int) -> Best | None:
    """The best of a run that goes on at ``step``; None when none is to be kept.

    A best that was chosen by another figure, or whose checkpoint is gone or of a later step (the newest was damaged,
    and the run goes on from an older one), is forgotten with a message.
    """
    if keep is KeepBest.none:
        return None
    figure = FIGURES[keep][0]
    best = read_best(folder)
    if best is None:
        return Best(figure)
    known = best.step is None or (best.step <= step and is_whole(folder / str(best.step)))
    if best.figure == figure and known:
        best.validated = min(best.validated, step)
        return best
    log.warning("the best checkpoint so far (step %s by %s) is forgotten: it does not fit", best.step, best.figure)
    return Best(figure)


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


def save(
    folder: Path,
    made_with: MadeWith,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    scaler: Any,
    progress: Progress,
) -> None:
    """Write ``<folder>/<step>`` (see docs/checkpoints.md); it has this name only when every file is whole.

    Raises:
        PackshotError: it cannot be written. Older checkpoints stay as they are.
    """
    path = folder / str(progress.step)
    older = next((found.name for found in _checkpoints(folder) if found != path), None)
    way_out = f"Free some space; run.resume=true goes on from step {older or 0}, the newest checkpoint."
    with writing(f"checkpoint {path}", way_out), replacing_folder(path) as temporary:
        tensors = {name: p.detach().cpu().contiguous() for name, p in trainable(module).items()}
        save_file(tensors, temporary / "trainable.safetensors")
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        if ema:
            save_file({n: t.cpu().contiguous() for n, t in ema.shadow.items()}, temporary / "ema.safetensors")
        state = {
            "version": VERSION,
            "progress": asdict(progress),
            "made_with": asdict(made_with),
            "ema_updates": ema.updates if ema else 0,
            "scaler": scaler.state_dict() if scaler else None,
            "files": {file.name: file_sha256(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / "state.json").write_text(json.dumps(state, indent=2))


@contextmanager
def exporting(run: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``<run>/export`` when the block ends without an exception.

    Raises:
        PackshotError: it cannot be written; says how to export again.
    """
    safe = next(iter(_checkpoints(run / "checkpoints")), "no checkpoint")
    way_out = f"The weights are in {safe}. Free some space; run.resume=true then exports without training again."
    with writing(f"the export {run / 'export'}", way_out), replacing_folder(run / "export") as folder:
        yield folder
        for file in sorted(folder.rglob("*.safetensors")):
            sort_metadata(file)


def sort_metadata(file: Path) -> None:
    """Put a safetensors file's own entries in order: the library writes several in any, so that the same weights would
    have another hash each time. The format: 8 bytes of length, a JSON header padded by spaces, data."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        if len(metadata) < 2:
            return
        data = opened.read()
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def prune(folder: Path, keep: int, best: Best | None) -> None:
    """Delete all but the best and the newest ``keep`` checkpoints; called after a new one is safe."""
    for old in _checkpoints(folder)[keep:]:
        if best is None or old.name != str(best.step):
            shutil.rmtree(old)


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their digests; damaged ones are skipped with a message."""
    return next(filter(is_whole, _checkpoints(folder)), None)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's files match their digests; says so when they do not."""
    try:
        state = json.loads((path / "state.json").read_text())
        damaged = [name for name, digest in state["files"].items() if file_sha256(path / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        damaged = [f"state.json ({error})"]
    if damaged:
        log.warning("checkpoint %s is damaged (%s) and is skipped", path, ", ".join(damaged))
    return not damaged


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


def load(
    path: Path,
    made_with: MadeWith,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    scaler: Any,
) -> Progress:
    """Restore everything :func:`save` wrote, for a run of these settings.

    Raises:
        PackshotError: the checkpoint was made with other settings, or by another version.
    """
    state = json.loads((path / "state.json").read_text())
    if state.get("version") != VERSION:
        raise PackshotError(
            f"{path} was written by another version of packshot (format {state.get('version')}, this is {VERSION}).",
            "Finish the run with the version that started it, or start a new run with another run.dir.",
        )
    check(MadeWith(**state["made_with"]), made_with, state["progress"]["step"])
    load_weights(path, module, ema)
    load_optimizer(optimizer, torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    if ema:
        ema.updates = state["ema_updates"]
    if scaler:
        scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def load_weights(path: Path, module: nn.Module, ema: EMA | None) -> None:
    """Restore the trained weights of a checkpoint, and their average if one is kept.

    Raises:
        PackshotError: the checkpoint belongs to another configuration.
    """
    _copy_into(trainable(module), load_file(path / "trainable.safetensors"), path)
    if ema:
        if not (path / "ema.safetensors").exists():
            raise PackshotError(f"{path} has no moving average.", "Resume with train.ema_decay=0 or start a new run.")
        _copy_into(ema.shadow, load_file(path / "ema.safetensors"), path)

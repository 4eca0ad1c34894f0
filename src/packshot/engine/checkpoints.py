"""Checkpoints: whole or absent, verified on load, the same weights after a kill as without one."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from packshot.config.schema import KeepBest, TrainConfig
from packshot.engine.compatibility import MadeWith, check
from packshot.engine.optimizers import load_optimizer
from packshot.engine.sharding import shard_like, whole, whole_state
from packshot.errors import PackshotError
from packshot.lists import map_values
from packshot.runs.files import file_sha256, replacing_file, replacing_folder, writing
from packshot.runs.folder import log

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

VERSION = 2  # raise it when older checkpoints cannot be resumed from any more


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def count_trainable(module: nn.Module) -> int:
    """The number of trained values."""
    return sum(map(Tensor.numel, trainable(module).values()))


class EMA:
    """Exponential moving average of the trained parameters, with the warm-up (1 + n)/(10 + n) of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = map_values(lambda parameter: parameter.detach().clone(), trainable(module))

    def to(self, device: torch.device) -> None:
        """Move the average to where the module is."""
        self.shadow = map_values(lambda tensor: tensor.to(device), self.shadow)

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
            weights = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(weights)


@dataclass
class Progress:
    """How far a run is. ``samples_seen`` counts over all processes."""

    step: int = 0
    samples_seen: int = 0


@dataclass(frozen=True)
class Gathered:
    """What a checkpoint holds besides numbers: trained weights and their average by name, state of the optimizer."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]


@dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    module: the task itself, not the wrapper of data-parallel training. optimizer: the library's, not accelerate's
    wrapper. average: the moving average of the weights, if one is kept. scaler: of train.mixed_precision=fp16.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: EMA | None = None
    scaler: GradScaler | None = None
    progress: Progress = field(default_factory=Progress)

    def gather(self, keep: bool) -> Gathered:
        """The weights, their average and the optimizer's state as whole tensors.

        Where they are sharded, every process has to call it. keep: whether this process wants the result.
        """
        weights = map_values(lambda tensor: whole(tensor.detach(), keep), trainable(self.module))
        average = None
        if self.average:
            average = map_values(lambda tensor: whole(tensor, keep), self.average.shadow)
        return Gathered(weights, average, whole_state(self.optimizer.state_dict(), keep))

    def save(self, folder: Path, made_with: MadeWith, tensors: Gathered | None = None) -> None:
        """Write ``<folder>/<step>`` (see docs/checkpoints.md); it gets this name only when every file is whole.

        tensors: as :meth:`gather` returned them; it is called here if they are not given.

        Raises:
            PackshotError: it cannot be written. Older checkpoints stay as they are.
        """
        path = folder / str(self.progress.step)
        tensors = tensors or self.gather(keep=True)
        with (
            writing(f"checkpoint {path}", resume_hint(folder)),
            replacing_folder(path) as temporary,
            ThreadPoolExecutor() as pool,
        ):
            # Each file is hashed while the next one is written, the largest one while it is written itself.
            digests: dict[str, Future[str]] = {}

            def save_tensors(named: dict[str, Tensor], name: str) -> None:
                save_file(on_cpu(named), temporary / name)
                digests[name] = pool.submit(file_sha256, temporary / name)

            save_tensors(tensors.weights, "trainable.safetensors")
            if tensors.average is not None:
                save_tensors(tensors.average, "ema.safetensors")
            with HashedFile(temporary / "optimizer.pt") as file:
                torch.save(tensors.optimizer, file)
            state = {
                "version": VERSION,
                "progress": asdict(self.progress),
                "made_with": asdict(made_with),
                "ema_updates": self.average.updates if self.average else 0,
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "files": map_values(Future.result, digests) | {"optimizer.pt": file.digest()},
            }
            (temporary / "state.json").write_text(json.dumps(state, indent=2))

    def load(self, path: Path, made_with: MadeWith) -> None:
        """Restore everything that :meth:`save` wrote, for a run with these settings.

        Raises:
            PackshotError: the checkpoint was made with other settings, or by another version.
        """
        state = json.loads((path / "state.json").read_text())
        if state.get("version") != VERSION:
            raise PackshotError(
                f"{path} was written by another version of packshot (format {state.get('version')}, this is "
                f"{VERSION}).",
                "Finish the run with the version that started it, or start a new run with another run.dir.",
            )
        check(MadeWith(**state["made_with"]), made_with, state["progress"]["step"])
        self.load_weights(path)
        load_optimizer(self.optimizer, torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
        if self.average:
            self.average.updates = state["ema_updates"]
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])

    def load_weights(self, path: Path) -> None:
        """Restore the trained weights of a checkpoint, and their average if one is kept.

        Raises:
            PackshotError: the checkpoint belongs to another configuration.
        """
        copy_into(trainable(self.module), load_file(path / "trainable.safetensors"), path)
        if self.average:
            if not (path / "ema.safetensors").exists():
                raise PackshotError(
                    f"{path} has no moving average.", "Resume with train.ema_decay=0, or start a new run."
                )
            copy_into(self.average.shadow, load_file(path / "ema.safetensors"), path)


class HashedFile(FileIO):
    """A new file that takes the SHA-256 of what is written to it, from its start to its end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._hash = hashlib.sha256()

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of ``data``."""
        view = memoryview(data)
        while view:
            view = view[super().write(view) :]  # a raw file may take a part only
        self._hash.update(data)
        return memoryview(data).nbytes

    def digest(self) -> str:
        """The hex digest of everything written so far."""
        return self._hash.hexdigest()


def on_cpu(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Contiguous copies in main memory, as safetensors wants them. dtype: None keeps that of each tensor."""
    return map_values(lambda tensor: tensor.detach().to("cpu", dtype).contiguous(), tensors)


@torch.no_grad()
def copy_into(targets: dict[str, nn.Parameter] | dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors of a checkpoint at ``path`` into those of the same names.

    Raises:
        PackshotError: the names differ.
    """
    if set(targets) != set(tensors):
        mismatched = sorted(set(targets) ^ set(tensors))[:3]
        raise PackshotError(
            f"{path} holds other parameters than this configuration trains (for example {mismatched}).",
            "Resume with the configuration in the run's config.yaml.",
        )
    for name, target in targets.items():
        target.copy_(shard_like(tensors[name], target))


# ---- the folder of checkpoints ----


def in_folder(folder: Path) -> list[Path]:
    """All checkpoints of a folder, the newest first. Folders whose name is not a step are not checkpoints."""
    found = [path for path in folder.glob("*") if path.is_dir() and path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's files match their digests; logs a warning when they do not."""
    try:
        state = json.loads((path / "state.json").read_text())
        damaged = [name for name, digest in state["files"].items() if file_sha256(path / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        damaged = [f"state.json ({error})"]
    if damaged:
        log.warning("checkpoint %s is damaged: %s", path, ", ".join(damaged))
    return not damaged


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is not used, but can still be looked at."""
    target = path.with_name(f"{path.name}.damaged-{time.time_ns()}")  # the same step may be damaged more than once
    path.rename(target)
    log.warning("it is now called %s and is not used", target.name)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their digests. Damaged ones that are newer are set aside."""
    for path in in_folder(folder):
        if is_whole(path):
            return path
        set_aside(path)
    return None


def prune(folder: Path, keep: int, protected: set[int]) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of the ``protected`` steps."""
    for old in in_folder(folder)[keep:]:
        if int(old.name) not in protected:
            shutil.rmtree(old)


def resume_hint(folder: Path) -> str:
    """What a run that must stop now can be resumed from."""
    newest = next(iter(in_folder(folder)), None)
    if newest is None:
        return "There is no checkpoint yet: run.resume=true starts at step 0."
    return f"The older checkpoints are untouched: run.resume=true continues from step {newest.name}."


# ---- the best checkpoint ----

# The figures that are compared; smaller is better. Where the first is equal (no product grew in either), the next
# decides.
FIGURES: dict[KeepBest, tuple[str, ...]] = {
    KeepBest.validation_loss: ("validation_loss",),
    KeepBest.extension: ("extension", "validation_loss"),
}


@dataclass
class Best:
    """The best validation so far, stored in ``checkpoints/best.json``.

    figure: what is compared. step, value: of the best, None before there is one. figures: all that were compared.
    validated: the last step whose validation was considered; a run that was killed before that validates again.
    """

    figure: str
    step: int | None = None
    value: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    validated: int = 0

    def consider(self, figures: dict[str, float], step: int, keep: KeepBest) -> bool:
        """Account for a validation; returns whether it is the best. One without the figures, or with NaN, never is."""
        self.validated = step
        compared = {name: figures.get(name, math.nan) for name in FIGURES[keep]}
        if not all(map(math.isfinite, compared.values())):
            return False
        if self.step is not None and tuple(compared.values()) >= tuple(self.figures.values()):
            return False
        self.step = step
        self.value = compared[self.figure]
        self.figures = compared
        return True

    def write(self, folder: Path) -> None:
        """``<folder>/best.json``."""
        with replacing_file(folder / "best.json") as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_best(folder: Path) -> Best | None:
    """The record in ``<folder>/best.json``, or None when there is none or it is damaged."""
    try:
        return Best(**json.loads((folder / "best.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def open_best(folder: Path, keep: KeepBest, step: int) -> Best | None:
    """The best validation of a run that continues at ``step``; None when none is to be kept.

    A record is dropped with a warning when another figure chose it, or when its checkpoint is damaged, gone or later
    than ``step`` (the newest checkpoint was damaged, and the run continues from an older one).
    """
    if keep is KeepBest.none:
        return None
    figure = FIGURES[keep][0]
    best = read_best(folder)
    if best is None:
        return Best(figure)
    usable = best.step is None or (best.step <= step and is_whole(folder / str(best.step)))
    if best.figure == figure and usable:
        best.validated = min(best.validated, step)
        return best
    log.warning("the best checkpoint so far (step %s by %s) cannot be used and is forgotten", best.step, best.figure)
    return Best(figure)


# ---- exports ----


def exported_best(run: Path, train: TrainConfig) -> Best | None:
    """The best validation, if its checkpoint is the one that is exported."""
    best = read_best(run / "checkpoints") if train.export_best else None
    return best if best and best.step is not None else None


def exported_step(run: Path, train: TrainConfig) -> int:
    """The step whose weights are exported."""
    best = exported_best(run, train)
    return best.step if best and best.step is not None else train.max_steps


def weights_line(run: Path, train: TrainConfig) -> str:
    """A line of a model card: which step's weights were exported, and why."""
    best = exported_best(run, train)
    reason = f", the best checkpoint by {best.figure} ({best.value:.4g})" if best else ", the last"
    return f"- weights: step {exported_step(run, train)} of {train.max_steps}{reason}"


@contextmanager
def exporting(run: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``<run>/export`` when the block ends without an exception.

    Raises:
        PackshotError: it cannot be written; the message explains how to export again.
    """
    newest = next(iter(in_folder(run / "checkpoints")), "no checkpoint")
    hint = f"The weights are in {newest}; run.resume=true then exports without training again."
    with writing(f"the export {run / 'export'}", hint), replacing_folder(run / "export") as folder:
        yield folder
        for file in sorted(folder.rglob("*.safetensors")):
            sort_metadata(file)


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in any order: equal weights get equal hashes.

    The format: 8 bytes with the length of the header, a JSON header padded with spaces, the data.
    """
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        metadata = header.pop("__metadata__", {})
        if len(metadata) < 2:
            return
        data = opened.read()
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)

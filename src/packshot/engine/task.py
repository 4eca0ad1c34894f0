"""What the loop trains: a Task, its samples, and what a validation returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from packshot.config.schema import CaptionVLM, TrainScript
from packshot.engine.keyed_random import SampleKey

Sample = Any  # what a dataset gives for an index; only the task looks into it
Batch = dict[str, Any]  # tensors by name, and under "ids" the ids of the samples
TrainingConfig = TrainScript | CaptionVLM  # the loop reads run.seed, train, optim and data.num_workers


class Samples(Protocol):
    """A dataset: samples by index, and their ids. It may have ``groups``, the aspect-ratio bucket of each sample."""

    ids: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def fingerprint(self) -> str:
        """Identity of the samples and of their order."""
        ...


@dataclass(frozen=True)
class Validated:
    """What one validation found.

    figures: for the metrics line, the same on every process. pictures: files that a tracker shows, captions: a line
    for each. table: one row per picture; its file in the validation's folder is named under ``picture``.
    """

    figures: dict[str, float]
    pictures: list[Path] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)


class Task(nn.Module):
    """A network with a loss. ``forward(batch)`` returns the loss of every sample, shape (B,), fp32.

    Parameters with ``requires_grad`` are trained.
    """

    def collate(self, samples: list[Sample], keys: list[SampleKey]) -> Batch:
        """A batch of CPU tensors; every random draw comes from the sample's key."""
        raise NotImplementedError

    def validate(self, folder: Path, accelerator: Accelerator) -> Validated:
        """Figures, and pictures written under ``folder``. Called on every process, without gradients."""
        raise NotImplementedError

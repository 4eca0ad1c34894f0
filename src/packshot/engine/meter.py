"""Loss, speed and memory between two metrics lines."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


def peak_memory_gib() -> float:
    """Peak memory so far, GiB: the accelerator's if there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Meter:
    """Collects what a metrics line reports over the steps since the one before.

    samples: samples of one optimizer step, over all processes. ``steps`` counts optimizer steps; the loop raises it.
    """

    def __init__(self, samples: int, device: torch.device) -> None:
        self._samples = samples
        self._loss = torch.zeros((), device=device)
        self.steps = 0
        self._restart()

    def _restart(self) -> None:
        self._loss.zero_()
        self.steps = 0
        self._waited = 0.0
        self._started = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in this block counts as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block (checkpoints, validation) does not count as training."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began

    def add(self, loss: Tensor) -> None:
        """A micro-batch's share of the mean loss of its step, a scalar that stays on the device."""
        self._loss += loss

    def read(self, accelerator: Accelerator, learning_rate: float, grad_norm: Tensor) -> dict[str, float]:
        """The figures of the steps since the last call, with the loss of all processes; begins the next window."""
        reduced = accelerator.reduce(self._loss, "mean")
        assert isinstance(reduced, Tensor)
        loss = reduced.item() / self.steps
        elapsed = time.monotonic() - self._started  # after the device has finished, which item() waits for
        figures = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": float(grad_norm),
            "images_per_second": self.steps * self._samples / elapsed,
            "data_wait_share": self._waited / elapsed,
            "peak_memory_gib": peak_memory_gib(),
            "time": time.time(),
        }
        self._restart()
        return figures

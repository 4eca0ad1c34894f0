"""One run over one or many processes: who is here, where it writes, who tracks it."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from packshot.config.schema import TrainConfig
from packshot.errors import PackshotError
from packshot.runs.folder import Run, open_run
from packshot.runs.tracking import Tracker, open_tracker

T = TypeVar("T")


def make_accelerator(train: TrainConfig) -> Accelerator:
    """Accelerate, set up so that one optimizer step is one step of everything."""
    if train.deterministic:  # before the first kernel: cuBLAS reads its setting once
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return Accelerator(
        # without this, torchrun on a machine without accelerator starts processes that know nothing of each other
        cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision=train.mixed_precision.name,
        # a bare number would give way to the environment's ACCELERATE_GRADIENT_ACCUMULATION_STEPS
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.gradient_accumulation_steps),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=train.process_timeout)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else every gradient is there twice
        ],
    )


def from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """What ``make`` gives on the main process, on every process: what is read from disk may look different to each."""
    if accelerator.num_processes == 1:
        return make()
    found: list[Any] = [make() if accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Work that all processes do: when one of them is gone, the others stop with a sentence instead of a stack.

    Raises:
        PackshotError: the connection to another process broke, or it did not come within ``train.process_timeout``.
    """
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise; anything else of this type is passed on
        said = str(error).lower()
        if accelerator.num_processes == 1 or not any(sign in said for sign in _BROKEN):
            raise
        raise PackshotError(
            f"Process {accelerator.process_index} has lost another process of this run "
            f"({str(error).strip().splitlines()[0][:160]}).",
            "Look at the other processes' last lines; run.resume=true goes on from the newest checkpoint.",
        ) from error


_BROKEN = ("connection", "timed out", "timeout", "peer", "nccl", "gloo", "unhandled system error")


@dataclass
class Session:
    """One run over one or many processes. ``run`` and ``tracker`` exist on the main process only."""

    accelerator: Accelerator
    path: Path
    run: Run | None
    tracker: Tracker | None


def start(script: str, config: Any, train: TrainConfig, resumable: bool = True) -> Session:
    """Open the run on the main process and tell the others where it is; ``resumable`` as in :func:`open_run`.

    Raises:
        PackshotError: on every process, when the main one cannot open the folder.
    """
    accelerator = make_accelerator(train)
    message: list[Any] = [None, None]
    run = tracker = None
    if accelerator.is_main_process:
        try:
            run = open_run(script, config, resumable)
            tracker = open_tracker(run, config, job_type=script)
            message = [str(run.path), None]
        except PackshotError as error:
            message = [None, error]
    if accelerator.num_processes > 1:
        broadcast_object_list(message)
    if message[1] is not None:
        raise message[1]
    _refuse_unshared(Path(message[0]), accelerator)
    return Session(accelerator, Path(message[0]), run, tracker)


def _refuse_unshared(run: Path, accelerator: Accelerator) -> None:
    """Raises PackshotError, on every process, when one of them does not see the run folder of the main one."""
    if accelerator.num_processes == 1:
        return
    sign = run / from_main(accelerator, lambda: f".{uuid.uuid4().hex}.sign")
    if accelerator.is_main_process:
        sign.touch()
    accelerator.wait_for_everyone()
    blind = gather_object([] if sign.exists() else [f"{accelerator.process_index} (on {platform.node()})"])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sign.unlink()
    if blind:
        raise PackshotError(
            f"run.dir={run}: process {', '.join(blind)} sees another folder of that name, or none.",
            "Several machines need a run.dir, and a data.cache_dir, on storage that they share.",
        )

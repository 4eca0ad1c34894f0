"""The training loop: one, for every method and for the captioners.

What is trained is a Task, an ``nn.Module`` whose ``forward(batch)`` returns the loss of every sample. All random
draws happen in ``collate``, keyed by sample; the loop itself draws nothing.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from packshot.config.schema import KeepBest
from packshot.engine import checkpoints
from packshot.engine.batches import Order, RankBatches, Stream, batches
from packshot.engine.compatibility import made_with
from packshot.engine.keyed_random import SampleKey
from packshot.engine.memory import attention_kernel, refuse_unavailable, uncompiled
from packshot.engine.optimizers import (
    StepInBackward,
    build_optimizer,
    evaluation_mode,
    set_learning_rate,
    training_mode,
)
from packshot.engine.processes import Session, from_main
from packshot.errors import ConfigError, PackshotError
from packshot.runs.files import writing
from packshot.runs.folder import log
from packshot.runs.progress import progress as progress_bar

LEAST_SCALE = 2.0**-14  # of fp16's losses: at less their own gradients vanish, so it is not the scale that overflows


class Samples(Protocol):
    """A dataset: samples by index, and their ids."""

    ids: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...

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


class Task(Protocol):
    """What the loop needs besides ``nn.Module``."""

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Loss per sample, shape (B,), fp32."""
        ...

    def collate(self, samples: list[dict[str, Any]], keys: list[SampleKey]) -> dict[str, Any]:
        """A batch of CPU tensors; every random draw comes from the sample's key."""
        ...

    def validate(self, folder: Path, accelerator: Accelerator) -> Validated:
        """Figures, and pictures written under ``folder``. Called on every process, without gradients."""
        ...


def peak_memory_gib() -> float:
    """Peak memory so far, GiB: the accelerator's if there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a batch on the device; the rest as it is."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def validate(task: Any, ema: checkpoints.EMA | None, session: Session, step: int) -> dict[str, float]:
    """Figures of a validation on every process, with the averaged weights, which are put back whatever happens."""
    inner = session.accelerator.unwrap_model(task)
    training = inner.training
    inner.eval()
    if ema:
        ema.swap(inner)
    try:
        with torch.no_grad(), uncompiled():
            folder = session.path / "samples" / str(step)
            found: Validated = inner.validate(folder, session.accelerator)
    finally:
        if ema:
            ema.swap(inner)
        inner.train(training)
    figures = found.figures
    if session.run and session.tracker:
        session.run.metrics({"step": step, **figures})
        session.tracker.log(figures, step)
        session.tracker.images("samples", found.pictures, found.captions, step)
        session.tracker.table("validation", folder, found.table, step)
        log.info("validation at step %d: %s", step, "  ".join(f"{k} {v:.4f}" for k, v in figures.items()) or "pictures")
    return figures


def fit(task: Any, rows: Samples, config: Any, session: Session) -> checkpoints.EMA | None:
    """Train ``task`` (see :class:`Task`) to ``train.max_steps``, from the newest whole checkpoint if there is one.

    config: a script's config; its ``run.seed``, ``train``, ``optim`` and ``data.num_workers`` are read.
    Returns the moving average, if one is kept. It and ``task`` hold the last step's weights, or with
    ``train.export_best`` those of the best checkpoint.

    Raises:
        PackshotError: loss or gradient is not finite (with the sample ids), or a checkpoint does not fit.
    """
    train, seed = config.train, config.run.seed
    accelerator, run, tracker = session.accelerator, session.run, session.tracker
    refuse_unavailable(train, accelerator)
    kernel = attention_kernel(train.attention)
    named = checkpoints.trainable(task)
    parameters = list(named.values())
    optimizer = build_optimizer(named, config.optim, train.learning_rate)
    ema = checkpoints.EMA(task, train.ema_decay) if train.ema_decay else None
    task, optimizer = accelerator.prepare(task, optimizer)
    inner = accelerator.unwrap_model(task)
    if ema:
        ema.shadow = {name: tensor.to(accelerator.device) for name, tensor in ema.shadow.items()}
    folder = session.path / "checkpoints"
    newest = from_main(accelerator, lambda: checkpoints.newest_whole(folder))
    where = checkpoints.Progress()
    made = made_with(config, rows, accelerator.num_processes)
    if newest:
        where = checkpoints.load(newest, made, inner, optimizer.optimizer, ema, accelerator.scaler)
        log.info("resuming at step %d from %s", where.step, newest)
    if where.step > train.max_steps:
        raise ConfigError(
            f"train.max_steps={train.max_steps}, but {newest} is of step {where.step}.",
            f"Set it to {where.step} or more, or name a new run.dir.",
        )
    if run and run.resumed:  # not before: a config that does not fit leaves that of the run where it is
        with writing(f"{run.path}/config.yaml", "Make room, then resume."):
            run.write_config(config)
    best = from_main(accelerator, lambda: checkpoints.open_best(folder, train.keep_best, where.step))
    save = partial(checkpoints.save, folder, made, inner, optimizer.optimizer, ema, accelerator.scaler, where)
    in_backward = StepInBackward(optimizer.optimizer) if train.fused_backward else None
    accelerator.wait_for_everyone()

    world, accumulation = accelerator.num_processes, train.gradient_accumulation_steps
    groups = getattr(rows, "groups", None) or [0] * len(rows)
    size = train.batch_size * world * accumulation
    order = Order(groups, seed, size)
    mine = RankBatches(order, where.step, train.batch_size, accelerator.process_index, world)
    stream = batches(Stream(rows, rows.ids, seed), inner.collate, mine, config.data.num_workers)
    task.train()
    if train.validate_first and train.validation_steps and where.step == 0:
        validate(task, ema, session, 0)
    if best and best.validated < where.step and _due(train.validation_steps, where.step, train.max_steps):
        # killed between a checkpoint and its validation, which an unbroken run has: the best must not depend on that
        _compare(validate(task, ema, session, where.step), where.step, best, train.keep_best, session, save)
        if run:
            checkpoints.prune(folder, train.checkpoints_total_limit, best)

    window_loss, window_start, window_wait, window_steps = (
        torch.zeros((), device=accelerator.device),
        time.monotonic(),
        0.0,
        0,
    )
    with progress_bar("training", train.max_steps, where.step, show=run is not None) as advance, closing(stream):
        while where.step < train.max_steps:
            training_mode(optimizer.optimizer)
            rate = set_learning_rate(optimizer, where.step, train)
            taken: list[tuple[list[str], Tensor]] = []
            grad_norm: Any = torch.zeros(())
            for _ in range(accumulation):
                waiting = time.monotonic()
                batch = to_device(next(stream), accelerator.device)
                window_wait += time.monotonic() - waiting
                ids = batch.pop("ids")
                with accelerator.accumulate(task):
                    # Dropout inside the network draws from the global generator: tie it to the position. Its masks
                    # depend on the split of a step, so a run with dropout is not resumed on another one.
                    torch.manual_seed(hash((seed, where.samples_seen, accelerator.process_index)) & 0x7FFFFFFF)
                    with kernel():
                        loss = task(batch).mean()
                        accelerator.backward(loss)
                    taken.append((ids, torch.isfinite(loss.detach())))
                    if in_backward:
                        grad_norm = in_backward.norm()
                    elif accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(parameters, train.max_grad_norm or math.inf)
                    if accelerator.sync_gradients and not all_finite(taken, grad_norm, accelerator):
                        refuse_step(taken, where.step + 1, accelerator)
                    if not in_backward:
                        optimizer.step()
                        optimizer.zero_grad()
                window_loss += loss.detach() / accumulation
                where.samples_seen += train.batch_size * world
            if ema:
                ema.update(inner)
            where.step += 1
            window_steps += 1

            if where.step % train.log_steps == 0 or where.step == train.max_steps:
                reduced: Any = accelerator.reduce(window_loss, "mean")
                mean_loss = reduced.item() / window_steps
                elapsed = time.monotonic() - window_start
                figures = {
                    "loss": mean_loss,
                    "learning_rate": rate,
                    "grad_norm": float(grad_norm),
                    "images_per_second": window_steps * accumulation * train.batch_size * world / elapsed,
                    "data_wait_share": window_wait / elapsed,
                    "peak_memory_gib": peak_memory_gib(),
                    "time": time.time(),
                }
                if run and tracker:
                    run.metrics({"step": where.step, **figures})
                    tracker.log(figures, where.step)
                advance(window_steps, loss=mean_loss, lr=rate)
                window_loss.zero_()
                window_start, window_wait, window_steps = time.monotonic(), 0.0, 0
            saves = _due(train.checkpointing_steps, where.step, train.max_steps)
            validates = _due(train.validation_steps, where.step, train.max_steps)
            paused = time.monotonic()
            if saves or validates:
                evaluation_mode(optimizer.optimizer)
            if saves:
                if run:
                    save()
                accelerator.wait_for_everyone()
            if validates:
                figures = validate(task, ema, session, where.step)
                if best:
                    _compare(figures, where.step, best, train.keep_best, session, save)
            window_start += time.monotonic() - paused  # no time of training
            if run and (saves or validates):
                checkpoints.prune(folder, train.checkpoints_total_limit, best)
    if in_backward:
        in_backward.remove()
    accelerator.wait_for_everyone()
    if train.export_best and best and best.step is not None:
        checkpoints.load_weights(folder / str(best.step), inner, ema)
        log.info("the weights are those of step %d, the best by %s (%.4g)", best.step, best.figure, best.value)
    elif train.export_best:
        log.warning("no validation gave a finite %s: the weights are those of the last step", train.keep_best)
    return ema


def _due(every: int, step: int, last: int) -> bool:
    """Whether something that is done every so many steps (0: never) and after the last one is due."""
    return every > 0 and step > 0 and (step == last or step % every == 0)


def _compare(
    figures: dict[str, float],
    step: int,
    best: checkpoints.Best,
    keep: KeepBest,
    session: Session,
    save: Callable[[], None],
) -> None:
    """Account for a validation; if it is the best so far, see to it that its step has a checkpoint."""
    better = best.take(figures, step, checkpoints.FIGURES[keep])
    if session.run:
        folder = session.path / "checkpoints"
        if better and not (folder / str(step)).exists():
            save()
        best.write(folder)
    session.accelerator.wait_for_everyone()


def all_finite(taken: list[tuple[list[str], Tensor]], grad_norm: Tensor, accelerator: Accelerator) -> bool:
    """Whether all losses of a step (see :func:`refuse_step`) and its gradient are finite: the same on every process."""
    lost: Any = accelerator.reduce(torch.stack([~finite for _, finite in taken]).sum().float(), "sum")
    return bool(torch.isfinite(grad_norm)) and not lost.item()


def refuse_step(taken: list[tuple[list[str], Tensor]], step: int, accelerator: Accelerator) -> None:
    """Stop at a step that is not finite, which all processes have seen; unless fp16's scaler may skip it.

    fp16's gradients overflow now and then by design: its scaler skips such steps and halves its scale. Gradients that
    overflow at any scale, and a loss that is not finite, would be skipped to the end.
    taken: sample ids of every batch of the step, and whether its loss was finite.

    Raises:
        PackshotError: with the samples of the batches whose loss was not finite, else all of the step.
    """
    odd = gathered([name for ids, finite in taken if not finite for name in ids], accelerator)
    if not odd and accelerator.scaler and accelerator.scaler.get_scale() >= LEAST_SCALE:
        return
    names = odd or gathered([name for ids, _ in taken for name in ids], accelerator)
    raise PackshotError(
        f"the {'loss' if odd else 'gradient'} at step {step} is not finite; samples {', '.join(names)}.",
        "Lower train.learning_rate or look at these samples; the last checkpoint is untouched.",
    )


def gathered(items: list[str], accelerator: Accelerator) -> list[str]:
    """The items of all processes."""
    return gather_object(items) if accelerator.num_processes > 1 else items

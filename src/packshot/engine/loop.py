"""The training loop: one, for every method and for the captioners.

It trains a :class:`packshot.engine.task.Task`. All random draws happen in the task's ``collate``, keyed by sample; the
loop itself draws nothing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from packshot.config.schema import TrainConfig
from packshot.engine.batches import RankBatches, SampleOrder, Stream, batches
from packshot.engine.checkpoints import EMA, Best, TrainState, newest_whole, open_best, prune, trainable
from packshot.engine.compatibility import MadeWith, made_with
from packshot.engine.memory import refuse_unavailable, uncompiled
from packshot.engine.meter import Meter
from packshot.engine.optimizers import build_optimizer, evaluation_mode, set_learning_rate, training_mode
from packshot.engine.processes import Session, broadcast_from_main
from packshot.engine.sharding import gathered, make_whole, shard, whole
from packshot.engine.signals import SignalWatch
from packshot.engine.step import OptimizerStep
from packshot.engine.task import Batch, Samples, Task, TrainingConfig
from packshot.errors import ConfigError, Interrupted
from packshot.lists import in_words, map_values
from packshot.runs.cores import cores
from packshot.runs.files import writing
from packshot.runs.folder import log
from packshot.runs.progress import progress as progress_bar


def fit(task: Task, rows: Samples, config: TrainingConfig, session: Session) -> EMA | None:
    """Train ``task`` to ``train.max_steps``, from the newest whole checkpoint if there is one.

    Returns the moving average, if one is kept. It and ``task`` hold the weights of the last step, or with
    ``train.export_best`` those of the best checkpoint.

    Raises:
        PackshotError: a loss or gradient is not finite (with the sample ids), or a checkpoint does not fit.
    """
    train, accelerator = config.train, session.accelerator
    refuse_unavailable(train, accelerator)
    wrapped, optimizer, average = prepare(task, config, session)
    state = TrainState(task, optimizer.optimizer, average, accelerator.scaler)
    made = made_with(config, rows, accelerator.num_processes)
    resume(state, made, config, session)
    records = open_records(state, made, train, session)
    samples = train.batch_size * accelerator.num_processes * train.gradient_accumulation_steps
    stream = open_stream(task, rows, config, accelerator, state.progress.step)
    signals = SignalWatch()
    parameters = list(trainable(task).values())
    sharded = session.sharding is not None
    step = OptimizerStep(wrapped, optimizer, parameters, train, config.run.seed, accelerator, signals, sharded)
    wrapped.train()
    records.before_first_step()

    meter = Meter(samples, accelerator.device)
    bar = progress_bar("training", train.max_steps, state.progress.step, show=session.run is not None)
    with bar as advance, closing(stream), signals:
        while state.progress.step < train.max_steps:
            training_mode(state.optimizer)
            rate = set_learning_rate(state.optimizer, state.progress.step, train)
            grad_norm = step.take(stream, state.progress, meter)
            if average:
                average.update(task)
            meter.steps += 1
            if is_due(train.log_steps, state.progress.step, train.max_steps):
                steps = meter.steps
                figures = meter.read(accelerator, rate, grad_norm)
                session.report(state.progress.step, figures)
                advance(steps, loss=figures["loss"], lr=rate)
            with meter.paused():
                records.after_step()
                if step.save_requested:
                    records.on_signal(step.stop_requested)
    step.close()
    finish(task, average, records)
    return average


def prepare(task: Task, config: TrainingConfig, session: Session) -> tuple[nn.Module, AcceleratedOptimizer, EMA | None]:
    """The task as it is called, its optimizer, and the moving average if one is kept; sharded if that is asked for."""
    train, accelerator = config.train, session.accelerator
    if session.sharding:
        shard(task, session.sharding, accelerator.device, accelerator.num_processes)
    average = EMA(task, train.ema_decay) if train.ema_decay else None
    optimizer = build_optimizer(trainable(task), config.optim, train.learning_rate)
    if session.sharding:
        return task, accelerator.prepare(optimizer), average
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    if average:
        average.to(accelerator.device)
    return wrapped, optimizer, average


def open_stream(
    task: Task, rows: Samples, config: TrainingConfig, accelerator: Accelerator, step: int
) -> Generator[Batch]:
    """This process's micro-batches from an optimizer step on."""
    train, seed = config.train, config.run.seed
    samples = train.batch_size * accelerator.num_processes * train.gradient_accumulation_steps
    order = SampleOrder(getattr(rows, "groups", None) or [0] * len(rows), seed, samples)
    mine = RankBatches(order, step, train.batch_size, accelerator)
    return batches(Stream(rows, seed), task.collate, mine, loader_processes(config.data.num_workers))


def loader_processes(asked: int) -> int:
    """``data.num_workers``, but no more than this process has cores: the batches are the same, and more only wait."""
    if asked > cores():
        log.info("data.num_workers=%d: this process has %d cores, and starts as many loaders", asked, cores())
    return min(asked, cores())


def finish(task: Task, average: EMA | None, records: Records) -> None:
    """After the last step: the best weights if they are asked for, and whole ones if they were sharded."""
    session = records.session
    session.accelerator.wait_for_everyone()
    if records.train.export_best:
        records.load_best()
    if session.sharding:
        make_whole(task, keep=session.run is not None)
        if average:
            average.shadow = map_values(whole, average.shadow)


def is_due(every: int, step: int, last: int) -> bool:
    """Whether something that happens every so many steps (0: never) and after the last one is due."""
    return every > 0 and step > 0 and (step == last or step % every == 0)


def resume(state: TrainState, made: MadeWith, config: TrainingConfig, session: Session) -> None:
    """Load the newest whole checkpoint of the run into ``state``, if there is one; then write the run's config anew.

    Raises:
        PackshotError: it does not fit these settings, or is of a later step than ``train.max_steps``.
    """
    folder = session.path / "checkpoints"
    newest = broadcast_from_main(session.accelerator, lambda: newest_whole(folder))
    if newest is not None:
        state.load(newest, made)
        log.info("resuming at step %d from %s", state.progress.step, newest)
        if state.progress.step > config.train.max_steps:
            raise ConfigError(
                f"train.max_steps={config.train.max_steps}, but {newest} is of step {state.progress.step}.",
                f"Set it to {state.progress.step} or more, or name a new run.dir.",
            )
    elif session.run and session.run.resumed:
        log.warning("starting at step 0: %s has no whole checkpoint", folder)
    if session.run and session.run.resumed:  # only now: a config that does not fit must not replace the run's own
        with writing(f"{session.path}/config.yaml", "Then resume again."):
            session.run.write_config(config)


def validate(state: TrainState, session: Session) -> dict[str, float]:
    """The figures of a validation, the same on every process.

    It uses the averaged weights, if an average is kept, and puts the weights back, also after an error.
    """
    task, step = state.module, state.progress.step
    assert isinstance(task, Task)
    training = task.training
    folder = session.path / "samples" / str(step)
    task.eval()
    if state.average:
        state.average.swap(task)
    try:
        with torch.no_grad(), uncompiled(), gathered(task, session.sharding):
            found = task.validate(folder, session.accelerator)
    finally:
        if state.average:
            state.average.swap(task)
        task.train(training)
    session.report(step, found.figures, space="val")
    if session.run and session.tracker:
        session.tracker.images("val/samples", found.pictures, found.captions, step)
        session.tracker.table("val/pictures", folder, found.table, step)
        log.info("validation at step %d: %s", step, in_words(found.figures, "{} {:.4f}", "  ") or "pictures")
    return found.figures


@dataclass
class Records:
    """Checkpoints and validations of a run, at the steps that ask for them, and the best of them.

    folder: of the checkpoints. best: None when none is to be kept.
    """

    state: TrainState
    made: MadeWith
    best: Best | None
    folder: Path
    train: TrainConfig
    session: Session

    def before_first_step(self) -> None:
        """Validate the untrained weights if asked for, or make up for a validation that a kill has cost.

        An unbroken run validates right after the checkpoint. The choice of the best must not depend on the kill.
        """
        step = self.state.progress.step
        if self.train.validate_first and self.train.validation_steps and step == 0:
            validate(self.state, self.session)
        missed = self.best is not None and self.best.validated < step
        if missed and is_due(self.train.validation_steps, step, self.train.max_steps):
            self.validate()
            self.prune()

    def after_step(self) -> None:
        """Write a checkpoint and validate, where the step asks for it."""
        step, last = self.state.progress.step, self.train.max_steps
        saves = is_due(self.train.checkpointing_steps, step, last)
        validates = is_due(self.train.validation_steps, step, last)
        if not (saves or validates):
            return
        evaluation_mode(self.state.optimizer)
        if saves:
            self.save()
            self.session.accelerator.wait_for_everyone()
        if validates:
            self.validate()
        self.prune()

    def on_signal(self, stop: bool) -> None:
        """Write a checkpoint outside of the schedule, and stop the run if asked to.

        Schedule-free optimizers stay in training mode: changing it and back would cost the last bits of the weights.

        Raises:
            Interrupted: stop is set.
        """
        step = self.state.progress.step
        if self.is_missing():
            self.save()
        self.session.accelerator.wait_for_everyone()
        self.prune()
        if self.session.run:
            log.info("a signal asked for a checkpoint: %s", self.folder / str(step))
        if stop:
            raise Interrupted(
                f"SIGTERM stopped the run after step {step}.", "run.resume=true continues from its checkpoint."
            )

    def save(self) -> None:
        """Write the checkpoint of this step, on the main process; what is sharded is gathered by all of them."""
        if not self.session.sharding:
            if self.session.run:
                self.state.save(self.folder, self.made)
            return
        tensors = self.state.gather(keep=self.session.run is not None)
        if self.session.run:
            self.state.save(self.folder, self.made, tensors)

    def is_missing(self) -> bool:
        """Whether this step has no checkpoint, as the main process sees the disk."""
        path = self.folder / str(self.state.progress.step)
        return broadcast_from_main(self.session.accelerator, lambda: not path.exists())

    def validate(self) -> None:
        """Validate; if it is the best validation so far, make sure that its step has a checkpoint."""
        figures = validate(self.state, self.session)
        if self.best is None:
            return
        step = self.state.progress.step
        better = self.best.consider(figures, step, self.train.keep_best)
        if better and self.is_missing():
            self.save()
        if self.session.run:
            self.best.write(self.folder)
        self.session.accelerator.wait_for_everyone()

    def prune(self) -> None:
        """Delete old checkpoints, but neither the best nor the one just written."""
        if self.session.run:
            protected = {self.state.progress.step}
            if self.best and self.best.step is not None:
                protected.add(self.best.step)
            prune(self.folder, self.train.checkpoints_total_limit, protected)

    def load_best(self) -> None:
        """Give the module the weights of the best checkpoint; without one it keeps those of the last step."""
        best = self.best
        if best is None or best.step is None:
            log.warning("no validation gave a finite %s: the weights are those of the last step", self.train.keep_best)
            return
        self.state.load_weights(self.folder / str(best.step))
        log.info("the weights are those of step %d, the best by %s (%.4g)", best.step, best.figure, best.value)


def open_records(state: TrainState, made: MadeWith, train: TrainConfig, session: Session) -> Records:
    """The records of a run that continues at the step of ``state``. Every process waits here for the others."""
    folder = session.path / "checkpoints"
    best = broadcast_from_main(session.accelerator, lambda: open_best(folder, train.keep_best, state.progress.step))
    session.accelerator.wait_for_everyone()
    return Records(state, made, best, folder, train, session)

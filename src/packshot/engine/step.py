"""One optimizer step: its micro-batches, the clipped update, and the check that every loss and gradient is finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from packshot.config.schema import TrainConfig
from packshot.engine.checkpoints import Progress
from packshot.engine.memory import attention_kernel
from packshot.engine.meter import Meter
from packshot.engine.optimizers import StepInBackward
from packshot.engine.sharding import whole
from packshot.engine.signals import SignalWatch
from packshot.engine.task import Batch
from packshot.errors import PackshotError
from packshot.lists import map_values

# The smallest scale of fp16's losses at which an overflow is still put down to the scale: at less, the gradients
# themselves vanish.
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Taken:
    """A micro-batch that went through the network: its samples, and whether its loss was finite (a scalar)."""

    ids: list[str]
    finite: Tensor


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return map_values(lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value, batch)


@dataclass
class OptimizerStep:
    """Takes the optimizer steps of a run.

    task, optimizer: as ``accelerator.prepare`` returned them, but the task itself where it is sharded. parameters: the
    trained ones.
    """

    task: nn.Module
    optimizer: AcceleratedOptimizer
    parameters: list[nn.Parameter]
    train: TrainConfig
    seed: int
    accelerator: Accelerator
    signals: SignalWatch
    sharded: bool = False

    def __post_init__(self) -> None:
        self.save_requested = False  # by a signal to any process
        self.stop_requested = False
        self.kernel = attention_kernel(self.train.attention)
        self.in_backward = StepInBackward(self.optimizer.optimizer) if self.train.fused_backward else None

    def take(self, stream: Iterator[Batch], progress: Progress, meter: Meter) -> Tensor:
        """Take one step on the next micro-batches of the stream; returns the norm of its gradient, a scalar.

        Raises:
            PackshotError: a loss or the gradient is not finite.
        """
        taken: list[Taken] = []
        for _ in range(self.train.gradient_accumulation_steps):
            with meter.waiting():
                batch = to_device(next(stream), self.accelerator.device)
            ids = batch.pop("ids")
            loss = self.backward(batch, progress)
            taken.append(Taken(ids, torch.isfinite(loss)))
            meter.add(loss / self.train.gradient_accumulation_steps)
            progress.samples_seen += self.train.batch_size * self.accelerator.num_processes
        norm = self.gradient_norm()
        lost = torch.stack([~one.finite for one in taken]).sum()
        if self.agree(lost) or not torch.isfinite(norm):
            refuse_step(taken, progress.step + 1, self.accelerator)
        if not self.in_backward:
            self.optimizer.step()
            self.optimizer.zero_grad()
        progress.step += 1
        return norm

    def backward(self, batch: Batch, progress: Progress) -> Tensor:
        """Forward and backward pass of one micro-batch; returns its mean loss, a scalar."""
        with self.accelerator.accumulate(self.task):
            # Dropout inside the network draws from the global generator, so the generator is tied to the position. The
            # masks depend on the split of a step: a run with dropout is not resumed on another split.
            position = (self.seed, progress.samples_seen, self.accelerator.process_index)
            torch.manual_seed(hash(position) & 0x7FFFFFFF)
            # accelerate has wrapped the forward pass of a task that it prepared, and not that of a sharded one
            with self.kernel(), self.accelerator.autocast() if self.sharded else nullcontext():
                loss: Tensor = self.task(batch).mean()
                self.accelerator.backward(loss)
        return loss.detach()

    def gradient_norm(self) -> Tensor:
        """Clip the gradient to ``train.max_grad_norm`` and return its norm before that, a scalar."""
        if self.in_backward:
            return self.in_backward.norm()
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.train.max_grad_norm or math.inf)
        assert norm is not None
        return whole(norm).to(self.accelerator.device)

    def agree(self, lost: Tensor) -> bool:
        """Whether any process lost its loss in this step; also takes up the signals that any of them has received.

        All processes must stop at the same step, so they share their signals in one reduction.
        """
        signals = lost.new_tensor([self.signals.take_save(), self.signals.stop])
        seen = self.accelerator.reduce(torch.cat([lost[None], signals]).float(), "sum")
        assert isinstance(seen, Tensor)
        any_lost, save, stop = map(bool, seen.tolist())
        self.save_requested = save or stop
        self.stop_requested = stop
        return any_lost

    def close(self) -> None:
        """Remove the hooks of train.fused_backward."""
        if self.in_backward:
            self.in_backward.remove()


def refuse_step(taken: list[Taken], step: int, accelerator: Accelerator) -> None:
    """Stop at a step that is not finite, which all processes have seen, unless fp16's scaler may skip it.

    fp16's gradients overflow now and then by design: the scaler skips such steps and halves its scale. It would also
    skip a loss that is not finite, and gradients that overflow at any scale, until the end of the run.

    Raises:
        PackshotError: names the samples of the batches whose loss was not finite, else all samples of the step.
    """
    lost: list[str] = []
    every: list[str] = []
    for one in taken:
        every += one.ids
        if not one.finite:
            lost += one.ids
    names = gather_object(lost)
    what = "loss" if names else "gradient"
    if not names:
        if accelerator.scaler and accelerator.scaler.get_scale() >= SMALLEST_SCALE:
            return
        names = gather_object(every)
    raise PackshotError(
        f"the {what} at step {step} is not finite; samples {', '.join(names)}.",
        "Lower train.learning_rate or look at these samples; the last checkpoint is untouched.",
    )

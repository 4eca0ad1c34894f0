"""One stretch of training under a budget of CPU time: resume, EMA, cosine schedule, metrics, for every stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from packshot.engine.checkpoints import trainable
from packshot.errors import PackshotError
from packshot.lists import in_words, map_values

Loss = Callable[[torch.Generator], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Plan:
    """What a stage asks of its stretch.

    inputs: fingerprint of what the stage is trained on, apart from the renders (a UNet belongs to one VAE). A
        checkpoint of other inputs is refused.
    """

    stage: str
    folder: Path
    minutes: float
    learning_rate: float
    batch_size: int
    seed: int = 0
    inputs: str = ""
    warmup_steps: int = 100
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    checkpoint_seconds: float = 180.0
    log_seconds: float = 20.0


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bfloat16() -> bool:
    """Whether the device multiplies bfloat16 natively; on another CPU autocast is slower than single precision."""
    return DEVICE.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def fast_precision() -> torch.autocast:
    """Runs a network in bfloat16 where the hardware has it; compute losses outside, in single precision."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=has_fast_bfloat16())


@dataclass
class Progress:
    """Optimizer steps done and the seconds of work they took, over all resumed runs."""

    step: int = 0
    seconds: float = 0.0


def _work_seconds() -> float:
    """CPU time of this process per thread: wall time on an idle machine, and not thinned by a busy one's neighbours."""
    return time.process_time() / torch.get_num_threads()


def learning_rate_at(plan: Plan, progress: Progress) -> float:
    """Linear warm-up in steps, then a cosine to 2 % over the time budget."""
    done = min(progress.seconds / (60 * plan.minutes), 1.0)
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
    return plan.learning_rate * cosine * min(1.0, (progress.step + 1) / plan.warmup_steps)


def _restore(plan: Plan, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> Progress:
    path = plan.folder / "checkpoint.pt"
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location=DEVICE, weights_only=True)
    if state["inputs"] != plan.inputs:
        raise PackshotError(
            f"{path} was trained with other inputs ({state['inputs']}) than the present ones ({plan.inputs})",
            hint=f"remove {plan.folder} to start this stage again",
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    return Progress(state["step"], state["seconds"])


def _save(
    plan: Plan, progress: Progress, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
    path = plan.folder / "checkpoint.pt"
    partial = path.with_suffix(".partial")
    torch.save({**state, "step": progress.step, "seconds": progress.seconds, "inputs": plan.inputs}, partial)
    partial.replace(path)


class Window:
    """Means of what the steps report, from one line of ``metrics.jsonl`` to the next."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan = plan
        self._open(progress)

    def _open(self, progress: Progress) -> None:
        self._step = progress.step
        self._seconds = progress.seconds
        self._sums: dict[str, float] = {}

    def add(self, values: dict[str, float]) -> None:
        """What one step reports."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def is_full(self, progress: Progress) -> bool:
        """Whether a line is due."""
        return progress.seconds - self._seconds >= self._plan.log_seconds

    def close(self, progress: Progress, learning_rate: float) -> None:
        """Write the line and begin the next window."""
        steps = progress.step - self._step
        values = map_values(lambda total: total / steps, self._sums)
        values["learning_rate"] = learning_rate
        values["images_per_second"] = steps * self._plan.batch_size / (progress.seconds - self._seconds)
        _log(self._plan, progress, values)
        self._open(progress)


def _log(plan: Plan, progress: Progress, values: dict[str, float]) -> None:
    line = {"step": progress.step, "seconds": round(progress.seconds, 1)}
    for key, value in values.items():
        line[key] = round(value, 6)
    with (plan.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    left = max(0.0, plan.minutes - progress.seconds / 60)
    numbers = in_words(values, "{} {:.4g}", "  ")
    print(f"{plan.stage}  step {progress.step}  {numbers}  {left:.1f} min left", flush=True)


def run_stretch(
    plan: Plan, model: torch.nn.Module, loss_of: Loss, preview: Callable[[Progress], None] | None = None
) -> Progress:
    """Train ``model`` until the budget is spent; on return it holds the EMA weights, in eval mode.

    loss_of: draws a batch with the generator it is given (seeded by (seed, step), so a resumed run draws what the
        unbroken one would have) and returns the loss and further values to log.
    preview: called with the EMA weights in place at every checkpoint and at the end.

    Raises:
        PackshotError: the loss stopped being finite, or the checkpoint belongs to other inputs.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    parameters = list(trainable(model).values())
    decay = plan.weight_decay
    optimizer = torch.optim.AdamW(parameters, plan.learning_rate, betas=(0.9, 0.99), weight_decay=decay, foreach=True)
    ema = EMAModel(parameters, decay=plan.ema_decay, foreach=True)
    progress = _restore(plan, model, optimizer, ema)
    saved_at = progress.seconds
    window = Window(plan, progress)
    while progress.seconds < 60 * plan.minutes:
        began = _work_seconds()
        norm, values = _step(plan, progress, model, loss_of, optimizer, ema, parameters)
        progress.step += 1
        progress.seconds += _work_seconds() - began
        window.add({**values, "grad_norm": norm})
        finished = progress.seconds >= 60 * plan.minutes
        if finished or window.is_full(progress):
            window.close(progress, optimizer.param_groups[0]["lr"])
        if finished or progress.seconds - saved_at >= plan.checkpoint_seconds:
            saved_at = progress.seconds
            _save(plan, progress, model, optimizer, ema)
            if preview and not finished:
                _with_ema(model, ema, parameters, lambda: preview(progress))
    if progress.step:
        ema.copy_to(parameters)
    model.eval()
    if preview:
        preview(progress)
    return progress


def _step(
    plan: Plan,
    progress: Progress,
    model: torch.nn.Module,
    loss_of: Loss,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    parameters: Iterable[torch.nn.Parameter],
) -> tuple[float, dict[str, float]]:
    model.train()
    key = plan.seed * 1_000_003 + progress.step
    torch.manual_seed(key)  # for dropout inside the models, which takes no generator
    loss, values = loss_of(torch.Generator().manual_seed(key))
    if not torch.isfinite(loss):
        raise PackshotError(f"{plan.stage}: the loss is {loss.item()} at step {progress.step}", hint="lower the rate")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(plan, progress)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    ema.step(parameters)
    return float(norm), {"loss": loss.item(), **values}


def _with_ema(model: torch.nn.Module, ema: EMAModel, parameters: list, action: Callable[[], None]) -> None:
    ema.store(parameters)
    ema.copy_to(parameters)
    model.eval()
    try:
        action()
    finally:
        ema.restore(parameters)

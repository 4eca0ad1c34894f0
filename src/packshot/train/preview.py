"""Before a run: what it will cost (``mode=plan``) and what the model will see (``mode=check``)."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from packshot.core.errors import PackshotError
from packshot.core.run import log
from packshot.diffusion.keyed import SampleKey
from packshot.train.loop import peak_memory_gib
from packshot.train.optimizer import learning_rate
from packshot.train.task import batch_to, framed

# AdamW keeps two moments per trained parameter, both fp32; a gradient is the third copy.
ADAMW_BYTES, GRADIENT_BYTES = 8, 4


def enable_checkpointing(method: torch.nn.Module) -> None:
    """Recompute activations in the backward pass of every network that can (non-reentrant, as accelerate needs)."""
    for module in method.children():
        enable = getattr(module, "enable_gradient_checkpointing", None)
        if enable is not None:
            enable()
            # diffusers checkpoints only modules in training mode; SDXL's UNet has no dropout to wake up by that
            module.train()


def plan(session: Any, task: Any, rows: Any, validation: Any, config: Any) -> None:
    """Log and write ``plan.json``: parameters and the memory they, their gradients and the optimizer need."""
    parameters = list(task.parameters())
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    count = sum(p.numel() for p in trained)
    gib = {
        "frozen_weights_gib": sum(p.numel() * p.element_size() for p in frozen) / 2**30,
        "trained_weights_gib": sum(p.numel() * p.element_size() for p in trained) / 2**30,
        "gradients_gib": count * GRADIENT_BYTES / 2**30,
        "optimizer_gib": count * ADAMW_BYTES / 2**30,
    }
    samples = config.train.batch_size * config.train.gradient_accumulation_steps * session.accelerator.num_processes
    result = {
        "trained_parameters": count,
        "frozen_parameters": sum(p.numel() for p in frozen),
        **gib,
        "samples_per_step": samples,
        "epochs": config.train.max_steps * samples / len(rows),
    }
    if session.run:
        (session.path / "plan.json").write_text(json.dumps(result, indent=2) + "\n")
        for name, value in result.items():
            log.info("%-22s %s", name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")


def check(session: Any, task: Any, rows: Any, validation: Any, config: Any) -> None:
    """Write ``check/``: a grid of what the model will see, the learning-rate curve; log one measured step."""
    count = min(len(rows), 8)
    samples = [rows[i] for i in range(count)]
    if not session.run:
        return
    folder = session.path / "check"
    folder.mkdir(exist_ok=True)
    _grid([framed(sample, config.model.resolution) for sample in samples]).save(folder / "batch.png")
    _curve([learning_rate(step, config.train) for step in range(config.train.max_steps)]).save(
        folder / "learning_rate.png"
    )
    tokenizer = task._parts.tokenizer
    long = [text for text in rows.texts if len(tokenizer(text).input_ids) > tokenizer.model_max_length]
    for text in long[:5]:
        log.warning("over %d tokens: %r", tokenizer.model_max_length, text)
    task.fill_cache(_Head(rows, samples), session.accelerator)
    batch = task.collate(samples, [SampleKey(config.run.seed, 0, sample["id"]) for sample in samples])
    started = time.monotonic()
    loss = task(batch_to(batch, session.accelerator.device)).mean()
    loss.backward()
    if not torch.isfinite(loss):
        raise PackshotError(
            "the loss of the first batch is not finite.", "Look at check/batch.png and the learning rate."
        )
    figures = {
        "samples": len(rows),
        "captions_too_long": len(long),
        "loss": loss.item(),
        "seconds_per_sample": (time.monotonic() - started) / count,
        "peak_memory_gib": peak_memory_gib(),
    }
    (folder / "check.json").write_text(json.dumps(figures, indent=2) + "\n")
    log.info("%s", "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    log.info("look at %s", folder)


class _Head:
    """The first samples of a dataset, for the cache."""

    def __init__(self, rows: Any, samples: list[dict[str, Any]]) -> None:
        self._samples = samples
        self.ids = rows.ids[: len(samples)]
        self.texts = rows.texts[: len(samples)]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples[index]


def _grid(samples: list[dict[str, Any]]) -> Image.Image:
    """One row per sample: image, mask, caption."""
    side = samples[0]["image"].width
    sheet = Image.new("RGB", (side * 2 + 520, side * len(samples)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        top = number * side
        sheet.paste(sample["image"], (0, top))
        if sample["mask"] is not None:
            sheet.paste(sample["mask"].convert("RGB"), (side, top))
        words, lines = sample["text"].split(), [""]
        for word in words:
            lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) < 70 else [*lines, word]
        draw.multiline_text((side * 2 + 8, top + 6), "\n".join(lines), fill="black")
    return sheet


def _curve(values: list[float], size: tuple[int, int] = (640, 240)) -> Image.Image:
    """A line through the values, peak at the top."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    peak = max(values) or 1.0
    xs = np.linspace(8, size[0] - 8, len(values))
    points = [(float(x), size[1] - 8 - (size[1] - 32) * value / peak) for x, value in zip(xs, values, strict=True)]
    draw.line(points if len(points) > 1 else points * 2, fill=(30, 90, 200), width=2)
    draw.text((8, 6), f"learning rate, peak {peak:.3g}, {len(values)} steps", fill="black")
    return picture

"""``mode=check``: what the model will see, before the first step."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from packshot.core.errors import PackshotError
from packshot.core.run import log
from packshot.diffusion.keyed import SampleKey
from packshot.train.encode import Examples, lost_words
from packshot.train.loop import peak_memory_gib
from packshot.train.optimizer import learning_rate
from packshot.train.order import Order
from packshot.train.task import batch_to

MOST_SHOWN = 8  # samples of the first step that mode=check draws and measures


def check(session: Any, task: Any, examples: Examples, config: Any) -> None:
    """Write ``check/``: a grid of what the model will see, the learning-rate curve; log one measured step."""
    if not session.run:
        return
    folder = session.path / "check"
    folder.mkdir(exist_ok=True)
    order = Order(examples.groups, config.run.seed, min(config.train.batch_size, MOST_SHOWN))
    places = order.step(0)
    _grid([examples.seen(index) for index, _ in places]).save(folder / "batch.png")
    _curve([learning_rate(step, config.train) for step in range(config.train.max_steps)]).save(
        folder / "learning_rate.png"
    )
    buckets = _bucket_table(examples)
    lost = _truncated(examples)
    samples = [examples.fresh(index) for index, _ in places]
    batch = task.collate(samples, [SampleKey(config.run.seed, epoch, examples.ids[index]) for index, epoch in places])
    started = time.monotonic()
    loss = task(batch_to(batch, session.accelerator.device)).mean()
    loss.backward()
    if not torch.isfinite(loss):
        raise PackshotError(
            "the loss of the first batch is not finite.", "Look at check/batch.png and the learning rate."
        )
    entry = sum(t.numel() * t.element_size() for t in samples[0].values() if isinstance(t, torch.Tensor))
    figures = {
        "samples": len(examples),
        "captions_too_long": lost,
        "loss": loss.item(),
        "seconds_per_sample": (time.monotonic() - started) / len(places),
        "peak_memory_gib": peak_memory_gib(),
        "cache_mib": entry * len(examples) / 2**20,
    }
    (folder / "check.json").write_text(json.dumps({**figures, "buckets": buckets}, indent=2) + "\n")
    log.info("%s", "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    log.info("look at %s", folder)


def _bucket_table(examples: Examples) -> dict[str, int]:
    """Samples per bucket; a bucket with less than a handful is worth a warning: its pictures come again and again."""
    counts = Counter(examples.encoder.shapes[group] for group in examples.groups)
    for (height, width), count in counts.most_common():
        log.info("bucket %4d x %-4d %6d samples", width, height, count)
    return {f"{width}x{height}": count for (height, width), count in counts.most_common()}


def _truncated(examples: Examples) -> int:
    """Logs what the text encoders will not read; returns how many captions that concerns."""
    lost = {text: lost_words(examples.encoder.parts.tokenizer, text) for text in dict.fromkeys(examples.rows.texts)}
    cut = {text: words for text, words in lost.items() if words}
    for text, words in list(cut.items())[:5]:
        log.warning("too long for the text encoders, %r is lost of: %s", words, text)
    return sum(text in cut for text in examples.rows.texts)


def _grid(samples: list[dict[str, Any]]) -> Image.Image:
    """One row per sample: image, mask, caption."""
    side, height = samples[0]["image"].size
    sheet = Image.new("RGB", (side * 2 + 520, height * len(samples)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(samples):
        top = number * height
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

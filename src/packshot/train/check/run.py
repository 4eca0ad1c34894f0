"""``mode=check``: what the model will see, what is odd about it, and what a step takes, before the first step."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packshot.config.schema import KeepBest
from packshot.engine.batches import SampleOrder
from packshot.engine.keyed_random import SampleKey
from packshot.engine.loop import fit
from packshot.engine.memory import compile_networks
from packshot.engine.optimizers import learning_rate
from packshot.engine.processes import Session
from packshot.runs.folder import Run, log
from packshot.runs.progress import clock
from packshot.runs.tracking import NullTracker
from packshot.train.check.drawing import Line, curve, from_condition, from_vae, from_weight, outlined, sheet
from packshot.train.check.findings import findings, kept_words, shares
from packshot.train.encode import Examples

MOST_SHOWN = 8  # samples of the first micro-batch that are drawn
MEASURED_STEPS = 3  # the last counts: the first ones allocate memory and choose kernels


def check(session: Session, task: Any, examples: Examples, config: Any) -> None:
    """Write ``check/``: ``batch.png``, ``learning_rate.png`` and ``check.json``; log findings and one measured step.

    Raises:
        PackshotError: loss or gradient is not finite.
    """
    folder = session.path / "check"
    order = SampleOrder(examples.groups, config.run.seed, config.train.batch_size)
    places = order.step(0)
    fresh = (examples.fresh(index) for index, _ in places)
    samples = [{**sample, "encoded": list(sample["encoded"])} for sample in fresh]  # while the encoders are there
    keys = [SampleKey(config.run.seed, epoch, examples.ids[index]) for index, epoch in places]
    report: dict[str, Any] = {}
    if session.run:
        folder.mkdir(exist_ok=True)
        _draw(task, examples, places[:MOST_SHOWN], samples, keys).save(folder / "batch.png")
        curve([learning_rate(step, config.train) for step in range(config.train.max_steps)]).save(
            folder / "learning_rate.png"
        )
        report = _describe(session, task, examples, config, samples[0])
    if config.data.cache:
        examples.encoder.release()  # as in training: only what is needed then is in memory
    report |= _measure(session, task, samples, config)
    if session.run:
        (folder / "check.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        log.info("look at %s", folder / "batch.png")


# ---- the picture ----


@torch.no_grad()
def _draw(
    task: Any, examples: Examples, places: Sequence[tuple[int, int]], samples: list[Any], keys: list[SampleKey]
) -> Any:
    """The first micro-batch as the network gets it, after every random draw of the first step."""
    lines = []
    for (index, _), sample, key in zip(places, samples, keys, strict=False):
        batch = task.collate([sample], [key])
        lines.append(_line(task, examples, examples.seen(index), sample, {k: v[0] for k, v in batch.items()}, key))
    return sheet(lines, "the first batch, as the model gets it; red words lie beyond the tokens that are read")


def _line(
    task: Any, examples: Examples, seen: dict[str, Any], sample: Any, one: dict[str, Tensor], key: SampleKey
) -> Line:
    parts = examples.encoder.parts
    vae, latents = parts.vae, parts.latent_scale().to_vae(one["latents"][None])
    panels = [
        (
            "picture" + (", mask outlined" if seen["mask"] is not None else ", no mask"),
            outlined(seen["image"], seen["mask"]),
        ),
        ("what the latents decode to", from_vae(vae.decode(latents.to(vae.device)).sample[0])),
    ]
    notes = []
    for name, tensor in task.method.condition(seen, sample["encoded"], key).items():
        if tensor.ndim == 3 and len(tensor) == 3:
            unknown = ", unknown in magenta" if bool((tensor < 0).any()) else ""
            panels.append((f"{name}{unknown}", from_condition(tensor)))
        else:
            notes.append(f"{name}: {'x'.join(map(str, tensor.shape))} values, norm {tensor.norm():.3g}")
    weight = one["weight"].squeeze()
    if bool(weight.min() != weight.max()):
        panels.append((f"loss weight {weight.min():.2g} to {weight.max():.2g}", from_weight(weight)))
    read, lost = kept_words(examples.encoder.parts.tokenizer, seen["text"])
    frame = seen["geometry"]
    notes += [
        f"sample {seen['id'][:16]}, timestep {int(one['timesteps'])}",
        f"{_size(frame.original)} px, resized to {_size(frame.resized)}, bucket {_size(frame.target)}",
        f"cut at (top, left) {frame.crop}" + ("; letterboxed" if min(frame.crop) < 0 else ""),
        f"time ids {', '.join(f'{value:g}' for value in one['time_ids'].tolist())}",
        "this prompt is dropped in the first step" if not bool(one["prompt_kept"]) else "",
    ]
    return Line(panels, read, lost, notes)


def _size(height_width: tuple[int, int]) -> str:
    return f"{height_width[1]}x{height_width[0]}"


# ---- figures and findings ----


def _describe(session: Session, task: Any, examples: Examples, config: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Figures of the data and what is odd about it; both are logged."""
    counts = Counter(examples.encoder.shapes[group] for group in examples.groups)
    for shape, count in counts.most_common():
        log.info("bucket %10s %6d samples", _size(shape), count)
    found = findings(examples, task.validator.examples.rows.ids, config, session.accelerator.num_processes)
    for finding in found:
        log.warning("%s%s", finding.says, f" (such as {finding.samples[0][:16]})" if finding.samples else "")
    entry = sum(t.numel() * t.element_size() for t in sample.values() if isinstance(t, Tensor))
    return {
        "samples": len(examples),
        **shares(examples),
        "cache_mib": entry * len(examples) / 2**20,
        "buckets": {_size(shape): count for shape, count in counts.most_common()},
        "warnings": [dataclasses.asdict(finding) for finding in found],
    }


# ---- a measured step ----


class _Prepared:
    """Encoded samples as the loop reads them."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples, self.ids = samples, [sample["id"] for sample in samples]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return self._samples[index]

    def fingerprint(self) -> str:
        """None is needed: nothing is resumed."""
        return ""


def _measure(session: Session, task: Any, samples: list[dict[str, Any]], config: Any) -> dict[str, float]:
    """Time and memory of an optimizer step, by a few steps of the training loop itself on samples in memory."""
    if config.train.compile:
        compile_networks(task.method, session.accelerator.device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    nothing_else = {"checkpointing_steps": 0, "validation_steps": 0, "keep_best": KeepBest.none, "export_best": False}
    train = dataclasses.replace(config.train, max_steps=MEASURED_STEPS, log_steps=1, warmup_steps=0, **nothing_else)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), resumed=False) if session.run else None
        quiet = Session(session.accelerator, Path(folder), run, NullTracker())
        fit(task, _Prepared(samples), dataclasses.replace(config, train=train), quiet)
        if not run:
            return {}
        line = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps * session.accelerator.num_processes
    seconds = per_step / line["images_per_second"]
    log.info(
        "one optimizer step of %d samples: %.3g s, %.3g images/s, peak memory %.2f GiB, loss %.4g",
        per_step, seconds, line["images_per_second"], line["peak_memory_gib"], line["loss"],
    )  # fmt: skip
    remaining = seconds * config.train.max_steps
    log.info(
        "train.max_steps=%d would take %s, besides encoding and validation", config.train.max_steps, clock(remaining)
    )
    return {
        "loss": line["loss"],
        "samples_per_step": per_step,
        "seconds_per_step": seconds,
        "images_per_second": line["images_per_second"],
        "peak_memory_gib": line["peak_memory_gib"],
        "eta_seconds": remaining,
    }

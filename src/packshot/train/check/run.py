"""``mode=check``: what the model will see, what is unusual about it, and what a step takes, before the first step."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter, itemgetter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from packshot.config.schema import KeepBest, TrainConfig, TrainScript
from packshot.engine.batches import SampleOrder, distinct
from packshot.engine.keyed_random import SampleKey
from packshot.engine.loop import fit
from packshot.engine.memory import compile_networks
from packshot.engine.optimizers import learning_rate
from packshot.engine.processes import Session
from packshot.lists import map_values, pick
from packshot.methods.base import FramedSample, Tensors
from packshot.runs.folder import Run, answer
from packshot.runs.progress import clock
from packshot.runs.tracking import NullTracker
from packshot.train.check.drawing import Line, curve, from_condition, from_vae, from_weight, outlined, sheet
from packshot.train.check.findings import findings, kept_words, shares
from packshot.train.examples import Example, Examples
from packshot.train.task import DiffusionTask

MOST_SHOWN = 8  # samples of the first micro-batch that are drawn
MEASURED_STEPS = 3  # the last counts: the first ones allocate memory and choose kernels


@dataclasses.dataclass(frozen=True)
class FirstBatch:
    """The first micro-batch: places in the set, encoded samples, and the keys of their random draws."""

    indices: list[int]
    samples: list[Example]
    keys: list[SampleKey]


def first_batch(examples: Examples, config: TrainScript, order: Sequence[int] | None = None) -> FirstBatch:
    """Encoded now, while the encoders are there. order: see :func:`check`."""
    if order is None:
        order = range(len(examples))
        ids = examples.ids
    else:
        ids = distinct(pick(examples.ids, order))
    places = SampleOrder(pick(examples.groups, order), config.run.seed, config.train.batch_size).step(0)
    indices = [order[place] for place, _ in places]
    samples = []
    for index in indices:
        sample = examples.fresh(index)
        sample["encoded"] = list(sample["encoded"])
        samples.append(sample)
    keys = [SampleKey(config.run.seed, turn, ids[place]) for place, turn in places]
    return FirstBatch(indices, samples, keys)


def check(
    session: Session,
    task: DiffusionTask,
    examples: Examples,
    config: TrainScript,
    order: Sequence[int] | None = None,
) -> None:
    """Write ``check/``: ``batch.png``, ``learning_rate.png`` and ``check.json``; print findings and one measured step.

    order: indices of the samples at the places of an epoch; None: each sample once.

    Raises:
        PackshotError: loss or gradient is not finite.
    """
    folder = session.path / "check"
    batch = first_batch(examples, config, order)
    report: dict[str, object] = {}
    if session.run:
        folder.mkdir(exist_ok=True)
        draw_batch(task, examples, batch).save(folder / "batch.png")
        rates = [learning_rate(step, config.train) for step in range(config.train.max_steps)]
        curve(rates).save(folder / "learning_rate.png")
        shown = len(examples) if order is None else len(order)
        report.update(describe(session, task, examples, config, batch.samples[0], shown))
    if config.data.cache:
        examples.encoder.release()  # as in training: only what is needed then is in memory
    report.update(measure_step(session, task, batch.samples, config))
    if session.run:
        (folder / "check.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        answer.info("look at %s", folder / "batch.png")


# ---- the picture ----


@torch.no_grad()
def draw_batch(task: DiffusionTask, examples: Examples, batch: FirstBatch) -> Image.Image:
    """The first samples of the batch as the network gets them, after every random draw of the first step."""
    lines = []
    for index, sample, key in zip(batch.indices[:MOST_SHOWN], batch.samples, batch.keys, strict=False):
        access = map_values(itemgetter(0), task.collate([sample], [key]))
        seen = examples.seen(index)
        conditions = task.method.condition(seen, sample["encoded"], key)
        lines.append(sample_line(examples, seen, access, conditions))
    return sheet(lines, "the first batch, as the model gets it; red words lie beyond the tokens that are read")


def sample_line(examples: Examples, seen: FramedSample, access: Tensors, conditions: Tensors) -> Line:
    """Panels and notes of one sample. access: its entries of a batch, without batch dimension."""
    parts = examples.encoder.parts
    latents = parts.latent_scale().to_vae(access["latents"][None])
    decoded = parts.vae.decode(latents.to(parts.vae.device)).sample[0]  # type: ignore[arg-type,union-attr]
    panels = [
        ("picture, mask outlined" if seen["mask"] else "picture, no mask", outlined(seen["image"], seen["mask"])),
        ("what the latents decode to", from_vae(decoded)),
    ]
    notes = []
    for name, tensor in conditions.items():
        if tensor.ndim == 3 and len(tensor) == 3:  # a picture
            unknown = ", unknown in magenta" if bool((tensor < 0).any()) else ""
            panels.append((f"{name}{unknown}", from_condition(tensor)))
        else:
            notes.append(f"{name}: {'x'.join(map(str, tensor.shape))} values, norm {tensor.norm():.3g}")
    weight = access["weight"].squeeze()
    if bool(weight.min() != weight.max()):
        panels.append((f"loss weight {weight.min():.2g} to {weight.max():.2g}", from_weight(weight)))
    read, lost = kept_words(parts.tokenizer, seen["text"], examples.encoder.prompt_chunks)
    geometry = seen["geometry"]
    letterboxed = "; letterboxed" if min(geometry.crop) < 0 else ""
    notes += [
        f"sample {seen['id'][:16]}, timestep {int(access['timesteps'])}",
        f"{size(geometry.original)} px, resized to {size(geometry.resized)}, bucket {size(geometry.target)}",
        f"cut at (top, left) {geometry.crop}{letterboxed}",
        f"time ids {', '.join(map('{:g}'.format, access['time_ids'].tolist()))}",
        "" if bool(access["prompt_kept"]) else "this prompt is dropped in the first step",
    ]
    return Line(panels, read, lost, notes)


def size(height_width: tuple[int, int]) -> str:
    """As width x height."""
    return f"{height_width[1]}x{height_width[0]}"


# ---- figures and findings ----


def describe(
    session: Session, task: DiffusionTask, examples: Examples, config: TrainScript, sample: Example, shown: int
) -> dict[str, object]:
    """Figures of the data and what is unusual about it, which are printed. shown: samples of an epoch with repeats."""
    buckets = {}
    for group, count in Counter(examples.groups).most_common():
        buckets[size(examples.encoder.shapes[group])] = count
    for bucket, count in buckets.items():
        answer.info("bucket %10s %6d samples", bucket, count)
    held_out = task.validator.examples.rows.ids
    found = findings(examples, held_out, config, session.accelerator.num_processes, shown)
    for finding in found:
        answer.warning("%s%s", finding.says, f" (such as {finding.samples[0][:16]})" if finding.samples else "")
    tensors = [value for value in sample.values() if isinstance(value, Tensor)]
    tensors += sample["prompt"].values()
    entry = sum(map(attrgetter("nbytes"), tensors))
    return {
        "samples": len(examples),
        **shares(examples),
        "cache_mib": entry * len(examples) / 2**20,
        "buckets": buckets,
        "warnings": list(map(dataclasses.asdict, found)),
    }


# ---- a measured step ----


class PreparedSamples:
    """Encoded samples as the loop reads them."""

    def __init__(self, samples: Sequence[Example]) -> None:
        self._samples = samples
        self.ids: list[str] = [sample["id"] for sample in samples]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return self._samples[index]

    def fingerprint(self) -> str:
        """Not needed, because nothing is resumed."""
        return ""


def few_steps(train: TrainConfig) -> TrainConfig:
    """The settings for ``MEASURED_STEPS`` steps alone."""
    return dataclasses.replace(
        train,
        max_steps=MEASURED_STEPS,
        log_steps=1,
        warmup_steps=0,
        checkpointing_steps=0,
        validation_steps=0,
        keep_best=KeepBest.none,
        export_best=False,
    )


def measure_step(
    session: Session, task: DiffusionTask, samples: Sequence[Example], config: TrainScript
) -> dict[str, float]:
    """Time and memory of an optimizer step, by a few steps of the training loop itself on samples in memory.

    eta_seconds: of all steps of the run.
    """
    if config.train.compile:
        compile_networks(task.method, session.accelerator.device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), resumed=False) if session.run else None
        quiet = Session(session.accelerator, Path(folder), run, NullTracker())
        fit(task, PreparedSamples(samples), dataclasses.replace(config, train=few_steps(config.train)), quiet)
        if not run:
            return {}
        line = json.loads((Path(folder) / "metrics.jsonl").read_text().splitlines()[-1])
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps * session.accelerator.num_processes
    seconds = per_step / line["images_per_second"]
    remaining = seconds * config.train.max_steps
    answer.info(
        "one optimizer step of %d samples: %.3g s, %.3g images/s, peak memory %.2f GiB, loss %.4g",
        per_step, seconds, line["images_per_second"], line["peak_memory_gib"], line["loss"],
    )  # fmt: skip
    answer.info(
        "train.max_steps=%d would take %s, without encoding and validation", config.train.max_steps, clock(remaining)
    )
    return {
        "loss": line["loss"],
        "samples_per_step": per_step,
        "seconds_per_step": seconds,
        "images_per_second": line["images_per_second"],
        "peak_memory_gib": line["peak_memory_gib"],
        "eta_seconds": remaining,
    }

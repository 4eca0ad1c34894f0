"""Whether a run may be resumed from a checkpoint that was made with other settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from typing import Any

from packshot.config.compose import to_plain
from packshot.config.renamed import translate
from packshot.config.schema import LRSchedule, TrainConfig
from packshot.engine.optimizers import learning_rate
from packshot.engine.task import Samples, TrainingConfig
from packshot.errors import ConfigError
from packshot.runs.folder import log

# Keys that change where a run writes, what it reports and how fast it is, but not the trained weights.
FREE = (
    "run.dir", "run.resume", "mode", "task", "tracking.*", "licenses.*", "export.*", "plan.*",
    "method.trigger_words",
    "data.num_workers", "data.cache", "data.cache_*", "data.validation", "data.input",
    "train.checkpoint*", "train.validat*", "train.keep_best", "train.export_best", "train.log_*",
    "train.process_timeout", "train.gradient_checkpointing", "train.fused_backward", "train.compile",
    "train.attention", "train.deterministic",
)  # fmt: skip
# Keys that act only through the learning rates of the steps: compared by the rates of the steps that are done.
RATES = ("train.max_steps", "train.warmup_steps", "train.learning_rate", "train.lr_*")
# Keys that act through the samples of a step: compared by their product with the number of processes, and by the
# fingerprint of the samples.
BY_EFFECT = (
    "train.batch_size", "train.gradient_accumulation_steps", "data.train", "data.train_*", "data.needs_review",
    "data.holdout_share",
    "data.allow_empty_captions",
)  # fmt: skip

ABSENT = "(no such key)"  # where only one of the two versions knows a key
Settings = dict[str, Any]  # a resolved config as plain containers


@dataclass(frozen=True)
class MadeWith:
    """What decides about the weights of a run, as a checkpoint keeps it.

    config: the resolved config. processes: how many shared a step. samples, fingerprint: number and identity (ids,
    captions, order, repeats) of the training samples.
    """

    config: Settings
    processes: int
    samples: int
    fingerprint: str


def made_with(config: TrainingConfig, rows: Samples, processes: int) -> MadeWith:
    """The record of a run that is about to start."""
    return MadeWith(to_plain(config), processes, len(rows), rows.fingerprint())


def check(then: MadeWith, now: MadeWith, steps: int) -> None:
    """Compare the settings of a checkpoint (``then``, after ``steps`` optimizer steps) with those of the run (``now``).

    Differences that do not change the trained weights are logged.

    Raises:
        ConfigError: there are other differences; names each with its old and its new value.
    """
    then = replace(then, config=translate(then.config))
    refused = other_steps(then, now)
    rates_differ = other_rates(then, now, steps)
    for key, old, new in differences(then.config, now.config):
        change = f"{key}: {as_text(old)} -> {as_text(new)}"
        if matches(key, RATES) and rates_differ:
            refused.append(f"{change} (the {steps} steps so far would have had other learning rates)")
        elif matches(key, (*FREE, *RATES, *BY_EFFECT)) or ABSENT in (old, new):
            log.info("resuming with another %s", change)
        else:
            refused.append(change)
    if refused:
        raise ConfigError(
            f"The checkpoint of step {steps} was made with other settings:\n    " + "\n    ".join(refused),
            "Keep the old settings, or start a new run with another run.dir.",
        )


def as_text(value: object) -> str:
    """A value as the messages show it, a list of one text as that text."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value)


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Whether a dotted key matches one of the patterns."""
    return any(map(partial(fnmatch, key), patterns))


def flat(config: Settings, prefix: str = "") -> dict[str, object]:
    """A nested config as dotted keys and values."""
    leaves: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def differences(then: Settings, now: Settings) -> Iterator[tuple[str, object, object]]:
    """(key, old value, new value) of every key whose value differs."""
    before = flat(then)
    after = flat(now)
    for key in before | after:
        old = before.get(key, ABSENT)
        new = after.get(key, ABSENT)
        if old != new:
            yield key, old, new


def step_size(made: MadeWith) -> tuple[int, str]:
    """Samples per optimizer step, and the arithmetic behind them."""
    size = made.config["train"]["batch_size"]
    micro_steps = made.config["train"]["gradient_accumulation_steps"]
    arithmetic = f"{made.processes} processes x {micro_steps} micro-steps x {size}"
    return made.processes * micro_steps * size, arithmetic


def other_steps(then: MadeWith, now: MadeWith) -> list[str]:
    """Differences in what an optimizer step consists of."""
    found: list[str] = []
    old, how_before = step_size(then)
    new, how_now = step_size(now)
    dropout = now.config.get("method", {}).get("dropout")
    if old != new:
        found.append(
            f"samples per optimizer step: {old} ({how_before}) -> {new} ({how_now}; on fewer processes raise "
            "train.gradient_accumulation_steps)"
        )
    elif dropout and how_before != how_now:
        # a mask inside the network is drawn for the whole micro-batch of a process, not sample by sample
        split = f"with method.dropout={dropout}, whose masks depend on the split of a step"
        found.append(f"{how_before} -> {how_now} ({split})")
    if then.fingerprint != now.fingerprint:
        found.append(
            f"data.train: {then.samples} samples ({then.fingerprint[:12]}) -> {now.samples} samples "
            f"({now.fingerprint[:12]}); ids, captions, scenes, pictures, how often each is listed, and what is held "
            "out (data.validation, data.holdout_share) must stay"
        )
    return found


def other_rates(then: MadeWith, now: MadeWith, steps: int) -> bool:
    """Whether the steps so far would have had other learning rates.

    A longer run with a constant rate, or with a decay that has not begun, continues as if it had been asked for from
    the start.
    """
    old = rate_settings(then.config["train"])
    new = rate_settings(now.config["train"])
    return any(learning_rate(step, old) != learning_rate(step, new) for step in range(steps))


def rate_settings(train: Settings) -> TrainConfig:
    """A train config with the keys that decide about the learning rate."""
    known = {key: value for key, value in train.items() if matches(f"train.{key}", RATES)}
    known["lr_schedule"] = LRSchedule[train["lr_schedule"]]
    return TrainConfig(**known)

"""Whether a run may go on from a checkpoint that was made with other settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from packshot.config.compose import to_plain
from packshot.config.renamed import translate
from packshot.config.schema import LRSchedule, TrainConfig
from packshot.engine.optimizers import learning_rate
from packshot.errors import PackshotError
from packshot.runs.folder import log

# Keys that change where a run writes, what it reports and how fast it is, but not what is trained. All others are.
FREE = (
    "run.dir", "run.resume", "mode", "task", "tracking.*", "licenses.*", "export.*",
    "data.num_workers", "data.cache", "data.cache_*", "data.validation", "data.input",
    "train.checkpoint*", "train.validat*", "train.keep_best", "train.export_best", "train.log_*",
    "train.process_timeout", "train.gradient_checkpointing", "train.fused_backward", "train.compile",
    "train.attention", "train.deterministic",
)  # fmt: skip
# Keys that act through the learning rates of the steps alone: judged by those of the steps that are done.
RATES = ("train.max_steps", "train.warmup_steps", "train.learning_rate", "train.lr_*")
# Keys that act through what a step takes: judged by their product with the number of processes, and by the samples.
BY_EFFECT = ("train.batch_size", "train.gradient_accumulation_steps", "data.train")

ABSENT = "(no such key)"  # one of the two configs is of another version


@dataclass(frozen=True)
class MadeWith:
    """What decides about the weights of a run, as a checkpoint keeps it.

    config: the resolved config as plain containers. processes: how many shared a step. samples, fingerprint: number
    and identity (ids, captions, order) of what is trained on.
    """

    config: dict[str, Any]
    processes: int
    samples: int
    fingerprint: str


def made_with(config: Any, rows: Any, processes: int) -> MadeWith:
    """Of a run that is about to start. rows: has a length and a ``fingerprint()``."""
    return MadeWith(to_plain(config), processes, len(rows), rows.fingerprint())


def check(then: MadeWith, now: MadeWith, steps: int) -> None:
    """Compare what a checkpoint of ``steps`` optimizer steps was made with to what goes on from it.

    Differences that leave the trained weights alone are logged.

    Raises:
        PackshotError: another difference exists; names each with its old and its new value.
    """
    then = replace(then, config=translate(then.config))
    refused = [*_effects(then, now)]
    other_rates = _other_rates(then, now, steps)
    for key, old, new in _differences(then.config, now.config):
        said = f"{key}: {_text(old)} -> {_text(new)}"
        if _any(key, RATES) and other_rates:
            refused.append(f"{said} (the {steps} steps so far would have had other learning rates)")
        elif _any(key, (*FREE, *RATES, *BY_EFFECT)) or ABSENT in (old, new):
            log.info("resuming with another %s", said)
        else:
            refused.append(said)
    if refused:
        raise PackshotError(
            f"The checkpoint of step {steps} was made with other settings:\n    " + "\n    ".join(refused),
            "Keep the old settings, or start a new run with another run.dir.",
        )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _any(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old, new = _flat(then), _flat(now)
    for key in old | new:
        values = old.get(key, ABSENT), new.get(key, ABSENT)
        if values[0] != values[1]:
            yield key, *values


def _effects(then: MadeWith, now: MadeWith) -> Iterator[str]:
    """Differences in what an optimizer step is made of."""
    old, new = (_step(made) for made in (then, now))
    if old[0] != new[0]:
        yield (
            f"samples per optimizer step: {old[0]} ({old[1]}) -> {new[0]} ({new[1]}; on fewer processes raise "
            "train.gradient_accumulation_steps)"
        )
    elif old[1] != new[1] and (dropout := now.config.get("method", {}).get("dropout")):
        # inside the network a mask is drawn for a whole micro-batch of a process, not sample by sample
        yield f"{old[1]} -> {new[1]} (with method.dropout={dropout}, whose masks depend on the split of a step)"
    if then.fingerprint != now.fingerprint:
        yield (
            f"data.train: {then.samples} samples ({then.fingerprint[:12]}) -> {now.samples} samples "
            f"({now.fingerprint[:12]}); ids, captions, scenes and pictures must stay"
        )


def _step(made: MadeWith) -> tuple[int, str]:
    """Samples per optimizer step, and the arithmetic."""
    train = made.config["train"]
    size, micro_steps = train["batch_size"], train["gradient_accumulation_steps"]
    arithmetic = f"{made.processes} processes x {micro_steps} micro-steps x {size}"
    return made.processes * micro_steps * size, arithmetic


def _other_rates(then: MadeWith, now: MadeWith, steps: int) -> bool:
    """Whether the steps that are done would have had other learning rates. A longer run with a constant rate, or one
    whose decay has not begun, goes on as if it had been asked for from the start."""
    old, new = (_rate_settings(made.config["train"]) for made in (then, now))
    return any(learning_rate(step, old) != learning_rate(step, new) for step in range(steps))


def _rate_settings(train: dict[str, Any]) -> TrainConfig:
    known = {key: value for key, value in train.items() if _any(f"train.{key}", RATES)}
    return TrainConfig(**{**known, "lr_schedule": LRSchedule[train["lr_schedule"]]})

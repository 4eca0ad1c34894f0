"""Keys of ``generate.py`` that are read only while another key has a certain value: one row for each such rule.

A key that is given and not read is refused, or named on the screen where pictures that do read it may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass
from operator import attrgetter
from typing import Any

from packshot.config.keys import fields
from packshot.config.output import FORMATS
from packshot.errors import ConfigError


@dataclass(frozen=True)
class ReadRule:
    """keys: config keys, or groups of them that end with a dot. by: the keys that decide. reads: whether keys are read
    with one of these at a value. why: ends the sentence "‹key› has no effect with ‹by›". way: the way out.

    noted: the key is named on the screen instead of refused.
    """

    keys: tuple[str, ...]
    by: tuple[str, ...]
    reads: Callable[[Any], bool]
    way: str
    why: str = ""
    noted: bool = False

    def covers(self, key: str) -> bool:
        return any(key == own or (own.endswith(".") and key.startswith(own)) for own in self.keys)


def named(*names: str) -> Callable[[Any], bool]:
    """Whether an enum's member is one of these."""
    return lambda value: value.name in names


def is_empty(value: object) -> bool:
    return not value


NOTHING_DRAWN = ": nothing is drawn"
ADAPTERS = "adapters."
RULES = (
    ReadRule(
        ("size", "aspect_ratio", "position", "margin", "product_scale"),
        ("placement",),
        lambda placement: placement.name != "original",
        "Add placement=center or another place, or leave it out.",
        ", which keeps the photo's frame",
    ),
    ReadRule(
        ("negative_prompt",),
        ("guidance_scale",),
        lambda scale: scale > 1,
        "Set guidance_scale above 1, or leave negative_prompt out.",
        ": guidance is off",
    ),
    ReadRule(
        ("background.refine_max_side", "background.refine_strength"),
        ("background.refine",),
        named("tiled"),
        "Set background.refine=tiled.",
    ),
    ReadRule(
        ("background.sharpen",),
        ("background.refine",),
        named("tiled", "upscale"),
        "Set background.refine=tiled or upscale.",
    ),
    ReadRule(("background.upscaler",), ("background.refine",), named("upscale"), "Set background.refine=upscale."),
    ReadRule(
        ("background.refine", "verify.retries", "prompt", "scene.", "negative_prompt", "reference", "references"),
        ("background.color",),
        is_empty,
        "Leave one of them out.",
        NOTHING_DRAWN,
    ),
    ReadRule(
        ("num_inference_steps", "scheduler", "guidance_scale", "prompt_chunks", "prompt_weights", "adapters.")
        + ("depth.", "inference."),
        ("background.color",),
        is_empty,
        "Leave them out, or background.color.",
        NOTHING_DRAWN,
        noted=True,
    ),
    ReadRule(
        ("light_angle",),
        ("shadow", "adapters.controlnets"),
        lambda value: bool(value) if isinstance(value, list) else value.name != "none",
        "Describe the light in words (scene.lighting), add shadow=contact, or a ControlNet that reads light.",
    ),
    ReadRule(("verify.control",), ("verify.retries",), bool, "Set verify.retries, too."),
    ReadRule(
        ("verify.control", "adapters.controlnet_scales", "adapters.controlnet_starts", "adapters.controlnet_ends")
        + ("depth.onnx",),
        ("adapters.controlnets",),
        bool,
        "Add adapters.controlnets, or leave it out.",
    ),
    ReadRule(("adapters.lora_scale",), ("adapters.lora", "adapters.loras"), bool, "Add adapters.lora."),
    ReadRule(("adapters.lora_scales",), ("adapters.loras",), bool, "Add adapters.loras."),
    ReadRule(
        ("adapters.lora_start", "adapters.lora_end"),
        ("adapters.lora", "adapters.loras"),
        bool,
        "Add adapters.lora or adapters.loras.",
    ),
    ReadRule(
        ("adapters.ip_adapter_scale", "adapters.ip_adapter_layers", "adapters.ip_adapter_start")
        + ("adapters.ip_adapter_end", "reference", "references"),
        ("adapters.ip_adapter",),
        bool,
        "Add adapters.ip_adapter=<export folder of train_ip_adapter.py>.",
    ),
    ReadRule(("reference_weights",), ("reference", "references"), bool, "Add references."),
    ReadRule(("matte.invert",), ("mask",), bool, "Add mask=<a mask file, or a folder of them>.", noted=True),
    ReadRule(
        ("matte.model",), ("mask",), is_empty, "Leave one of them out.", ": no other mask is looked for", noted=True
    ),
    ReadRule(
        ("output.quality",),
        ("output.format",),
        lambda kind: FORMATS[kind.name].has_quality,
        "Set output.format=jpg or webp.",
        ", which loses nothing",
    ),
    ReadRule(("campaign_cross",), ("campaign",), bool, "Add campaign=<table.csv>."),
    ReadRule(("plan.",), ("mode",), named("plan"), "Add mode=plan."),
)


def shown(value: object) -> str:
    """A value as the command line has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_of(field: Field) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def given_keys(config: object) -> dict[str, object]:
    """The keys of a config that differ from their defaults, with their values."""
    given = {}
    for key, field, _ in fields(type(config)):
        value = attrgetter(key)(config)
        if value != default_of(field):
            given[key] = value
    return given


def value_of(config: object, key: str) -> tuple[str, object] | None:
    """A key as this config has it, and its value; None where it has none. A server's settings stand in ``generate``."""
    for name in (key, f"generate.{key}"):
        try:
            return name, attrgetter(name)(config)
        except AttributeError:
            continue
    return None


def unread(config: object, rules: Iterable[ReadRule]) -> Iterable[tuple[ReadRule, str, str]]:
    """The keys of a config that are given and not read: (rule, key with its value, the keys that decide)."""
    given = given_keys(config)
    for rule in rules:
        found = [value_of(config, key) for key in rule.by]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found) or any(rule.reads(value) for _, value in known):
            continue
        deciding = " and ".join(f"{key}={shown(value)}" for key, value in known)
        for key, value in given.items():
            if rule.covers(key.removeprefix("generate.")):
                yield rule, f"{key}={shown(value)}", deciding


def refuse_unread(config: object, rules: Sequence[ReadRule] = RULES) -> None:
    """Raises ConfigError for the first key that is given and that nothing reads."""
    for rule, key, deciding in unread(config, [rule for rule in rules if not rule.noted]):
        raise ConfigError(f"{key} has no effect with {deciding}{rule.why}.", rule.way)


def unread_notes(configs: Iterable[object]) -> list[str]:
    """A line for each noted key that some of the configs give and do not read, with the number of these configs."""
    counts: dict[str, int] = {}
    for config in configs:
        for rule, key, deciding in unread(config, [rule for rule in RULES if rule.noted]):
            line = f"{key} has no effect with {deciding}{rule.why}"
            counts[line] = counts.get(line, 0) + 1
    return [f"{line} ({count} products)" for line, count in counts.items()]

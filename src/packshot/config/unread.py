"""Keys that are read only while another key has a certain value: one row for each such rule.

A key that is given and not read is refused, or named on the screen where pictures that do read it may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, replace
from enum import Enum
from operator import attrgetter
from typing import Any

from packshot.config.captioners import CAPTIONERS, presets
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
# Of pictures: of generate.py, of the rows of a campaign, of a server and its requests.
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
    ReadRule(
        ("shadow_strength",), ("shadow",), lambda value: value.name != "none", "Add shadow=contact, or leave it out."
    ),
    ReadRule(("plan.",), ("mode",), named("plan"), "Add mode=plan."),
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
)


def is_given(value: object) -> bool:
    return value is not None


def tunes_by_lora(tuning: Enum) -> bool:
    return any(preset.modules for _, preset in presets()[tuning.name])


# Of whole scripts; a row whose deciding keys a script does not have is not for it. ``tracking.name`` is no key of W&B
# alone: exported LoRAs have it as their title.
def noted(*rules: ReadRule) -> tuple[ReadRule, ...]:
    return tuple(replace(rule, noted=True) for rule in rules)


# Of all scripts: what can only be a mistake.
SCRIPT_RULES = (
    ReadRule(
        ("licenses.allowed",),
        ("licenses.commercial",),
        bool,
        "Add licenses.commercial=true, or leave it out.",
        ": every licence is accepted",
    ),
    ReadRule(
        ("objective.min_snr_gamma",),
        ("objective.loss_weighting",),
        named("min_snr"),
        "Add objective.loss_weighting=min_snr, or leave it out.",
    ),
    ReadRule(("method.text_rank",), ("method.text_encoder",), bool, "Add method.text_encoder=true, or leave it out."),
)
# A config file or a sweep may give a key that one of its runs does not read.
NOTED_IN_SCRIPTS = noted(
    ReadRule(
        (
            "tracking.project",
            "tracking.entity",
            "tracking.group",
            "tracking.notes",
            "tracking.tags",
            "tracking.upload",
        ),
        ("tracking.kind",),
        lambda kind: "wandb" in kind.name,
        "Add tracking=wandb, or leave it out.",
    ),
    ReadRule(("plan.",), ("mode",), named("plan"), "Add mode=plan."),
    # training
    ReadRule(("train.lr_power",), ("train.lr_schedule",), named("polynomial"), "Add train.lr_schedule=polynomial."),
    ReadRule(("train.lr_decay_share",), ("train.lr_schedule",), named("wsd"), "Add train.lr_schedule=wsd."),
    ReadRule(
        ("train.lr_cycles",),
        ("train.lr_schedule",),
        named("cosine_restarts"),
        "Add train.lr_schedule=cosine_restarts.",
    ),
    ReadRule(
        ("train.lr_min_ratio",),
        ("train.lr_schedule",),
        lambda schedule: schedule.name != "constant",
        "Choose another train.lr_schedule, or leave it out.",
    ),
    ReadRule(
        ("train.validate_first", "train.validation_samples", "train.validation_seeds", "train.validation_prompts")
        + ("train.keep_best",),
        ("train.validation_steps",),
        bool,
        "Set train.validation_steps, too.",
        ": nothing is validated",
    ),
    ReadRule(("data.holdout_share",), ("data.validation",), is_empty, "Leave one of them out."),
    ReadRule(("data.smallest_bucket",), ("data.buckets",), bool, "Add data.buckets=true."),
    ReadRule(
        ("objective.logit_normal_location", "objective.logit_normal_scale"),
        ("objective.timestep_sampling",),
        named("logit_normal"),
        "Add objective.timestep_sampling=logit_normal.",
    ),
    ReadRule(
        ("objective.boundary_width",),
        ("objective.boundary_weight",),
        lambda weight: weight != 1,
        "Set objective.boundary_weight, too.",
    ),
    ReadRule(("method.targets",), ("method.target_modules",), is_empty, "Leave one of them out."),
    ReadRule(
        ("method.peer_reference_prob",), ("method.reference",), named("look", "place"), "Add method.reference=look."
    ),
    ReadRule(("method.train_extras",), ("method.extra_controlnets",), bool, "Add method.extra_controlnets."),
    # captioners
    ReadRule(
        ("captioner.",),
        ("captioner.kind",),
        lambda kind: CAPTIONERS[kind.name].writes,
        "Choose a captioner, or leave it out.",
    ),
    ReadRule(
        (
            "captioner.endpoint",
            "captioner.endpoint_model",
            "captioner.endpoint_requests",
            "captioner.endpoint_guided",
        ),
        ("captioner.kind",),
        lambda kind: bool(CAPTIONERS[kind.name].connect),
        "Add captioner=endpoint.",
    ),
    ReadRule(
        (
            "captioner.adapter",
            "captioner.tuning",
            "captioner.lora_rank",
            "captioner.quantization",
            "captioner.dtype",
        ),
        ("captioner.kind",),
        lambda kind: bool(CAPTIONERS[kind.name].adapter),
        "Leave it out.",
        ", whose weights are not here",
    ),
    ReadRule(("captioner.lora_rank",), ("captioner.tuning",), tunes_by_lora, "Choose a LoRA preset, or leave it out."),
    ReadRule(("data.review",), ("task",), named("review"), "Add task=review."),
    ReadRule(("data.corrections",), ("task",), named("correct"), "Add task=correct."),
    # datasets
    ReadRule(("review.",), ("task",), named("review_masks"), "Add task=review_masks."),
    ReadRule(("render.",), ("dataset",), named("rendered"), "Add dataset=rendered."),
    ReadRule(
        ("source.", "captions.", "data.", "matte.", "depth.", "quality.", "curation."),
        ("dataset",),
        named("background", "product"),
        "Add dataset=product or background, or leave it out.",
        ": nothing is read from a source",
    ),
    ReadRule(("source.masks", "source.without_mask"), ("dataset",), named("product"), "Add dataset=product."),
    ReadRule(
        ("curation.detector",),
        ("curation.max_face", "curation.max_nudity"),
        is_given,
        "Set one of them, or leave it out.",
    ),
    ReadRule(("curation.encoder",), ("curation.max_similarity",), is_given, "Set it, or leave the encoder out."),
    ReadRule(("render.count",), ("render.seeds",), is_empty, "Leave one of them out."),
    # evaluation
    ReadRule(("scores.",), ("items",), bool, "Add items=<table of what was asked for>."),
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
            if rule.covers(key.removeprefix("generate.")) and key not in rule.by:
                yield rule, f"{key}={shown(value)}", deciding


def refuse_unread(config: object, rules: Sequence[ReadRule] = RULES) -> None:
    """Raises ConfigError for the first key that is given and that nothing reads."""
    for rule, key, deciding in unread(config, [rule for rule in rules if not rule.noted]):
        raise ConfigError(f"{key} has no effect with {deciding}{rule.why}.", rule.way)


def script_notes(config: object) -> list[str]:
    """A line for each noted key of a script's config that is given and that nothing reads."""
    found = unread(config, NOTED_IN_SCRIPTS)
    return [f"{key} has no effect with {deciding}{rule.why}. {rule.way}" for rule, key, deciding in found]


def unread_notes(configs: Iterable[object]) -> list[str]:
    """A line for each noted key that some of the configs give and do not read, with the number of these configs."""
    counts: dict[str, int] = {}
    for config in configs:
        for rule, key, deciding in unread(config, [rule for rule in RULES if rule.noted]):
            line = f"{key} has no effect with {deciding}{rule.why}"
            counts[line] = counts.get(line, 0) + 1
    return [f"{line} ({count} products)" for line, count in counts.items()]

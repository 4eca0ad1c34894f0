"""Checks that run after composition and before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, get_type_hints

from packshot.config import schema
from packshot.config.optimizers import OPTIMIZERS
from packshot.errors import ConfigError


def fields(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf of a schema class as (dotted key, field, type)."""
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, hints[f.name]


def describe_type(hint: Any) -> str:
    """A type in words: ``train | plan | check``, ``integer``, ``list of text``."""
    words = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(member.name for member in hint)
    args: tuple[Any, ...] = getattr(hint, "__args__", ())
    if getattr(hint, "__origin__", None) is list:
        return f"list of {describe_type(args[0])}"
    return " or ".join(describe_type(arg) for arg in args)


def describe(field: dataclasses.Field, hint: Any) -> str:
    """What a key takes, with its range."""
    low, high = field.metadata.get("min"), field.metadata.get("max")
    bounds = {(False, False): "", (True, False): f" >= {low}", (False, True): f" <= {high}"}.get(
        (low is not None, high is not None), f" from {low} to {high}"
    )
    return describe_type(hint) + bounds


def nearest(word: str, known: list[str]) -> str | None:
    """The known key most like ``word``; the last part counts alone too, so a wrong group is forgiven."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    tails = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.75)
    return tails[close[0]] if close else None


def check_ranges(config: Any) -> None:
    """Raises ConfigError at the first value outside its documented range."""
    for key, field, hint in fields(type(config)):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low, high = field.metadata.get("min"), field.metadata.get("max")
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"{key}={value} is out of range.", f"{key} takes {describe(field, hint)}.")


def _training(config: schema.TrainScript | schema.CaptionVLM) -> None:
    if config.train.warmup_steps > config.train.max_steps:
        raise ConfigError(
            f"train.warmup_steps={config.train.warmup_steps} is longer than train.max_steps={config.train.max_steps}.",
            "Shorten the warm-up or lengthen the training.",
        )


def _memory(config: schema.TrainScript | schema.CaptionVLM) -> None:
    train = config.train
    stepwise = [row.name for row in OPTIMIZERS.values() if row.stepwise]
    if train.compile and isinstance(config, schema.CaptionVLM):
        raise ConfigError(
            "train.compile=true: captions differ in length, and each length would be compiled for itself.",
            "Set train.compile=false.",
        )
    obstacles = [  # (in the way, what is, why, what to do about it)
        (
            train.gradient_accumulation_steps > 1,
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps}",
            "a gradient is gone before the next micro-step could add to it",
            "Set train.gradient_accumulation_steps=1",
        ),
        (
            train.max_grad_norm > 0,
            f"train.max_grad_norm={train.max_grad_norm}",
            "the norm is known when every gradient has been applied",
            "Set train.max_grad_norm=0",
        ),
        (
            train.mixed_precision is schema.MixedPrecision.fp16,
            "train.mixed_precision=fp16",
            "its scaler looks at all gradients before any is applied",
            "Set train.mixed_precision=bf16",
        ),
        (
            config.optim.kind.name not in stepwise,
            f"optim={config.optim.kind}",
            "its step size comes from all gradients together",
            f"Set optim to one of {', '.join(stepwise)}",
        ),
    ]
    for in_the_way, setting, reason, remedy in obstacles:
        if train.fused_backward and in_the_way:
            raise ConfigError(
                f"train.fused_backward=true with {setting}: {reason}.", f"{remedy}, or train.fused_backward=false."
            )


def _best(config: schema.TrainScript | schema.CaptionVLM) -> None:
    train = config.train
    if train.export_best and (train.keep_best is schema.KeepBest.none or not train.validation_steps):
        raise ConfigError(
            f"train.export_best=true with train.keep_best={train.keep_best} and "
            f"train.validation_steps={train.validation_steps}: no checkpoint is ever called the best.",
            "Set train.keep_best and train.validation_steps, or export the last step.",
        )


def _captioner_validation(config: schema.CaptionVLM) -> None:
    train = config.train
    if train.keep_best is schema.KeepBest.extension or train.validation_prompts or train.validation_seeds > 1:
        raise ConfigError(
            "train.keep_best=extension, train.validation_prompts and train.validation_seeds are about drawn pictures; "
            "a captioner draws none.",
            "Leave them out; train.keep_best=validation_loss works for captioners.",
        )


_FLORENCE = (schema.CaptionerKind.florence2, schema.CaptionerKind.none)


def _captioner(config: Any) -> None:
    captioner = config.captioner
    if captioner.quantization is schema.Quantization.int8:
        raise ConfigError(
            "captioner.quantization=int8: the captioners' layers do not train over eight bits.",
            "Use captioner.quantization=nf4 or none.",
        )
    if captioner.product is schema.ProductTarget.box and captioner.kind not in _FLORENCE:
        raise ConfigError(
            f"captioner.product=box with captioner={captioner.kind}: only Florence-2 has words for places.",
            "Use captioner.product=outline or mask.",
        )


def _captioner_training(config: schema.CaptionVLM) -> None:
    captioner = config.captioner
    if config.task is not schema.CaptionTask.train:
        return
    whole = captioner.tuning in (schema.Tuning.full, schema.Tuning.frozen_vision)
    for key, value, plain in (
        ("quantization", captioner.quantization, schema.Quantization.none),
        ("dtype", captioner.dtype, schema.WeightDtype.float32),
    ):
        if whole and value is not plain:
            raise ConfigError(
                f"captioner.{key}={value} with captioner.tuning={captioner.tuning}: it is for frozen weights.",
                f"Use a LoRA preset (captioner.tuning=language_lora), or captioner.{key}={plain}.",
            )


def check_objective(objective: schema.ObjectiveConfig, prediction_type: str, num_timesteps: int | None = None) -> None:
    """Refuses combinations that have no meaning, or NaN for a weight.

    prediction_type: what the network will predict, the base's own where the config leaves it open. num_timesteps:
    length of the base's schedule, once it is known.

    Raises:
        ConfigError: a gamma without min-SNR; zero terminal SNR with epsilon; a prediction type that has no target;
            timesteps that are an empty range or leave the schedule.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"The base predicts {prediction_type!r}; only epsilon and v_prediction can be trained.",
            "Choose another model.base, or set objective.prediction_type.",
        )
    gamma, default = objective.min_snr_gamma, schema.ObjectiveConfig.min_snr_gamma
    if gamma != default and objective.loss_weighting is not schema.LossWeighting.min_snr:
        raise ConfigError(
            f"objective.min_snr_gamma={gamma} has no effect with objective.loss_weighting={objective.loss_weighting}.",
            "Add objective.loss_weighting=min_snr, or leave it out.",
        )
    if objective.zero_terminal_snr and prediction_type == "epsilon":
        raise ConfigError(
            "Zero terminal SNR (objective.zero_terminal_snr, or the base's own schedule) cannot be trained with "
            "epsilon prediction: at the last step the input is the answer, and SNR weights divide by zero.",
            "Set objective.prediction_type=v_prediction.",
        )
    last = objective.max_timestep
    if last is not None and last <= objective.min_timestep:
        raise ConfigError(
            f"objective.max_timestep={last} is not above objective.min_timestep={objective.min_timestep}.",
            "The timesteps between them are trained.",
        )
    if num_timesteps is not None:
        for key in ("min_timestep", "max_timestep"):
            value = getattr(objective, key)
            if value is not None and value >= num_timesteps:
                raise ConfigError(
                    f"objective.{key}={value} is beyond the base's schedule.", f"Its last step is {num_timesteps - 1}."
                )


def _objective(config: schema.TrainScript) -> None:
    # what the base predicts is known when it is loaded; the task asks again then
    given = config.objective.prediction_type
    check_objective(config.objective, "v_prediction" if given is schema.PredictionType.base else given.name)


def _channels(config: schema.TrainScript) -> None:
    if config.objective.product_conditioning is schema.ProductConditioning.channels:
        raise ConfigError(
            "objective.product_conditioning=channels changes the UNet's first layer, which only train_lora.py trains.",
            "Set objective.product_conditioning=noised or clean.",
        )


def group_rates(optim: schema.OptimConfig) -> list[tuple[str, float]]:
    """``optim.groups`` as (regular expression over parameter names, peak learning rate), in the order given.

    Raises:
        ConfigError: an entry is no "regex=rate" with a rate from 0 to 1.
    """
    rates = []
    for text in optim.groups:
        pattern, _, rate = text.rpartition("=")
        try:
            re.compile(pattern)
            peak = float(rate)
        except (ValueError, re.error) as error:
            raise ConfigError(f"optim.groups: {text!r} is no 'regex=learning rate' ({error}).") from error
        if not pattern or not 0 <= peak <= 1:  # NaN too
            raise ConfigError(f"optim.groups: {text!r} needs a pattern and a learning rate from 0 to 1.")
        rates.append((pattern, peak))
    return rates


def _optimizer(config: schema.TrainScript | schema.CaptionVLM) -> None:
    optim, train = config.optim, config.train
    row = OPTIMIZERS[optim.kind.name]
    for field in dataclasses.fields(schema.OptimConfig):
        value = getattr(optim, field.name)
        if field.name not in ("kind", "groups", *row.reads) and value != field.default:
            raise ConfigError(
                f"optim.{field.name}={value} with optim={row.name}: it does not read this key, so the value would "
                "change nothing.",
                f"Leave optim.{field.name} out, or choose another optimizer.",
            )
    group_rates(optim)  # refuses entries that cannot be read
    for conflict in row.conflicts:
        if conflict.exists(optim, train):
            raise ConfigError(conflict.message.format(optim=optim, train=train), conflict.hint)


_LOW_RANK = (schema.LoraKind.lora, schema.LoraKind.rslora)
# Adapter kinds that train over quantised weights. loha and lokr read the shape of the stored weight, which nf4 packs;
# dora needs the weight's own values, which int8 gives up at the first step.
_QUANTIZED = {schema.Quantization.nf4: (*_LOW_RANK, schema.LoraKind.dora), schema.Quantization.int8: _LOW_RANK}


def _lora(config: schema.TrainLora) -> None:
    method, quantization = config.method, config.model.quantization
    # transformers drops the magnitudes of a DoRA on loading; readers disagree about their shape in a kohya file
    for key, given in (("method.text_encoder", method.text_encoder), ("export.kohya", config.export.kohya)):
        if given and method.kind not in _LOW_RANK:
            raise ConfigError(
                f"{key}=true with method.kind={method.kind}: no file holds that so that stock loaders read it alike.",
                f"Use method.kind=lora or rslora, or set {key}=false.",
            )
    if method.text_rank is not None and not method.text_encoder:
        raise ConfigError(
            f"method.text_rank={method.text_rank} without a LoRA on the text encoders.",
            "Add method.text_encoder=true, or leave it out.",
        )
    if method.kind not in _QUANTIZED.get(quantization, schema.LoraKind):
        raise ConfigError(
            f"model.quantization={quantization} cannot carry method.kind={method.kind}.",
            f"It carries {', '.join(map(str, _QUANTIZED[quantization]))}.",
        )
    try:
        re.compile(method.target_modules or "")
    except re.error as error:
        raise ConfigError(
            f"method.target_modules={method.target_modules!r} is no regular expression: {error}.",
            "It is matched against whole module names, such as mid_block.attentions.0.proj_in.",
        ) from error


def _ip_adapter(config: schema.TrainIPAdapter) -> None:
    method = config.method
    if method.variant is not schema.IPAdapterVariant.base:
        return
    if method.num_tokens != 4:
        raise ConfigError(
            f"method.num_tokens={method.num_tokens} with method.variant=base: stock loaders take four for granted.",
            "Set method.num_tokens=4, or method.variant=plus.",
        )
    if method.resampler_dim is not None:
        raise ConfigError(
            f"method.resampler_dim={method.resampler_dim} with method.variant=base: it has no resampler.",
            "Set method.variant=plus, or leave it out.",
        )


def _quantization(config: Any) -> None:
    if config.model.quantization is not schema.Quantization.none and not isinstance(config, schema.TrainLora):
        raise ConfigError(
            f"model.quantization={config.model.quantization} is for train_lora.py alone.",
            "Set model.quantization=none: what it trained is used on the whole base.",
        )


def _tracking(config: Any) -> None:
    for tag in config.tracking.tags:
        if len(tag) > 64:
            raise ConfigError(f"tracking.tags: {tag!r} has {len(tag)} characters.", "W&B takes at most 64.")
        if not tag.strip():
            raise ConfigError("tracking.tags has an empty one.", "W&B takes 1 to 64 characters.")
    odd = sorted({*config.tracking.project} & {*"/\\#?%:"})
    if odd or not config.tracking.project:
        raise ConfigError(
            f"tracking.project={config.tracking.project!r} is no project of W&B.",
            f"A name without {' '.join(odd)}." if odd else "It needs a name.",
        )


def _generation(config: schema.Generate) -> None:
    if config.prompt and any(vars(config.scene).values()):
        raise ConfigError("prompt and scene.* are both given.", "Use one: the scene is rendered to the prompt.")
    if config.reference and config.references:
        raise ConfigError("reference and references are both given.", "Add the one to the list of the others.")
    files = config.reference_files()
    if files and not config.adapters.ip_adapter:
        raise ConfigError(
            f"reference={', '.join(files)} needs an IP-Adapter.",
            "Add adapters.ip_adapter=<export folder of train_ip_adapter.py>.",
        )
    reference_weights(len(files), config.reference_weights)


MOST_REFERENCES = 64  # every one adds its image tokens to what each layer attends to at each step


def reference_weights(count: int, weights: Sequence[int]) -> list[int]:
    """The weight of each of ``count`` reference images, 1 where none is given.

    Raises:
        ConfigError: there are more or fewer of them than images, one is below 1, or together they are beyond 64.
    """
    known = list(weights) or [1] * count
    if len(known) != count:
        raise ConfigError(
            f"reference_weights has {len(known)} values for {count} references.", "Give one per reference, or none."
        )
    if any(weight < 1 for weight in known) or sum(known) > MOST_REFERENCES:
        raise ConfigError(
            f"reference_weights={known} cannot be counted out.",
            f"They are whole numbers from 1, together at most {MOST_REFERENCES}.",
        )
    return known


def _settings(settings: schema.GenerateSettings) -> None:
    if settings.placement is schema.Placement.center and len(settings.size) != 2:
        raise ConfigError("placement=center needs a canvas.", "Add size=[width,height], in px.")
    if settings.size and (len(settings.size) != 2 or not all(64 <= side <= 8192 for side in settings.size)):
        raise ConfigError(f"size={settings.size} is no canvas.", "size takes [width,height], each from 64 to 8192 px.")


def _rendering(config: schema.BuildData) -> None:
    seeds = config.render.seeds
    if len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
        raise ConfigError(f"render.seeds={seeds} has a seed twice or below 0.", "Name each scene once.")


def _adapters(config: schema.Generate | schema.Serve) -> None:
    adapters, count = config.adapters, len(config.adapters.controlnets)
    for name in ("controlnet_scales", "controlnet_starts", "controlnet_ends"):
        values = getattr(adapters, name)
        if values and len(values) != count:
            raise ConfigError(
                f"adapters.{name} has {len(values)} values for {count} ControlNets.",
                "Give one per ControlNet, or none.",
            )
    spans = [("lora", adapters.lora_start, adapters.lora_end)]
    spans.append(("ip_adapter", adapters.ip_adapter_start, adapters.ip_adapter_end))
    spans += [("controlnets", *span) for span in adapters.controlnet_spans()]
    for name, start, end in spans:
        if not 0 <= start < end <= 1:
            raise ConfigError(
                f"adapters.{name} would count from {start:g} to {end:g} of the denoising steps.",
                "A start lies below its end, both from 0 to 1.",
            )


# Which cross-field checks a config gets, by the schema it is an instance of.
def _licenses(config: Any) -> None:
    if config.licenses.allowed and not config.licenses.commercial:
        raise ConfigError(
            "licenses.allowed has no effect: every licence is let in.", "Add licenses.commercial=true, or leave it out."
        )


_CHECKS: list[tuple[type | tuple[type, ...], Callable[[Any], None]]] = [
    (object, check_ranges),
    (tuple(schema.SCRIPTS.values()), _tracking),
    (tuple(kind for kind in schema.SCRIPTS.values() if kind is not schema.Evaluate), _licenses),
    ((schema.TrainScript, schema.CaptionVLM), _training),
    ((schema.TrainScript, schema.CaptionVLM), _optimizer),
    ((schema.TrainScript, schema.CaptionVLM), _memory),
    ((schema.TrainScript, schema.CaptionVLM), _best),
    (schema.CaptionVLM, _captioner_validation),
    ((schema.CaptionVLM, schema.BuildData, schema.Evaluate), _captioner),
    (schema.CaptionVLM, _captioner_training),
    (schema.TrainScript, _objective),
    (schema.TrainLora, _lora),
    ((schema.TrainControlNet, schema.TrainIPAdapter), _channels),
    (schema.TrainIPAdapter, _ip_adapter),
    (tuple(schema.SCRIPTS.values()), _quantization),
    (schema.BuildData, _rendering),
    (schema.Generate, _generation),
    (schema.GenerateSettings, _settings),
    (schema.Serve, lambda config: _settings(config.generate)),
    ((schema.Generate, schema.Serve), _adapters),
]


def validate(config: Any) -> None:
    """Raises ConfigError when a composed config cannot work. Touches neither files nor models."""
    for kind, check in _CHECKS:
        if isinstance(config, kind):
            check(config)

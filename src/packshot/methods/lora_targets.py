"""Which layers a LoRA adapts: presets, and one's own regular expression."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from packshot.config.schema import LoraMethod, LoraTargets
from packshot.errors import ConfigError

_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
_CONV = r"resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv"
_LINEAR = r"ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|time_emb_proj|(time|add)_embedding\.linear_[12]"

# Regular expressions over whole names of a UNet's modules.
TARGETS: dict[LoraTargets, str] = {
    LoraTargets.attention: rf".*\.{_ATTENTION}",
    LoraTargets.cross_attention: r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
    LoraTargets.attention_and_ff: rf".*\.({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2)",
    LoraTargets.attention_and_conv: rf".*\.({_ATTENTION}|{_CONV})",
    LoraTargets.all_linear: rf"(.*\.)?({_ATTENTION}|{_LINEAR})",
}


@dataclass(frozen=True)
class Targets:
    """Layers of a network, and the rank and alpha of each.

    pattern: regular expression over whole module names. rank_pattern, alpha_pattern: those of the modules that have
    others than ``rank`` and ``alpha``, by name.
    """

    pattern: str
    rank: int
    alpha: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


def unet_targets(unet: nn.Module, config: LoraMethod) -> Targets:
    """What a config adapts of this UNet.

    Raises:
        ConfigError: its regular expression matches nothing, or something that is neither linear nor a convolution;
            convolutions have a rank or alpha of their own, and none is matched.
    """
    if config.target_modules is None:
        key = f"method.targets={config.targets}"
        pattern = TARGETS[config.targets]
    else:
        key = f"method.target_modules={config.target_modules!r}"
        pattern = config.target_modules
    matched = matching(unet, pattern)
    if not matched:
        raise ConfigError(
            f"{key} matches no layer of the UNet.",
            f"It is compared with whole module names, such as {', '.join(examples(unet))}.",
        )
    convolutions = []
    for name, module in matched.items():
        if isinstance(module, nn.Conv2d):
            convolutions.append(name)
        elif not isinstance(module, nn.Linear):
            raise ConfigError(
                f"{key} matches {name or 'the UNet itself'}, a {type(module).__name__}.",
                "Only linear layers and convolutions can be adapted.",
            )
    targets = Targets(pattern, config.rank, config.alpha)
    for option, own in (("conv_rank", targets.rank_pattern), ("conv_alpha", targets.alpha_pattern)):
        value = getattr(config, option)
        if value is None:
            continue
        if not convolutions:
            raise ConfigError(
                f"method.{option}={value}, but {key} matches no convolution.",
                "Set method.targets=attention_and_conv, or leave it out.",
            )
        own.update(dict.fromkeys(convolutions, value))
    return targets


def matching(unet: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose whole name a regular expression matches."""
    return {name: module for name, module in unet.named_modules() if re.fullmatch(pattern, name)}


def examples(unet: nn.Module) -> list[str]:
    """The first module of every preset."""
    names = []
    for pattern in TARGETS.values():
        first = next(iter(matching(unet, pattern)), None)
        if first and first not in names:
            names.append(first)
    return names


def text_targets(layers: int, config: LoraMethod) -> Targets:
    """The attention projections of the first ``layers`` layers of a CLIP text encoder."""
    numbers = "|".join(map(str, range(layers)))
    pattern = rf".*layers\.({numbers})\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
    return Targets(pattern, config.text_rank or config.rank, config.alpha)

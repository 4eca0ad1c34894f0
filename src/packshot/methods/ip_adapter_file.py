"""The original IP-Adapter's file layout, read and written: tensors by name, ``image_proj.*`` and ``ip_adapter.*``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from packshot.base.ip_adapters import MARKS, attention_keys
from packshot.config.schema import IPAdapterMethod, IPAdapterVariant
from packshot.errors import ConfigError

# How many image tokens the projection of each variant makes.
_TOKENS: dict[IPAdapterVariant, Callable[[dict[str, Tensor]], int]] = {
    # one below another in a single matrix
    IPAdapterVariant.base: lambda t: len(t["image_proj.proj.weight"]) // len(t["image_proj.norm.weight"]),
    IPAdapterVariant.plus: lambda t: t["image_proj.latents"].shape[1],
}
_NAMES = (
    (r"^image_embeds\.", "proj."),
    (r"^layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"^layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"^layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"^layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"^layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"^layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"^layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)
_KEYS, _VALUES = "attn.to_k.weight", "attn.to_v.weight"


def _original_key(key: str) -> str:
    for pattern, replacement in _NAMES:
        renamed = re.sub(pattern, replacement, key)
        if renamed != key:
            return f"image_proj.{renamed}"
    return f"image_proj.{key}"


def to_original(projection: nn.Module, processors: Iterable[Any]) -> dict[str, Tensor]:
    """The adapter's tensors under their original names; a resampler's keys and values are one matrix there."""
    state = projection.state_dict()
    tensors = {}
    for key, value in state.items():
        if key.endswith(_KEYS):
            tensors[_original_key(key.replace("to_k", "to_kv"))] = torch.cat(
                [value, state[key.replace("to_k", "to_v")]]
            )
        elif not key.endswith(_VALUES):
            tensors[_original_key(key)] = value
    for number, processor in enumerate(processors):
        pair = processor.to_k_ip[0].weight, processor.to_v_ip[0].weight
        tensors |= dict(zip(attention_keys(number), pair, strict=True))
    return tensors


def from_original(tensors: dict[str, Tensor], projection: nn.Module, processors: Iterable[Any]) -> None:
    """Inverse of :func:`to_original`: fill the adapter, in its own dtype, with tensors of the same names and shapes."""
    state = {}
    for key in projection.state_dict():
        if key.endswith((_KEYS, _VALUES)):
            both = tensors[_original_key(re.sub(r"to_[kv]\.weight$", "to_kv.weight", key))]
            state[key] = both.chunk(2)[key.endswith(_VALUES)]
        else:
            state[key] = tensors[_original_key(key)]
    projection.load_state_dict(state)
    for number, processor in enumerate(processors):
        for layer, key in zip((processor.to_k_ip[0], processor.to_v_ip[0]), attention_keys(number), strict=True):
            layer.load_state_dict({"weight": tensors[key]})


def resampler_dim(tensors: dict[str, Tensor]) -> int | None:
    """Width of a resampler's hidden states in a file; None if it has none."""
    latents = tensors.get(MARKS[IPAdapterVariant.plus])
    return None if latents is None else latents.shape[-1]


def check_fit(tensors: dict[str, Tensor], expected: dict[str, Tensor], config: IPAdapterMethod) -> None:
    """Compare a file's tensors with those of the adapter that a config describes.

    Raises:
        ConfigError: names or shapes differ; names the key that has to follow the file.
    """
    variant, mark = config.variant, MARKS[config.variant]
    found = next(variant for variant, mark in MARKS.items() if mark in tensors)
    if found is not variant:
        first = MARKS[found]
        both = f"it has {_shape(first, tensors)} and not {_shape(mark, expected)}"
        raise _misfit(config, f"method.variant={variant}: {both}", f"Set method.variant={found}.")
    if tensors.keys() == expected.keys():
        shapes = f"it has {_shape(mark, tensors)} and not {_shape(mark, expected)}"
        tokens = _TOKENS[variant](tensors)
        if tokens != config.num_tokens:
            asked = f"method.num_tokens={config.num_tokens} of method.variant={variant}"
            raise _misfit(config, f"{asked}: {shapes}", f"Set method.num_tokens={tokens}.")
        if resampler_dim(tensors) != resampler_dim(expected):
            asked = f"method.resampler_dim={config.resampler_dim}"
            raise _misfit(config, f"{asked}: {shapes}", "Leave method.resampler_dim out, it follows the file.")
    for name in sorted(tensors.keys() | expected.keys()):
        if _shape(name, tensors) != _shape(name, expected):
            both = f"it has {_shape(name, tensors)} and not {_shape(name, expected)}"
            raise _misfit(config, f"model.base and model.image_encoder: {both}", "It was made for others than these.")


def _misfit(config: IPAdapterMethod, reason: str, way_out: str) -> ConfigError:
    return ConfigError(f"method.init={config.init} does not fit {reason}.", way_out)


def _shape(name: str, tensors: dict[str, Tensor]) -> str:
    return f"{name} {tuple(tensors[name].shape)}" if name in tensors else f"no {name}"

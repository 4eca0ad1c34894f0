"""The original IP-Adapter's file layout, read and written: tensors by name, ``image_proj.*`` and ``ip_adapter.*``."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from packshot.base.ip_adapters import find_ip_adapter
from packshot.base.single_file import tensor_shapes
from packshot.config.schema import IPAdapterMethod, IPAdapterVariant
from packshot.errors import ConfigError
from packshot.lists import map_values

# A tensor that each variant has and the other has not; and how many image tokens its projection makes.
_MARKS = {IPAdapterVariant.base: "image_proj.proj.weight", IPAdapterVariant.plus: "image_proj.latents"}
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


def _processor_keys(number: int) -> tuple[str, str]:
    # the original numbers every attention; cross-attentions are the odd ones
    return f"ip_adapter.{2 * number + 1}.to_k_ip.weight", f"ip_adapter.{2 * number + 1}.to_v_ip.weight"


def to_original(projection: nn.Module, processors: Iterable[Any]) -> dict[str, Tensor]:
    """The adapter's tensors under their original names; a resampler's keys and values are one matrix there."""
    state, tensors = projection.state_dict(), {}
    for key, value in state.items():
        if key.endswith(_KEYS):
            tensors[_original_key(key.replace("to_k", "to_kv"))] = torch.cat(
                [value, state[key.replace("to_k", "to_v")]]
            )
        elif not key.endswith(_VALUES):
            tensors[_original_key(key)] = value
    for number, processor in enumerate(processors):
        pair = processor.to_k_ip[0].weight, processor.to_v_ip[0].weight
        tensors |= dict(zip(_processor_keys(number), pair, strict=True))
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
        for layer, key in zip((processor.to_k_ip[0], processor.to_v_ip[0]), _processor_keys(number), strict=True):
            layer.load_state_dict({"weight": tensors[key]})


def read_original(key: str, path: str, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a file in the original layout, by name: ``.safetensors``, or ``.bin`` (a pickled dict of dicts).

    path: the file, or an export folder, here or on the hub. meta: without values, which are then not read either.

    Raises:
        ConfigError: there is no such file, or it holds something else; names ``key``.
    """
    file = find_ip_adapter(key, path)
    way_out = "Name a .safetensors or .bin file in the layout of the original IP-Adapter, or an export/ folder."
    try:
        tensors = (_from_safetensors if file.suffix == ".safetensors" else _from_pickle)(file, meta)
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(f"{key}={path} cannot be read: {reason}", way_out) from error
    if tensors.keys().isdisjoint(_MARKS.values()):
        raise ConfigError(f"{key}={path} holds no IP-Adapter of the variant base or plus.", way_out)
    return tensors


def _from_safetensors(file: Path, meta: bool) -> dict[str, Tensor]:
    if meta:
        return map_values(lambda shape: torch.empty(shape, device="meta"), tensor_shapes(file))
    return load_file(file)


def _from_pickle(file: Path, meta: bool) -> dict[str, Tensor]:
    groups = torch.load(file, map_location="meta" if meta else "cpu", weights_only=True, mmap=True)
    if not isinstance(groups, dict) or set(map(type, groups.values())) - {dict, OrderedDict}:
        raise ValueError("it is not a dict of dicts")
    tensors: dict[str, Tensor] = {}
    for group, named in groups.items():
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise ValueError("it holds something other than tensors")
            tensors[f"{group}.{name}"] = tensor
    return tensors


def resampler_dim(tensors: dict[str, Tensor]) -> int | None:
    """Width of a resampler's hidden states in a file; None if it has none."""
    latents = tensors.get(_MARKS[IPAdapterVariant.plus])
    return None if latents is None else latents.shape[-1]


def check_fit(tensors: dict[str, Tensor], expected: dict[str, Tensor], config: IPAdapterMethod) -> None:
    """Compare a file's tensors with those of the adapter that a config describes.

    Raises:
        ConfigError: names or shapes differ; names the key that has to follow the file.
    """
    variant, mark = config.variant, _MARKS[config.variant]
    found = next(variant for variant, mark in _MARKS.items() if mark in tensors)
    if found is not variant:
        first = _MARKS[found]
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

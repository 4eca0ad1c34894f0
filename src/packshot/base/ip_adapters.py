"""IP-Adapters in our export folders and in files as the original repository publishes them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from packshot.base.places import find_place
from packshot.base.single_file import tensor_shapes
from packshot.config.schema import IPAdapterVariant
from packshot.errors import ConfigError, first_line
from packshot.lists import ending, map_values
from packshot.runs.networks import refuse_partial

EXPORT = "ip_adapter.safetensors"
WAY_OUT = "Name a .safetensors or .bin file in the layout of the original IP-Adapter, or an export/ folder."
# A tensor that each variant has and the other has not.
MARKS = {IPAdapterVariant.base: "image_proj.proj.weight", IPAdapterVariant.plus: "image_proj.latents"}


def find_ip_adapter(key: str, value: str) -> Path:
    """The local file of an IP-Adapter. value: the file, or a folder that has one, here or on the hub.

    Raises:
        ConfigError: there is none, or there are several.
    """
    place = find_place(key, value)
    if place.is_file:
        return place.fetch()
    names = place.names()
    files = ending(names, ".safetensors")
    if EXPORT in files:
        files = [EXPORT]
    if len(files) != 1:
        raise ConfigError(
            f"{key}={value} has no {EXPORT}{', but ' + ', '.join(files[:5]) if files else ''}.",
            WAY_OUT,
        )
    return place.fetch([*ending(names, ".json"), *files]) / files[0]


def attention_keys(number: int) -> tuple[str, str]:
    """Names of a cross-attention's keys and values. The original numbers every attention; these are the odd ones."""
    return f"ip_adapter.{2 * number + 1}.to_k_ip.weight", f"ip_adapter.{2 * number + 1}.to_v_ip.weight"


def refuse_other_attentions(tensors: dict[str, Tensor], count: int) -> None:
    """Raises ValueError unless a file has keys and values for each of ``count`` cross-attentions, and nothing else.

    FaceID files hold a LoRA besides, which diffusers would leave out.
    """
    expected: set[str] = set()
    for number in range(count):
        expected.update(attention_keys(number))
    found = {name for name in tensors if name.startswith("ip_adapter.")}
    refuse_partial(expected - found, found - expected)


def refuse_other_projection(tensors: dict[str, Tensor], projection: nn.Module) -> None:
    """Raises ValueError where diffusers has left out a part of a file's projection."""
    own = [name for name in tensors if name.startswith("image_proj.")]
    halves = ending(own, "to_kv.weight")  # keys and values are two matrices in diffusers
    loaded = len(projection.state_dict())
    if len(own) + len(halves) != loaded:
        raise ValueError(
            f"{len(own) + len(halves)} matrices and vectors of its projection, of which {loaded} have a place"
        )


def read_original(key: str, path: str, meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a file in the original layout, by name: ``.safetensors``, or ``.bin`` (a pickled dict of dicts).

    path: the file, or an export folder, here or on the hub. meta: without values, which are then not read either.

    Raises:
        ConfigError: there is no such file, or it holds something else; names ``key``.
    """
    file = find_ip_adapter(key, path)
    try:
        tensors = (_from_safetensors if file.suffix == ".safetensors" else _from_pickle)(file, meta)
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        reason = first_line(error)
        raise ConfigError(f"{key}={path} cannot be read: {reason}", WAY_OUT) from error
    if tensors.keys().isdisjoint(MARKS.values()):
        raise ConfigError(f"{key}={path} holds no IP-Adapter of the variant base or plus.", WAY_OUT)
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

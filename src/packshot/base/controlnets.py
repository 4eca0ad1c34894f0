"""Reading ControlNets of folders, files and the hub, and what names the control map of each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from packshot.base.adapter_metadata import METADATA_FILE, read_entries
from packshot.base.load import hint_of_failure
from packshot.base.places import choose_weights, find_place
from packshot.base.single_file import marked, refuse_missing, tensor_shapes
from packshot.config.conditions import CONDITIONS, split_condition
from packshot.errors import ConfigError, first_line
from packshot.imaging.control_maps import Control
from packshot.lists import ending
from packshot.runs.networks import load_whole, refuse_partial

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

# What else a file may be, by a part of a key.
OTHERS = {
    "task_embedding": "a ControlNet Union",
    "control_add_embedding": "a ControlNet Union",
    "lora_controlnet": "a Control-LoRA",
    "lllite_": "a ControlNet-LLLite",
    "adapter.": "a T2I-Adapter",
    "ctrl_to_base": "a ControlNet-XS",
    "model.diffusion_model.": "a whole checkpoint",
}
# The entries that have to equal the base's, so that residuals fit. Other entries may differ.
_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block")


def find_controlnet(key: str, value: str, whole: bool = True) -> Path:
    """The local folder or file of a ControlNet. value: a folder, file or hub id, perhaps after its condition.

    whole: False fetches only its configs from the hub.

    Raises:
        ConfigError: there is none.
    """
    _, named = split_condition(value)
    place = find_place(key, named)
    if place.is_file:
        return place.fetch()
    names = place.names()
    if "config.json" not in names:
        raise ConfigError(
            f"{key}={value} has no config.json.", "Name the export/ folder that the trainer wrote, a file or a hub id."
        )
    weights = choose_weights(names)[1] if whole else []
    return place.fetch([*ending(names, ".json"), *weights])


def read_control(key: str, folder: Path, condition: str | None = None) -> Control:
    """The control map that a ControlNet reads: its ``packshot.json``, or ``condition``, where the config names it.

    key: the config key that names the ControlNet.

    Raises:
        ConfigError: nothing names the condition, or ``packshot.json`` is broken or names another one.
    """
    file = folder / METADATA_FILE
    if condition is not None and not file.is_file():
        return Control(condition, 0.0, 0.0)
    hint = (
        f"Write its control map before its name, {key}=[{'|'.join(CONDITIONS)}:{folder.name}], or to {METADATA_FILE}."
    )
    try:
        entries = read_entries(folder)
        grow = float(entries.get("mask_grow", 0.0))
        feather = float(entries.get("mask_feather", 0.0))
        control = Control(entries["condition"], grow, feather)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{key}: {folder} has no {METADATA_FILE}.", hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {file} names no condition ({error}).", hint) from error
    if control.condition not in CONDITIONS:
        raise ConfigError(f"{key}: {file} names the unknown condition {control.condition!r}.", hint)
    if condition not in (None, control.condition):
        raise ConfigError(
            f"{key}: {folder} was trained on {control.condition}, not on {condition}.", "Leave the condition out."
        )
    return control


def load_controlnet(key: str, source: str, unet: UNet2DConditionModel) -> ControlNetModel:
    """The ControlNet of a folder, file or hub id, in fp32; on the meta device if the UNet is there (a plan).

    Raises:
        ConfigError: it cannot be loaded, or is of another shape than the UNet; names the key.
    """
    from diffusers import ControlNetModel

    planned = unet.device.type == "meta"
    path = find_controlnet(key, source, whole=not planned)
    try:
        if path.is_file():
            return controlnet_from_file(path, unet)
        config = json.loads((path / "config.json").read_text())
        refuse_other_kind(config)
        refuse_other_shape(config, unet)
        if planned:
            return cast("ControlNetModel", ControlNetModel.from_config(config))
        variant, _ = choose_weights(os.listdir(path))
        return load_whole(ControlNetModel, path, variant=variant, torch_dtype=torch.float32)
    except OtherKind as error:
        raise ConfigError(
            f"{key}={source} is {error}, which cannot be used.", "Name a ControlNet that reads one control map."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = first_line(error)
        raise ConfigError(f"{key}={source} cannot be loaded into this base: {reason}", hint_of_failure(path)) from error


class OtherKind(ValueError):
    """A file or folder is not a ControlNet; the text names what it is. The library would load a part of it."""


def refuse_other_kind(config: Mapping[str, object]) -> None:
    """Raises OtherKind for the config of something else."""
    kind = config.get("_class_name", "ControlNetModel")
    if "num_control_type" in config:  # published ones call themselves ControlNetModel
        kind = "ControlNetUnionModel"
    if kind != "ControlNetModel":
        raise OtherKind(f"a {kind} of diffusers")


def refuse_other_shape(config: Mapping[str, object], unet: UNet2DConditionModel) -> None:
    """Raises ValueError where a ControlNet's residuals would not fit the UNet."""
    wrong = []
    for name in _SHAPE:
        own = config.get(name)
        base = unet.config.get(name)
        if as_list(own) != as_list(base):
            wrong.append(f"{name} {base} and not {own}")
    if wrong:
        raise ValueError(f"the base has {', '.join(wrong)}")


def controlnet_from_file(file: Path, unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet in one file, in diffusers' or the published layout, with the shapes that belong to the UNet.

    Raises:
        ValueError: the file is damaged, or has other shapes.
    """
    from diffusers import ControlNetModel

    names = set(tensor_shapes(file))  # its errors name what is wrong with a file
    kind = marked(names, OTHERS)
    if kind:
        raise OtherKind(kind)
    with torch.device("meta"):
        made: ControlNetModel = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    own = set(made.state_dict())
    published = any(name.endswith("time_embed.0.weight") for name in names)
    if not published:
        refuse_partial(own - names, names - own)
    elif len(names) > len(own):  # it has other names, one for each tensor
        raise ValueError(f"it has {len(names)} tensors, and a ControlNet of this base {len(own)}")
    if unet.device.type == "meta":
        return made
    with tempfile.TemporaryDirectory() as folder:
        made.save_config(folder)
        net = ControlNetModel.from_single_file(
            str(file), config=folder, subfolder="", torch_dtype=torch.float32, local_files_only=True
        )
    refuse_missing(net)
    return net


def as_list(value: object) -> object:
    """A tuple as a list, to compare it with a config that was read from a file."""
    return list(value) if isinstance(value, tuple) else value

"""Reading ControlNets: a diffusers folder, and its ``packshot.json``, which names the control map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packshot.base.adapter_metadata import METADATA_FILE, read_entries
from packshot.base.load import hint_of_failure
from packshot.config.conditions import CONDITIONS
from packshot.errors import ConfigError
from packshot.imaging.control_maps import Control
from packshot.runs.files import resolve

# What has to agree with the base for residuals to fit; other entries may differ.
_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block")


def read_control(key: str, folder: Path) -> Control:
    """What the ControlNet of an export folder is shown. key: the configuration key that names the folder.

    Raises:
        ConfigError: ``packshot.json`` is missing, broken, or names a condition that does not exist.
    """
    file = folder / METADATA_FILE
    way_out = f'Write {{"condition": "{"|".join(CONDITIONS)}"}} to {file}: the map it was trained on.'
    try:
        entries = read_entries(folder)
        grow, feather = entries.get("mask_grow", 0.0), entries.get("mask_feather", 0.0)
        control = Control(entries["condition"], float(grow), float(feather))
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {folder} has no {METADATA_FILE}.", way_out) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {file} names no condition ({error}).", way_out) from error
    if control.condition not in CONDITIONS:
        raise ConfigError(f"{key}: {file} names the unknown condition {control.condition!r}.", way_out)
    return control


def load_controlnet(key: str, source: str, unet: Any) -> Any:
    """The ControlNetModel of a folder or hub id, in fp32; without values where the UNet has none (a plan).

    Raises:
        ConfigError: it cannot be loaded, or is of another shape than the UNet; names the key.
    """
    from diffusers import ControlNetModel

    path = resolve(source)
    place = str(path) if path.exists() else source
    try:
        config: Any = ControlNetModel.load_config(place)
        wrong = [name for name in _SHAPE if _plain(config.get(name)) != _plain(unet.config.get(name))]
        if wrong:
            here = ", ".join(f"{name} {unet.config.get(name)} and not {config.get(name)}" for name in wrong)
            raise ValueError(f"the base has {here}")
        if unet.device.type == "meta":
            return ControlNetModel.from_config(config)
        return ControlNetModel.from_pretrained(place)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(f"{key}={source} cannot be loaded into this base: {reason}", hint_of_failure(path)) from error


def _plain(value: Any) -> Any:
    """Lists and tuples alike: a config read from a file has lists."""
    return list(value) if isinstance(value, (list, tuple)) else value

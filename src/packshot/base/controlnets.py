"""Reading ControlNets: a diffusers folder, and its ``packshot.json``, which names the control map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from packshot.base.adapter_metadata import METADATA_FILE, read_entries
from packshot.base.load import hint_of_failure
from packshot.config.conditions import CONDITIONS
from packshot.errors import ConfigError
from packshot.imaging.control_maps import Control
from packshot.runs.files import resolve

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

# The entries that have to equal the base's, so that residuals fit. Other entries may differ.
_SHAPE = ("block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block")


def read_control(key: str, folder: Path) -> Control:
    """The control map that the ControlNet of an export folder reads. key: the config key that names the folder.

    Raises:
        ConfigError: ``packshot.json`` is missing, broken, or names a condition that does not exist.
    """
    file = folder / METADATA_FILE
    hint = f'Write {{"condition": "{"|".join(CONDITIONS)}"}} to {file}: the map it was trained on.'
    try:
        entries = read_entries(folder)
        grow = float(entries.get("mask_grow", 0.0))
        feather = float(entries.get("mask_feather", 0.0))
        control = Control(entries["condition"], grow, feather)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {folder} has no {METADATA_FILE}.", hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{key}: {file} names no condition ({error}).", hint) from error
    if control.condition not in CONDITIONS:
        raise ConfigError(f"{key}: {file} names the unknown condition {control.condition!r}.", hint)
    return control


def load_controlnet(key: str, source: str, unet: UNet2DConditionModel) -> ControlNetModel:
    """The ControlNet of a folder or hub id, in fp32; on the meta device if the UNet is there (a plan).

    Raises:
        ConfigError: it cannot be loaded, or is of another shape than the UNet; names the key.
    """
    from diffusers import ControlNetModel

    path = resolve(source)
    place = str(path) if path.exists() else source
    try:
        config: Any = ControlNetModel.load_config(place)
        wrong = []
        for name in _SHAPE:
            own = config.get(name)
            base = unet.config.get(name)
            if as_list(own) != as_list(base):
                wrong.append(f"{name} {base} and not {own}")
        if wrong:
            raise ValueError(f"the base has {', '.join(wrong)}")
        if unet.device.type == "meta":
            return cast("ControlNetModel", ControlNetModel.from_config(config))
        return ControlNetModel.from_pretrained(place)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ConfigError(f"{key}={source} cannot be loaded into this base: {reason}", hint_of_failure(path)) from error


def as_list(value: object) -> object:
    """A tuple as a list, to compare it with a config that was read from a file."""
    return list(value) if isinstance(value, tuple) else value

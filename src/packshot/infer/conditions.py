"""Which control map a trained ControlNet expects, and that map for a working copy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from packshot.core.errors import ConfigError
from packshot.diffusion.conditions import CONDITIONS
from packshot.infer.canvas import Working


def read_condition(folder: Path) -> str:
    """The condition that ``packshot.json`` in a ControlNet's export folder names.

    Raises:
        ConfigError: the file is missing, broken, or names a condition that does not exist.
    """
    file = folder / "packshot.json"
    way_out = f'Write {{"condition": "{"|".join(CONDITIONS)}"}} to {file}: the map it was trained on.'
    try:
        name = json.loads(file.read_text())["condition"]
    except FileNotFoundError as error:
        raise ConfigError(f"adapters.controlnets: {folder} has no packshot.json.", way_out) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"adapters.controlnets: {file} names no condition ({error}).", way_out) from error
    if name not in CONDITIONS:
        raise ConfigError(f"adapters.controlnets: {file} names the unknown condition {name!r}.", way_out)
    return name


def control_map(name: str, working: Working) -> torch.Tensor:
    """float32 (1, 3, H, W): [0, 1], and -1 for unknown pixels of the inpaint map.

    The mask is the max-pooled one, so that a strap thinner than a working pixel is still known to be product.
    """
    image_HW3 = working.image_HW3.astype(np.float32) / 255
    control_HW3 = CONDITIONS[name](image_HW3, working.keep_HW.astype(np.float32))
    return torch.from_numpy(np.ascontiguousarray(control_HW3.transpose(2, 0, 1)))[None]

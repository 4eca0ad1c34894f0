"""The control map that a trained ControlNet expects, for a working copy."""

from __future__ import annotations

import numpy as np
import torch

from packshot.errors import ConfigError
from packshot.generate.canvas import Working
from packshot.imaging.control_maps import Control, View
from packshot.imaging.pixels import to_unit


def control_map(control: Control, working: Working, light: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    """float32 (1, 3, H, W): [0, 1], and -1 for unknown pixels of the inpaint map. light: see ``View.light``.

    The mask is the max-pooled one, so that a strap thinner than a working pixel is still known to be product.

    Raises:
        ConfigError: the map is drawn from a depth that is not known.
    """
    if control.needs == "depth_HW" and working.depth_HW is None:
        raise ConfigError(
            f"a ControlNet reads the product's {control.condition}, and its depth is not known.",
            "Set depth.onnx=<depth network>, or hand the depth itself to set_product.",
        )
    view = View(to_unit(working.image_HW3), working.keep_HW.astype(np.float32), working.depth_HW, light)
    return torch.from_numpy(np.ascontiguousarray(control.draw(view).transpose(2, 0, 1)))[None]

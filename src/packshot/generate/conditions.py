"""The inputs of control maps in generation: what the user is asked for, and the map that a ControlNet expects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from packshot.config import conditions
from packshot.config.conditions import INPUTS
from packshot.config.schema import GenerateSettings, Shadow
from packshot.errors import ConfigError
from packshot.generate.canvas import Working
from packshot.imaging.control_maps import Control, View, inputs_of
from packshot.imaging.pixels import to_unit
from packshot.lists import map_values
from packshot.scene import Scene


def read_by(controls: Iterable[Control]) -> set[str]:
    """The names of the inputs that the maps of ControlNets are drawn from."""
    return set(inputs_of(controls))


def refuse_unread(settings: GenerateSettings, controls: Iterable[Control]) -> None:
    """Raises ConfigError for an input that the user gives and nothing reads: it would have no effect."""
    read = read_by(controls)
    if settings.shadow is not Shadow.none:
        read.add("light")  # generate.grounding reads it
    for name, setting in conditions.settings().items():
        value = getattr(settings, setting.key)
        if value is not None and name not in read:
            raise ConfigError(
                f"{setting.key}={value:g} has no effect: no ControlNet reads {name}.",
                setting.instead,
            )


def asked_inputs(settings: GenerateSettings, scene: Scene, controls: Iterable[Control]) -> dict[str, float | None]:
    """The number of every setting by its key: the user's, or what the scene implies to a map that reads it, or
    None.

    Raises:
        ConfigError: the user gives one that nothing reads.
    """
    refuse_unread(settings, controls)
    read = read_by(controls)
    asked: dict[str, float | None] = {}
    for name, setting in conditions.settings().items():
        given = getattr(settings, setting.key)
        asked[setting.key] = setting.default(scene) if given is None and name in read else given
    return asked


def scene_inputs(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of :func:`asked_inputs` as control maps read them, by the input's name."""
    return map_values(lambda setting: setting.value(asked.get(setting.key)), conditions.settings())


def control_map(control: Control, working: Working, inputs: Mapping[str, Any] | None = None) -> torch.Tensor:
    """float32 (1, 3, H, W): [0, 1], and -1 for unknown pixels of the inpaint map. inputs: see :func:`scene_inputs`.

    The mask is the max-pooled one, so that a strap thinner than a working pixel is still known to be product.

    Raises:
        ConfigError: the map is drawn from an input that is not known.
    """
    known = {**(inputs or {}), **working.inputs}
    for name in control.inputs:
        if name not in known:
            network = INPUTS[name].network
            way = f"Set {network.key}=<a network that estimates it>, or hand" if network else "Hand"
            raise ConfigError(
                f"a ControlNet reads the product's {control.condition}, and its {name} is not known.",
                f"{way} the {name} itself to set_product.",
            )
    view = View(to_unit(working.image_HW3), working.keep_HW.astype(np.float32), known)
    return torch.from_numpy(np.ascontiguousarray(control.draw(view).transpose(2, 0, 1)))[None]

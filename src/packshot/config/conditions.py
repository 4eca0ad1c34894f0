"""One row for each ControlNet condition, and one for each input that control maps are drawn from.

Configuration, checks, training's columns, generation, HTTP form and certificate derive from the rows. To add a
condition, write its row (and that of a new input) here, and the function that draws it in ``imaging/control_maps.py``.
A row names its functions as ``module:function``, so that this module costs nothing at ``--help``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from operator import attrgetter

from packshot.config.keys import opt
from packshot.lists import map_values, without_none
from packshot.scene import Scene
from packshot.scene.light import light_angle


@dataclass(frozen=True)
class Setting:
    """What generation asks the user for an input: a number, as a config key and as a field of the HTTP form.

    default: the number where the user gives none, taken from the scene; None leaves the input open. value: what a map
    is drawn from, given the number or None. label, unit: how reports call it. instead: the way out where no ControlNet
    reads it.
    """

    key: str
    help: str
    min: float
    max: float
    default: Callable[[Scene], float | None]
    value: Callable[[float | None], object]
    label: str
    unit: str
    instead: str


@dataclass(frozen=True)
class Network:
    """The network that estimates an input from a product's photo: its config key, and the function that runs it.

    estimate: (RGB picture, path of the network) to a picture of mode L and the same size. kinds: examples of networks.
    """

    key: str
    estimate: str
    kinds: str


@dataclass(frozen=True)
class InputRow:
    """Something that control maps are drawn from, in addition to picture and mask.

    column: the picture of a dataset that training reads it from. read: (that picture, the mask), both (H, W) in [0, 1],
    to what a map is drawn from. where: which datasets have the column. directed: it tells sides,
    so pictures are not mirrored. Generation takes it from exactly one of these:
    setting, a number that the user gives; network, which estimates a picture that moves with the product.
    """

    column: str
    read: str
    where: str
    directed: bool = False
    setting: Setting | None = None
    network: Network | None = None


@dataclass(frozen=True)
class ConditionRow:
    """A control map. draw: (``imaging.control_maps.View``) to float32 (H, W, 3). inputs: names of ``INPUTS``."""

    help: str
    draw: str
    inputs: tuple[str, ...] = ()


def light_vector(angle: float | None) -> tuple[float, float]:
    """Where light comes from, (right, up) in the picture, of an angle in degrees; (0, 0) leaves it open."""
    if angle is None:
        return 0.0, 0.0
    around = math.radians(angle)
    return math.cos(around), math.sin(around)


INPUTS: dict[str, InputRow] = {
    "depth": InputRow(
        column="depth",
        read="packshot.imaging.control_maps:column_alone",
        where="Rendered sets have it; for photographs build_data.py dataset=product depth.onnx=<network> adds it.",
        network=Network("depth.onnx", "packshot.imaging.depth:estimate_depth", "MiDaS, Depth Anything"),
    ),
    "light": InputRow(
        column="shadow",
        read="packshot.imaging.light_direction:light_direction",
        where="Rendered sets have it (build_data.py dataset=rendered); photographs do not.",
        directed=True,
        setting=Setting(
            key="light_angle",
            help="where light comes from, degrees: 0 the right, 90 behind, 180 the left, 270 the front; for "
            "a shadow and ControlNets that read light; null: taken from scene.lighting, or left open",
            min=0,
            max=360,
            default=lambda scene: light_angle(scene.lighting),
            value=light_vector,
            label="light from",
            unit="degrees",
            instead="Describe it in words (scene.lighting), add shadow=contact, or train one: train_controlnet.py "
            "method.condition=light.",
        ),
    ),
}

_MAPS = "packshot.imaging.control_maps"
CONDITIONS: dict[str, ConditionRow] = {
    "inpaint": ConditionRow("background = -1", f"{_MAPS}:inpaint"),
    "canny": ConditionRow("edges of the product", f"{_MAPS}:canny"),
    "silhouette": ConditionRow("its outline", f"{_MAPS}:silhouette"),
    "softedge": ConditionRow("its gradients", f"{_MAPS}:softedge"),
    "depth": ConditionRow("its relief", f"{_MAPS}:depth", inputs=("depth",)),
    "light": ConditionRow("which side the scene's light comes from", f"{_MAPS}:light", inputs=("light",)),
}


def settings() -> dict[str, Setting]:
    """The inputs that generation asks the user for, by the input's name."""
    return without_none(map_values(attrgetter("setting"), INPUTS))


def networks(config: object) -> dict[str, str]:
    """The networks that a script's config names, by the input that each estimates."""
    paths = {}
    for name, row in INPUTS.items():
        path = row.network and attrgetter(row.network.key)(config)
        if path:
            paths[name] = path
    return paths


def picture_columns() -> list[str]:
    """The columns that control maps may be drawn from, in addition to picture and mask; pictures of one channel."""
    return list(map(attrgetter("column"), INPUTS.values()))


def column_hint(column: str) -> str:
    """Which datasets have a picture that a method reads."""
    for row in INPUTS.values():
        if row.column == column:
            return row.where
    return "build_data.py dataset=product makes masks; rendered sets have them."


def settings_class() -> type:
    """A config class with one optional number for each setting; generation's settings extend it."""
    fields: list[tuple[str, object, object]] = []
    for row in settings().values():
        fields.append((row.key, float | None, opt(None, row.help, min=row.min, max=row.max)))
    return make_dataclass("ConditionSettings", fields)


def split_condition(value: str) -> tuple[str | None, str]:
    """A ControlNet's condition, where a value names it, and its place: ``canny:owner/name`` or only the place."""
    condition, colon, place = value.partition(":")
    return (condition, place) if colon and condition in CONDITIONS else (None, value)

"""Control maps: what a ControlNet is shown of a product. The same functions in training and at inference.

All maps are float32 (H, W, 3) and know nothing of the old background: they are functions of what lies in the
keep mask, and of where light is to come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any

import cv2
import numpy as np

from packshot.config.conditions import CONDITIONS

DEPTH_FLOOR = 0.25  # the product's farthest point; 0 is where nothing is known
LIGHT_FLOOR = 0.25  # the side that light does not come from; 0 is the product


@dataclass(frozen=True)
class View:
    """A product in its frame, all of one size.

    image_HWC: RGB in [0, 1]. mask_HW: the product's alpha in [0, 1]. inputs: what else is known, by the names of
    ``config.conditions.INPUTS``:

    - depth: (H, W) nearness in [0, 1], larger is nearer, in any scale.
    - light: where the scene's light comes from, (right, up) in the picture, up being behind the product; of length 1
      where it has one side, 0 where it has none.
    """

    image_HWC: np.ndarray
    mask_HW: np.ndarray
    inputs: Mapping[str, Any] = field(default_factory=dict)


def column_alone(column_HW: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """An input that is a dataset's picture as it is."""
    return column_HW


def keep_mask(mask_HW: np.ndarray, grow: float = 0.0, feather: float = 0.0) -> np.ndarray:
    """The product's mask with its outline moved outwards by ``grow`` px (inwards if negative), float32 in [0, 1].

    feather: px over which it falls from 1 to 0, half of them on either side of the outline; 0 gives 0 and 1 alone.
    A product thinner than twice what is taken away vanishes.
    """
    solid = (mask_HW >= 0.5).astype(np.uint8)
    if not (grow or feather) or solid.all() or not solid.any():
        return solid.astype(np.float32)
    # from pixel centres to the outline, which runs between pixels; positive inside
    inside, outside = (cv2.distanceTransform(part, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for part in (solid, 1 - solid))
    distance = np.where(solid, inside - 0.5, 0.5 - outside) + grow
    return np.clip(distance / max(feather, 1e-3) + 0.5, 0, 1) if feather else (distance > 0).astype(np.float32)


def inpaint(view: View) -> np.ndarray:
    """The product's pixels, and -1 where the background is to be invented; a soft mask fades between them."""
    known = view.mask_HW[..., None]
    return np.where(known > 0, view.image_HWC * known - (1 - known), -1.0).astype(np.float32)


def edges(picture_HWC: np.ndarray) -> np.ndarray:
    return cv2.Canny((picture_HWC * 255).astype(np.uint8), 100, 200)


def on_grey(view: View) -> np.ndarray:
    """The product on grey, and its mask as bool."""
    return np.where((view.mask_HW >= 0.5)[..., None], view.image_HWC, 0.5)


def grey_map(values_HW: np.ndarray) -> np.ndarray:
    return np.repeat(values_HW.astype(np.float32)[..., None], 3, axis=2)


def silhouette(view: View) -> np.ndarray:
    """The outline of the product alone: Canny (1986) of its mask, 0 or 1."""
    return grey_map(edges(np.where(view.mask_HW >= 0.5, 1.0, 0.0)) / 255)


def canny(view: View) -> np.ndarray:
    """Edges on the product (Canny 1986) and its outline, 0 or 1."""
    return np.maximum(grey_map(edges(on_grey(view)) / 255), silhouette(view))


def softedge(view: View) -> np.ndarray:
    """How steeply the product's colours change, its outline included: Scharr's gradient, blurred by 1 px; [0, 1]."""
    shown, solid = on_grey(view).astype(np.float32), (view.mask_HW >= 0.5).astype(np.float32)
    steepness = np.zeros(solid.shape, np.float32)
    for layer_HW in (*np.moveaxis(shown, -1, 0), solid):
        smooth = cv2.GaussianBlur(np.ascontiguousarray(layer_HW), (0, 0), 1.0)
        steepness = np.maximum(steepness, np.hypot(cv2.Scharr(smooth, -1, 1, 0), cv2.Scharr(smooth, -1, 0, 1)))
    return grey_map(np.clip(steepness / 10, 0, 1))  # an ideal step from 0 to 1 gives 10.3 after that blur


def depth(view: View) -> np.ndarray:
    """The product's relief: 1 at its nearest point, ``DEPTH_FLOOR`` at its farthest, 0 outside.

    The nearest and farthest two hundredths are cut off: at the outline a depth map mixes product and background.
    """
    depth_HW = view.inputs["depth"]
    solid = view.mask_HW >= 0.5
    if not solid.any():
        return grey_map(np.zeros(solid.shape))
    far, near = np.percentile(depth_HW[solid], (2, 98))
    relief = np.clip((depth_HW - far) / max(float(near - far), 1e-6), 0, 1)
    return grey_map(np.where(solid, DEPTH_FLOOR + (1 - DEPTH_FLOOR) * relief, 0.0))


def light(view: View) -> np.ndarray:
    """Which way the light falls: a ramp from 1 on the side it comes from to ``LIGHT_FLOOR`` on the other, the flatter
    the less it has a side; 0 where the product is.
    """
    right, up = view.inputs["light"]
    height, width = view.mask_HW.shape
    ramp_HW = right * np.linspace(-1, 1, width)[None] + up * np.linspace(1, -1, height)[:, None]
    # along its steepest line the ramp spans the frame, in every direction
    ramp_HW *= np.hypot(right, up) / max(abs(right) + abs(up), 1e-6)
    lit_HW = LIGHT_FLOOR + (1 - LIGHT_FLOOR) * (np.clip(ramp_HW, -1, 1) + 1) / 2
    return grey_map(np.where(view.mask_HW >= 0.5, 0.0, lit_HW))


@dataclass(frozen=True)
class Control:
    """What a ControlNet is shown, in training as at inference; ``packshot.json`` in its export names it.

    mask_grow, mask_feather: see :func:`keep_mask`; px of the model's resolution.
    """

    condition: str
    mask_grow: float = 0.0
    mask_feather: float = 0.0

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a view must have in addition to image and mask: names of ``config.conditions.INPUTS``."""
        return CONDITIONS[self.condition].inputs

    def draw(self, view: View, shift: float = 0.0) -> np.ndarray:
        """The control map. shift: px by which the outline is moved in addition to ``mask_grow``.

        Raises:
            ValueError: the view lacks an input of the condition.
        """
        missing = [name for name in self.inputs if view.inputs.get(name) is None]
        if missing:
            raise ValueError(f"the {self.condition} condition needs {', '.join(missing)}")
        keep_HW = keep_mask(view.mask_HW, self.mask_grow + shift, self.mask_feather)
        draw = resolve_name(CONDITIONS[self.condition].draw)
        return draw(replace(view, mask_HW=keep_HW))


def inputs_of(controls: Iterable[Control]) -> list[str]:
    """What these maps are drawn from, apart from image and mask: names of ``config.conditions.INPUTS``, sorted."""
    return sorted(set().union(*map(attrgetter("inputs"), controls)))

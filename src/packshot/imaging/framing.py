"""One geometry per sample: image, mask, control map and reference go through the same resize, crop and padding."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Geometry:
    """Resize to ``resized``, then cut ``target`` at ``crop``; a negative crop pads.

    All are (height, width) or (top, left), in px.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]

    def time_ids(self) -> tuple[float, ...]:
        """SDXL's micro-conditioning (arXiv 2307.01952, 2.2): original (h, w), crop (top, left), target (h, w)."""
        top = max(0, self.crop[0])
        left = max(0, self.crop[1])
        return tuple(map(float, (*self.original, top, left, *self.target)))

    def inside(self) -> np.ndarray:
        """1 where the target shows the picture, 0 in letterbox bars; float32 (H, W)."""
        shown = np.zeros(self.target, np.float32)
        top, left = np.maximum(0, np.negative(self.crop))
        shown[top : top + self.resized[0], left : left + self.resized[1]] = 1
        return shown

    def mirrored(self) -> Geometry:
        """The geometry of the mirror image: the same resize, cut from the other side."""
        left = self.resized[1] - self.target[1] - self.crop[1]
        return Geometry(self.original, self.resized, (self.crop[0], left), self.target)


def product_box(mask: Image.Image | None) -> tuple[int, int, int, int] | None:
    """Tight (top, left, bottom, right) of a mask's pixels above half, or None when there are none."""
    if mask is None:
        return None
    shown = np.asarray(mask.convert("L")) >= 128
    # the places of all pixels would take 200 MB at 12 megapixels
    rows = np.flatnonzero(shown.any(1))
    columns = np.flatnonzero(shown.any(0))
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def location_tokens(mask: Image.Image) -> str:
    """The product's box as Florence-2 writes regions: x1, y1, x2, y2 in 1000 bins; "" where the mask is black."""
    box = product_box(mask)
    if box is None:
        return ""
    top, left, bottom, right = box
    places = ((left, mask.width), (top, mask.height), (right - 1, mask.width), (bottom - 1, mask.height))
    return "".join(f"<loc_{int(at / side * 1000)}>" for at, side in places)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Both sides times ``scale``, in whole pixels and at least one."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def plan(size: tuple[int, int], target: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Geometry:
    """The geometry that brings a picture of ``size`` (h, w) into ``target`` without stretching.

    The picture covers the target and the rest is cropped, in the middle, or shifted as far as the product's ``box``
    (top, left, bottom, right) needs. A product too large for that is letterboxed: it is never cut.
    """
    cover = max(target[0] / size[0], target[1] / size[1])
    contain = min(target[0] / size[0], target[1] / size[1])
    fits = box is None or all((box[2 + a] - box[a]) * cover <= target[a] for a in (0, 1))
    scale = cover if fits else contain
    resized = scaled_size(size, scale)
    crop = []
    for axis in (0, 1):
        start = (resized[axis] - target[axis]) // 2
        if box is not None and fits:
            low, high = int(np.floor(box[axis] * scale)), int(np.ceil(box[axis + 2] * scale))
            start = min(max(start, high - target[axis]), low)
            start = min(max(start, 0), resized[axis] - target[axis])
        crop.append(start)
    return Geometry(size, resized, (crop[0], crop[1]), target)


def reduced_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The sizes (height, width) at which a JPEG may be decoded: the whole, 1/2, 1/4 and 1/8."""
    return [(size[0] // part, size[1] // part) for part in (1, 2, 4, 8)]


def apply(geometry: Geometry, array: np.ndarray, *, hard: bool = False, pad: str = "edge") -> np.ndarray:
    """Push one picture through a geometry.

    array: (H, W) or (H, W, C), any dtype OpenCV resizes, with (H, W) == geometry.original, or decoded at 1/2, 1/4 or
        1/8 of that (``imaging.decode.decode_smaller``).
    hard: nearest neighbour, for label maps; otherwise area when shrinking and cubic when growing.
    pad: how letterbox bars are filled: "edge" repeats the border, "constant" is zero (masks).

    Raises:
        ValueError: the array has another size than the geometry was planned for.
    """
    if array.shape[:2] not in reduced_sizes(geometry.original):
        raise ValueError(f"array of {array.shape[:2]} px, geometry for {geometry.original} px")
    height, width = geometry.resized
    shrinking = height < array.shape[0]
    method = cv2.INTER_NEAREST if hard else (cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    resized = array if (height, width) == array.shape[:2] else cv2.resize(array, (width, height), interpolation=method)
    margins = []
    for axis in (0, 1):
        start, stop = geometry.crop[axis], geometry.crop[axis] + geometry.target[axis]
        margins.append((max(0, -start), max(0, stop - geometry.resized[axis])))
    margins += [(0, 0)] * (resized.ndim - 2)
    padded = (
        np.pad(resized, margins, mode="edge" if pad == "edge" else "constant") if any(map(any, margins)) else resized
    )
    top = max(0, geometry.crop[0])
    left = max(0, geometry.crop[1])
    return np.ascontiguousarray(padded[top : top + geometry.target[0], left : left + geometry.target[1]])

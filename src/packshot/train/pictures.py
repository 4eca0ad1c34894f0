"""Framed pictures as cache entries, without loss: what a method's ``condition`` draws from at every access."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from packshot.engine.packed import Tensors
from packshot.imaging.framing import Geometry
from packshot.methods.base import FramedSample

STEP = 4096  # bytes: files are filled up to a multiple, because a cache file lists every length that it holds
# Bytes a pixel and channel, for plans: where the product fills .1 to .34 of the frame it was .04 to .19 (docs/log.md).
PLANNED_BYTES = 0.2


def pack_pictures(sample: FramedSample, names: Sequence[str], reach: int | None) -> Tensors:
    """The pictures of these names and the geometry. reach: see ``Method``."""
    geometry = sample["geometry"]
    corners = (geometry.original, geometry.resized, geometry.crop, geometry.target)
    entry = {"geometry": torch.tensor(corners)}
    for name in names:
        picture = sample.get(name)
        if isinstance(picture, Image.Image):
            near = name == "image" and reach is not None
            entry[name] = to_file(near_product(picture, sample["mask"], reach or 0) if near else picture)
    return entry


def unpack_pictures(entry: Tensors) -> dict[str, Any]:
    """What :func:`pack_pictures` has packed, by name; ``geometry`` too."""
    seen: dict[str, Any] = {}
    for name, tensor in entry.items():
        if name == "geometry":
            seen[name] = Geometry(*map(tuple, tensor.tolist()))
        else:
            seen[name] = Image.open(BytesIO(tensor.numpy().tobytes()))
            seen[name].load()
    return seen


def near_product(picture: Image.Image, mask: Image.Image | None, reach: int) -> Image.Image:
    """The picture, black at more than ``reach`` px from the product."""
    if mask is None:
        return picture
    outside = (np.asarray(mask) < 128).astype(np.uint8)
    if not outside.any():
        return picture
    # the product's own pixels have distance 0; without a product nothing is near
    far = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > reach
    return Image.fromarray(np.where(far[..., None], np.uint8(0), np.asarray(picture)))


def to_file(picture: Image.Image) -> Tensor:
    """The picture as PNG, uint8 (bytes,)."""
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    content = np.frombuffer(buffer.getvalue(), np.uint8)
    return torch.from_numpy(np.pad(content, (0, -len(content) % STEP)))

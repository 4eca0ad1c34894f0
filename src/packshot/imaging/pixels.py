"""The one conversion between pictures and what networks read and draw: uint8, [0, 1], and [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def to_network(images: np.ndarray) -> Tensor:
    """Uint8 pictures (..., H, W, C) as float32 (..., C, H, W) in [-1, 1].

    The channels stay last in memory, as the picture has them: that is the fast layout of convolutions.
    """
    import torch  # two thirds of the start of a process that builds datasets, which may need no network

    return torch.from_numpy(np.asarray(images, np.float32) / 127.5 - 1).movedim(-1, -3)


def from_network(pixels: Tensor) -> np.ndarray:
    """What a network has drawn, (..., C, H, W) in about [-1, 1], as float32 (..., H, W, C) clipped to [0, 1]."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).movedim(-3, -1).cpu().numpy()


def to_unit(image: np.ndarray) -> np.ndarray:
    """Uint8 as float32 in [0, 1]."""
    return np.asarray(image, np.float32) / 255


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] as uint8, to the nearest; values outside are clipped."""
    scaled = np.clip(values, 0, 1)
    # in place: at 12 megapixels every further array costs more than the arithmetic
    np.multiply(scaled, 255, out=scaled)
    return np.rint(scaled, out=scaled).astype(np.uint8)

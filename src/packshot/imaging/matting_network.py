"""The family's segmentation network: which pixels of a product photo are the product."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packshot.errors import ConfigError
from packshot.runs.files import readable

SIDE = 128  # px; pictures are squeezed to this square, whatever their shape
PATCH = 2  # px; the network works on blocks of this side, a quarter of the cost of pixels


def alpha_logits(network: Any, pixels_B3HW: Tensor) -> Tensor:
    """(B, 1, H, W) logits of alpha. network: a UNet2DModel of ``3 * PATCH**2`` to ``PATCH**2`` channels.
    pixels: in [-1, 1]; its denoising step, which means nothing here, is always 0."""
    return F.pixel_shuffle(network(F.pixel_unshuffle(pixels_B3HW, PATCH), 0).sample, PATCH)


@torch.inference_mode()
def predict_alpha(network: Any, image_HW3: np.ndarray) -> np.ndarray:
    """Alpha of a uint8 RGB picture of any size as the network sees it: float32 (SIDE, SIDE) in [0, 1]."""
    square = cv2.resize(image_HW3, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    pixels_B3HW = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1
    return alpha_logits(network, pixels_B3HW).sigmoid()[0, 0].numpy()


@lru_cache(maxsize=1)
def load_matting(path: str) -> Any:
    """The network of a folder, once per process. Raises ConfigError: there is none, or of another shape."""
    from diffusers import UNet2DModel

    folder = readable("matte.network", path)
    try:
        network: Any = UNet2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"matte.network={path} cannot be loaded: {reason}", "Name a folder of the family.") from error
    shape = network.config.in_channels, network.config.out_channels
    if shape != (3 * PATCH**2, PATCH**2):
        raise ConfigError(
            f"matte.network={path} has {shape[0]} input and {shape[1]} output channels.",
            f"It needs {3 * PATCH**2} and {PATCH**2}, as data/models/matting has.",
        )
    return network.eval()

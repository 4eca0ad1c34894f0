"""The family's segmentation network: which pixels of a product photo are the product."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packshot.errors import ConfigError, first_line
from packshot.imaging.pixels import to_network
from packshot.runs.files import readable
from packshot.runs.networks import Network, load_whole


def patch_side(network: Network) -> int:
    """Side in px of the blocks that the network works on: it has ``3 * patch**2`` input and ``patch**2`` output
    channels, which costs far less than a network on single pixels."""
    return math.isqrt(network.config.out_channels)


def input_side(network: Network) -> int:
    """Side in px of the square that pictures of any shape are squeezed to."""
    return network.config.sample_size * patch_side(network)


def alpha_logits(network: Network, pixels_B3HW: Tensor) -> Tensor:
    """(B, 1, H, W) logits of alpha. network: a UNet2DModel, see :func:`patch_side`. pixels: in [-1, 1].

    The network's denoising step, which means nothing here, is always 0.
    """
    patch = patch_side(network)
    return F.pixel_shuffle(network(F.pixel_unshuffle(pixels_B3HW, patch), 0).sample, patch)


@torch.inference_mode()
def predict_alpha(network: Network, image_HW3: np.ndarray) -> np.ndarray:
    """Alpha of a uint8 RGB picture of any size as the network sees it: float32 in [0, 1], ``input_side`` px square."""
    side = input_side(network)
    square = cv2.resize(image_HW3, (side, side), interpolation=cv2.INTER_AREA)
    return alpha_logits(network, to_network(square[None])).sigmoid()[0, 0].numpy()


@lru_cache(maxsize=1)
def load_matting(path: str) -> Network:
    """The network of a folder, once per process. Raises ConfigError: there is none, or of another shape."""
    from diffusers import UNet2DModel

    folder = readable("matte.model", path)
    try:
        network = load_whole(UNet2DModel, folder, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"matte.model: the network in {path} cannot be loaded: {reason}",
            "Set matte.model=grabcut, or install the family again.",
        ) from error
    patch = patch_side(network)
    shape = network.config.in_channels, network.config.out_channels
    if shape != (3 * patch**2, patch**2):
        raise ConfigError(
            f"matte.model: the network in {path} has {shape[0]} input and {shape[1]} output channels.",
            "It needs a square number of output channels and three times as many inputs, as data/models/matting has.",
        )
    return network.eval()

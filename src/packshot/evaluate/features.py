"""Embeddings of pictures, by name: what distances between sets, diversity and the choice of a reference rest on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from packshot.config.schema import ModelConfig
from packshot.errors import ConfigError
from packshot.imaging.color import to_lab
from packshot.runs.networks import Network, load_whole

if TYPE_CHECKING:
    import torch

Embed = Callable[[Sequence[np.ndarray]], np.ndarray]  # uint8 (H, W, 3) pictures to float (N, D)
BATCH = 16
GREY = 127


def unit(values: np.ndarray) -> np.ndarray:
    """A vector of length 1 with the same direction; zero stays zero."""
    return values / max(float(np.linalg.norm(values)), 1e-12)


def plain_features(image_HW3: np.ndarray) -> np.ndarray:
    """What no network has a part in: colours, steepness and direction of edges, layout; each block of length 1."""
    lab_HW3 = to_lab(image_HW3)
    colours, _ = np.histogramdd(lab_HW3.reshape(-1, 3), bins=(6, 8, 8), range=((0, 100), (-80, 80), (-80, 80)))
    grey_HW = lab_HW3[..., 0]
    dx_HW = cv2.Sobel(grey_HW, cv2.CV_32F, 1, 0)
    dy_HW = cv2.Sobel(grey_HW, cv2.CV_32F, 0, 1)
    size_HW = np.hypot(dx_HW, dy_HW)
    angle_HW = np.arctan2(dy_HW, dx_HW) % np.pi
    directions, _ = np.histogram(angle_HW, bins=9, range=(0, np.pi), weights=size_HW)
    steepness, _ = np.histogram(np.log1p(size_HW), bins=12, range=(0, 7))
    layout = cv2.dct(cv2.resize(grey_HW, (32, 32), interpolation=cv2.INTER_AREA) / 100)[:6, :6]
    blocks = [unit(np.sqrt(block.ravel())) for block in (colours, directions, steepness)]
    return np.concatenate([*blocks, unit(layout.ravel())])


def by_plain_features(images: Sequence[np.ndarray]) -> np.ndarray:
    """:func:`plain_features` of each picture."""
    return np.stack([plain_features(image) for image in images])


def base_encoder(model: ModelConfig) -> Embed:
    """Embeddings by the image encoder of the base, which IP-Adapters read too.

    Raises:
        ConfigError: the base has none, or it cannot be loaded.
    """
    from packshot.base.load import Parts
    from packshot.base.sdxl import find_sources

    parts = Parts.lazily(find_sources(model))
    return in_batches(parts.feature_extractor, parts.image_encoder)


def named_encoder(place: str, key: str) -> Embed:
    """Embeddings by an image encoder of transformers (CLIP, DINOv2, ...), a folder or a hub id.

    key: the config key that names it.

    Raises:
        ConfigError: there is no such model, or its files are damaged.
    """
    from transformers import AutoImageProcessor

    try:
        return in_batches(AutoImageProcessor.from_pretrained(place), image_network(place).eval())
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}={place} cannot be loaded ({error}).", "Name a model of transformers.") from error


def image_network(place: str) -> Network:
    """The network of a folder or hub id; without its pooling layer where the files have none, as those of DINO and of
    classifiers.

    Raises:
        OSError, TypeError, ValueError: it cannot be loaded whole.
    """
    from transformers import AutoModel

    try:
        return load_whole(AutoModel, place, ("",))
    except ValueError as error:
        if "pooler." not in str(error):
            raise
        return load_whole(AutoModel, place, ("",), add_pooling_layer=False)


def in_batches(processor: Callable[..., Mapping[str, torch.Tensor]], model: torch.nn.Module) -> Embed:
    """What embeds pictures by a vision model, or by the vision half of a model with two."""
    import torch

    def embed(images: Sequence[np.ndarray]) -> np.ndarray:
        found = []
        for start in range(0, len(images), BATCH):
            batch = [Image.fromarray(image) for image in images[start : start + BATCH]]
            pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                found.append(pooled(model, pixel_values).float().numpy())
        return np.concatenate(found)

    return embed


def pooled(model: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(N, D) embeddings: the projection of CLIP where there is one, else the pooled output, else the first token."""
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=pixel_values)  # type: ignore[operator]
        return getattr(found, "pooler_output", found)
    outputs = model(pixel_values=pixel_values)
    embeds = getattr(outputs, "image_embeds", None)
    embeds = getattr(outputs, "pooler_output", None) if embeds is None else embeds
    return outputs.last_hidden_state[:, 0] if embeds is None else embeds


def without_product(image_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The picture with its product painted grey, so that scenes are compared and not products."""
    return np.where((mask_HW >= 128)[..., None], np.uint8(GREY), image_HW3)

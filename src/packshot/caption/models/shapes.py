"""Captioners without their weights, on the meta device: a plan is made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from packshot.lists import without
from packshot.runs.files import resolve
from packshot.runs.networks import Network

Settings: TypeAlias = Any  # a config of transformers, whose parts are annotated as optional
PROMPT = 16  # tokens of an instruction, roughly
# The published shapes (Xiao et al. 2023, arXiv 2311.06242, table 3): (vision, language). Nothing has to be fetched.
FLORENCE = {
    "base": (
        {"embed_dim": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "projection_dim": 768},
        {"d_model": 768, "layers": 6, "attention_heads": 12, "ffn_dim": 3072},
    ),
    "large": (
        {"embed_dim": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64), "projection_dim": 1024},
        {"d_model": 1024, "layers": 12, "attention_heads": 16, "ffn_dim": 4096},
    ),
}
FLORENCE_SIDE = 768


@dataclass(frozen=True)
class MetaCaptioner:
    """A captioner without values.

    batch: from (pictures, written tokens) to the inputs of its forward pass. layers: decoder layers that every written
    token goes through. reader: the part whose weights are read again for every token. cross_layers: as
    ``weights.apply_tuning`` takes them.
    """

    network: Network
    batch: Callable[[int, int], dict[str, Tensor]]
    layers: int
    reader: torch.nn.Module
    cross_layers: str = ""


def empty_ids(*shape: int) -> Tensor:
    """Token ids, or other whole numbers."""
    return torch.empty(*shape, dtype=torch.long, device="meta")


def florence2(weights: str) -> MetaCaptioner:
    """Florence-2 of a local folder, else of the published shapes: large if the name says so."""
    folder = resolve(weights)
    side = FLORENCE_SIDE
    config: Settings = published_florence("large" if "large" in Path(weights).name else "base")
    if folder.is_dir():
        config = AutoConfig.from_pretrained(folder)
        side = json.loads((folder / "processor_config.json").read_text())["image_processor"]["crop_size"]["height"]
    with torch.device("meta"):
        network: Network = Florence2ForConditionalGeneration(config)
    # a token for each cell of the last feature map, and one for the mean of all
    cells = side
    for stride in config.vision_config.patch_stride:
        cells = -(-cells // stride)
    read = cells**2 + 1 + PROMPT

    def batch(pictures: int, written: int) -> dict[str, Tensor]:
        return {
            "input_ids": empty_ids(pictures, read),
            "pixel_values": torch.empty(pictures, 3, side, side, device="meta"),
            "decoder_input_ids": empty_ids(pictures, written),
        }

    return MetaCaptioner(network, batch, config.text_config.decoder_layers, network.model.language_model.decoder)


def published_florence(size: str, text: dict[str, object] | None = None) -> Florence2Config:
    """The config of Florence-2 "base" or "large". text: further settings of the language model, such as token ids."""
    shape, language = FLORENCE[size]
    strides = {"patch_size": (7, 3, 3, 3), "patch_stride": (4, 2, 2, 2), "patch_padding": (3, 1, 1, 1)}
    prenorm = {"patch_prenorm": (False, True, True, True), "window_size": 12, "depths": (1, 1, 9, 1)}
    named = {"vocab_size": 51289, "max_position_embeddings": 1024, "d_model": language["d_model"]}
    for name, value in without(language, "d_model").items():
        named |= {f"encoder_{name}": value, f"decoder_{name}": value}
    config = Florence2Config(
        text_config={"model_type": "bart", **(text or {}), **named},
        vision_config={**shape, "num_groups": shape["num_heads"], **strides, **prenorm},
    )
    config.tie_word_embeddings = True
    return config


def mllama(weights: str) -> MetaCaptioner:
    """Llama 3.2 Vision of a local folder, else of the published 11 B, which are the defaults of transformers."""
    folder = resolve(weights)
    config: Settings = AutoConfig.from_pretrained(folder) if folder.is_dir() else MllamaConfig()
    with torch.device("meta"):
        network: Network = MllamaForConditionalGeneration(config)
    vision = config.vision_config
    tiles, side = vision.max_num_tiles, vision.image_size

    def batch(pictures: int, written: int) -> dict[str, Tensor]:
        length = PROMPT + written
        return {
            "input_ids": empty_ids(pictures, length),
            "pixel_values": torch.empty(pictures, 1, tiles, 3, side, side, device="meta"),
            "aspect_ratio_ids": empty_ids(pictures, 1),
            "aspect_ratio_mask": empty_ids(pictures, 1, tiles),
            "cross_attention_mask": empty_ids(pictures, length, 1, tiles),
        }

    text = config.text_config
    crossing = [layer for layer in text.cross_attention_layers if layer < text.num_hidden_layers]
    return MetaCaptioner(
        network, batch, text.num_hidden_layers, network.model.language_model, "|".join(map(str, crossing))
    )

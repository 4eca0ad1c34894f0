"""SDXL's parts without their weights, on the meta device: a plan is made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from packshot.base.load import Parts
from packshot.base.sdxl import PARTS
from packshot.config.schema import ModelConfig
from packshot.runs.files import resolve

Config: TypeAlias = dict[str, Any]  # of a model, by the names of its library

# The published shapes (Podell et al. 2023, arXiv 2307.01952, section 2.1 and table 1): nothing has to be fetched.
UNET: Config = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: Config = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
# Not a shape, but published with them: the noise schedule.
SCHEDULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}
VISION = {  # CLIP-ViT-H/14, which SDXL's IP-Adapters read
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


def meta_parts(model: ModelConfig) -> Parts:
    """The parts of a model config without weights: the shapes of a local folder, else the published ones of SDXL.

    Tokenizers, scheduler and feature extractor are None.
    """
    folder = resolve(model.config or model.base)
    with torch.device("meta"):
        networks = published_networks()
        if folder.is_dir():
            networks |= local_networks(folder)
    for network in networks.values():
        network.requires_grad_(False).eval()
    parts = Parts.lazily({})
    for name in PARTS:
        setattr(parts, name, networks.get(name))
    return parts


def local_networks(folder: Path) -> dict[str, torch.nn.Module]:
    """The networks that a base's folder describes, by part."""
    makers: dict[str, Callable[[], Any]] = {  # diffusers types what it makes as a tuple too
        "unet": lambda: UNet2DConditionModel.from_config(read_config(folder, "unet")),
        "vae": lambda: AutoencoderKL.from_config(read_config(folder, "vae")),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder")),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(
            CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder_2")
        ),
        "image_encoder": lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig.from_pretrained(folder, subfolder="image_encoder")
        ),
    }
    networks = {}
    for name, make in makers.items():
        if (folder / name / "config.json").is_file():  # SDXL's own repository has no image encoder
            networks[name] = make()
    return networks


def read_config(folder: Path, part: str) -> Config:
    """The config of one part of a base's folder."""
    return json.loads((folder / part / "config.json").read_text())


def published_networks() -> dict[str, torch.nn.Module]:
    """The networks of SDXL's own shapes, by part."""
    return {
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)),  # type: ignore[arg-type]
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_2)),  # type: ignore[arg-type]
        "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)),  # type: ignore[arg-type]
    }

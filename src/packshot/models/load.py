"""Loading SDXL's parts. ``mini`` and ``sdxl`` differ in the paths of the config and in nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from packshot.config.schema import ModelConfig
from packshot.core.errors import ConfigError
from packshot.core.storage import resolve


@dataclass
class Parts:
    """Everything SDXL consists of, named as in its pipeline. All frozen and in eval mode.

    Typed Any because the libraries' annotations call every model config a dict and every output a tuple.
    """

    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel
    text_encoder_2: Any  # CLIPTextModelWithProjection
    tokenizer: Any  # CLIPTokenizer
    tokenizer_2: Any  # CLIPTokenizer
    unet: Any  # UNet2DConditionModel
    scheduler: Any  # EulerDiscreteScheduler
    image_encoder: Any  # CLIPVisionModelWithProjection
    feature_extractor: Any  # CLIPImageProcessor

    def pipeline_components(self) -> dict[str, Any]:
        """Keyword arguments for the stock SDXL pipelines."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Move all models; UNet and encoders take ``dtype``, the VAE stays fp32 (SDXL's overflows in fp16)."""
        for name in ("text_encoder", "text_encoder_2", "unet", "image_encoder"):
            getattr(self, name).to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=torch.float32)
        return self


def _source(key: str, value: str) -> str:
    """A local folder as an absolute path, or a hub id as it is."""
    path = resolve(value)
    if path.exists():
        return str(path)
    if value.startswith((".", "/", "data/", "outputs/")) or value.count("/") != 1:
        raise ConfigError(f"{key}={value}: no such folder.", "Give a model folder or a hub id (owner/name).")
    return value


def _from_pretrained(key: str, cls: Any, source: str, **arguments: Any) -> Any:
    try:
        return cls.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        where = f"{source}/{arguments['subfolder']}" if arguments.get("subfolder") else source
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{key}: {where} holds no {cls.__name__} that can be loaded ({reason}).",
            "Give a complete local folder, or a hub id on a machine that reaches the hub.",
        ) from error


def load_parts(model: ModelConfig) -> Parts:
    """Load the parts that a model config names, in fp32 on the CPU.

    Raises:
        ConfigError: a folder or hub id cannot be loaded; names the key.
    """
    # Their bars and remarks on loading say nothing about the run at hand and bury our own lines.
    transformers.utils.logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    base = _source("model.base", model.base)
    models: dict[str, Any] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
        "unet": UNet2DConditionModel,
    }
    loaded: dict[str, Any] = {
        name: _from_pretrained("model.base", cls, base, subfolder=name, torch_dtype=torch.float32)
        if name == "unet"
        else _from_pretrained("model.base", cls, base, subfolder=name, dtype=torch.float32)
        for name, cls in models.items()
    }
    for name in ("tokenizer", "tokenizer_2"):
        loaded[name] = _from_pretrained("model.base", CLIPTokenizer, base, subfolder=name)
    loaded["scheduler"] = _from_pretrained("model.base", EulerDiscreteScheduler, base, subfolder="scheduler")
    vae_arguments: dict[str, Any] = {} if model.vae else {"subfolder": "vae"}
    vae = _source("model.vae", model.vae) if model.vae else base
    loaded["vae"] = _from_pretrained("model.vae", AutoencoderKL, vae, torch_dtype=torch.float32, **vae_arguments)
    if model.image_encoder:
        encoder, sub, sub_processor = _source("model.image_encoder", model.image_encoder), {}, {}
    else:
        encoder, sub, sub_processor = base, {"subfolder": "image_encoder"}, {"subfolder": "feature_extractor"}
    key = "model.image_encoder"
    loaded["image_encoder"] = _from_pretrained(key, CLIPVisionModelWithProjection, encoder, dtype=torch.float32, **sub)
    loaded["feature_extractor"] = _from_pretrained(key, CLIPImageProcessor, encoder, **sub_processor)
    for name in ("vae", "unet", "text_encoder", "text_encoder_2", "image_encoder"):
        loaded[name].requires_grad_(False).eval()
    return Parts(**loaded)


def model_folder(model: ModelConfig) -> Path | None:
    """The base's folder when it is local (for hashes in certificates and cards), else None."""
    path = resolve(model.base)
    return path if path.is_dir() else None


def weights_hash(*modules: torch.nn.Module) -> str:
    """Digest of parameters and buffers: the identity of a model inside cache keys, whatever file it came from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(str(tensor.dtype).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

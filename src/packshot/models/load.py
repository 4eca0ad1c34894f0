"""Loading SDXL's parts. ``mini`` and ``sdxl`` differ in the paths of the config and in nothing else."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
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

from packshot.config.schema import ModelConfig, Quantization
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
        _settle(self.unet, device, dtype)
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


def _nf4(linear: torch.nn.Linear) -> torch.nn.Module:
    """Four-bit normal floats in blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    make: Any = Params4bit  # checkers take its signature for a tensor's
    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    weight = make(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(linear.weight.device)
    # On CPUs with AVX-512 BF16 it would repack its weights at the first evaluation, for a kernel without a gradient,
    # and fail where a row is no whole number of blocks.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _int8(linear: torch.nn.Linear) -> torch.nn.Module:
    """A byte per weight, activations beyond 6 kept whole (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339)."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    make: Any = Int8Params  # checkers take its signature for a tensor's
    with torch.device("meta"):
        layer = Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    weight = make(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to(linear.weight.device)
    return layer


QUANTIZERS: dict[Quantization, Callable[[torch.nn.Linear], torch.nn.Module]] = {
    Quantization.nf4: _nf4,
    Quantization.int8: _int8,
}


def quantize(unet: torch.nn.Module, quantization: Quantization) -> None:
    """Replace the linear layers of a frozen UNet's transformers, where they stand; convolutions stay as they are.

    diffusers' ``BitsAndBytesConfig`` would do it while loading, but refuses machines without a GPU.

    Raises:
        ConfigError: bitsandbytes cannot do it on this machine.
    """
    # it says at every layer and step that inputs are cast
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    linears = {name: m for name, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and "attentions." in name}
    try:
        for name, linear in linears.items():
            layer: Any = QUANTIZERS[quantization](linear)
            layer.bias = linear.bias
            unet.set_submodule(name, layer)
    except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.quantization={quantization} does not work on this machine ({reason}).",
            "Set model.quantization=none.",
        ) from error


def _settle(unet: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """What bitsandbytes' layers keep besides their parameters follows a move to ``device`` and ``dtype``."""
    layers: list[Any] = list(unet.modules())
    for layer in layers:
        if hasattr(layer, "compute_dtype"):  # a four-bit layer would keep the dtype of its first input for good
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
        elif hasattr(layer, "state") and hasattr(layer.weight, "SCB"):  # eight bits: codes and scales of rows
            for holder in (layer.weight, layer.state):
                for name in ("CB", "SCB"):
                    tensor = getattr(holder, name)
                    setattr(holder, name, None if tensor is None else tensor.to(device))


def load_parts(model: ModelConfig) -> Parts:
    """Load the parts that a model config names, in fp32 on the CPU; the UNet quantised if the config says so.

    Raises:
        ConfigError: a folder or hub id cannot be loaded, or the UNet not quantised; names the key.
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
    if model.quantization is not Quantization.none:
        quantize(loaded["unet"], model.quantization)
        loaded["unet"].eval()
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

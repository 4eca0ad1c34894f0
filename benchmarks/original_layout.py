"""A base as one checkpoint in the layout of the published SDXL code, made from the parts of a pipeline folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packshot.base.load import Parts
from packshot.base.original_names import block_names, original_name

RESNET = {"conv_shortcut": "nin_shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_tensors(unet: Any) -> dict[str, Tensor]:
    """The UNet's tensors under their published names."""
    names = block_names(unet.config)
    tensors = {}
    for key, tensor in unet.state_dict().items():
        module, _, leaf = key.rpartition(".")
        tensors[f"model.diffusion_model.{original_name(module, names)}.{leaf}"] = tensor
    return tensors


def vae_name(key: str, blocks: int) -> str:
    """The published name of one of the VAE's tensors. blocks: resolutions of the VAE."""
    for ours, theirs in {**RESNET, **ATTENTION}.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    parts = key.split(".")
    if parts[1] in ("down_blocks", "up_blocks"):
        number = int(parts[2])
        kind = parts[1].removesuffix("_blocks")
        number = blocks - 1 - number if kind == "up" else number
        rest = {"resnets": "block", "downsamplers": "downsample", "upsamplers": "upsample"}[parts[3]]
        tail = parts[4:] if rest == "block" else parts[5:]
        return ".".join([parts[0], kind, str(number), rest, *tail])
    return key


def vae_tensors(vae: Any, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """The VAE's tensors under their published names, where its attention is made of convolutions."""
    tensors = {}
    for key, tensor in vae.state_dict().items():
        if ".attentions." in key and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors[prefix + vae_name(key, len(vae.config.block_out_channels))] = tensor
    return tensors


def clip_tensors(encoder: nn.Module) -> dict[str, Tensor]:
    """The first text encoder's tensors."""
    prefix = "conditioner.embedders.0.transformer.text_model."
    return {prefix + key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}


def open_clip_tensors(encoder: Any) -> dict[str, Tensor]:
    """The second text encoder's tensors in OpenCLIP's layout, with queries, keys and values in one matrix."""
    prefix = "conditioner.embedders.1.model."
    state = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    tensors = {
        f"{prefix}positional_embedding": state["embeddings.position_embedding.weight"],
        f"{prefix}token_embedding.weight": state["embeddings.token_embedding.weight"],
        f"{prefix}text_projection": state["text_projection.weight"].T.contiguous(),
        f"{prefix}logit_scale": torch.zeros(()),
    }
    renamed = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for leaf in ("weight", "bias"):
        tensors[f"{prefix}ln_final.{leaf}"] = state[f"final_layer_norm.{leaf}"]
        for layer in range(encoder.config.num_hidden_layers):
            ours, theirs = f"encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for name, other in {**renamed, "self_attn.out_proj": "attn.out_proj"}.items():
                tensors[f"{theirs}.{other}.{leaf}"] = state[f"{ours}.{name}.{leaf}"]
            three = [state[f"{ours}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(three)
    return tensors


def checkpoint(parts: Parts, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Everything that a published SDXL checkpoint in one file has."""
    tensors = {
        **unet_tensors(parts.unet),
        **vae_tensors(parts.vae),
        **clip_tensors(parts.text_encoder),
        **open_clip_tensors(parts.text_encoder_2),
    }
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}

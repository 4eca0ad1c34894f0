"""The stock diffusers pipeline with every adapter that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    MultiControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPipeline,
)

from packshot.base.adapter_metadata import common_metadata
from packshot.base.controlnets import load_controlnet
from packshot.base.inpainting import CONV_FILE, load_conv, reads_product, split_conv_in
from packshot.base.load import Parts, load_parts, trained_scheduler
from packshot.config.schema import (
    AdaptersConfig,
    InferenceConfig,
    InferenceDtype,
    ModelConfig,
    Offload,
    ProductConditioning,
    Unconditional,
)
from packshot.errors import ConfigError
from packshot.generate.adapter_schedule import ALWAYS, Span, Switch
from packshot.generate.adapters import (
    AdapterEntry,
    Pipe,
    adapter_entries,
    adapter_folders,
    add_adapters,
    unloadable,
)
from packshot.generate.identity import describe_weights
from packshot.generate.json_types import Json
from packshot.imaging.control_maps import Control
from packshot.runs.networks import Network


@dataclass(frozen=True)
class Models:
    """A pipeline ready to draw.

    controls, controlnet_scales, controlnet_spans: what each ControlNet is shown, its weight, and the shares of the
        steps between which it counts; in the pipeline's order.
    switches: the other adapters that do not count at every step.
    has_ip_adapter: every call must then bring image embeddings.
    product_conditioning: how the network sees the product during denoising; a name of ``ProductConditioning``.
    unit: sides of the working copy are multiples of this, px.
    resolution: side of the square the base was trained on, px.
    prompt_chunks: how many chunks of a prompt the adapters were trained with.
    manifest: names and SHA-256 of everything that was loaded, for certificates.
    device: where the networks compute.
    """

    pipe: StableDiffusionXLPipeline | StableDiffusionXLControlNetPipeline
    controls: tuple[Control, ...]
    controlnet_scales: tuple[float, ...]
    controlnet_spans: tuple[Span, ...]
    switches: tuple[Switch, ...]
    has_ip_adapter: bool
    product_conditioning: str
    unit: int
    resolution: int
    prompt_chunks: int
    manifest: Json
    device: torch.device


def pick_device(asked: InferenceDtype = InferenceDtype.auto) -> tuple[torch.device, torch.dtype]:
    """CUDA when there is one, otherwise the CPU; and the precision, by default fp16 on CUDA and fp32 on a CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if asked is InferenceDtype.auto:
        return device, torch.float16 if cuda else torch.float32
    if asked is InferenceDtype.float16 and not cuda:
        raise ConfigError("inference.dtype=float16 needs a GPU.", "Set inference.dtype=bfloat16 or float32.")
    return device, getattr(torch, asked.name)


def offloads_networks(inference: InferenceConfig, device: torch.device) -> bool:
    """Whether networks wait in main memory until they work. Raises ConfigError where there is no other memory."""
    offloads = inference.offload is not Offload.none
    if offloads and device.type == "cpu":
        raise ConfigError("inference.offload=model needs a GPU.", "Leave it out: on a CPU all is in main memory.")
    return offloads


def load_models(
    model: ModelConfig, adapters: AdaptersConfig | None = None, inference: InferenceConfig | None = None
) -> Models:
    """Load base and adapters.

    Raises:
        ConfigError: a part is missing, broken or does not fit the base; names the key.
    """
    adapters = adapters or AdaptersConfig()
    inference = inference or InferenceConfig()
    folders = adapter_folders(adapters)
    metadata = common_metadata(folders)
    entries = adapter_entries(adapters, folders)
    device, dtype = pick_device(inference.dtype)
    offloads = offloads_networks(inference, device)
    parts = load_parts(model, dtype).to(torch.device("cpu") if offloads else device, dtype)
    parts.scheduler = trained_scheduler(parts.scheduler, metadata.prediction_type, metadata.zero_terminal_snr)
    shown = set_product_input(parts.unet, folders["lora"], metadata.product_conditioning)
    pipe = make_pipeline(parts, folders["controlnets"], references=bool(folders["ip_adapter"]))
    if inference.vae_tiling:
        pipe.vae.enable_tiling()
    switches = add_adapters(pipe, entries, adapters.ip_adapter_layers)
    if metadata.unconditional == Unconditional.empty.name:  # the encoded '' instead of the zeros that SDXL's base has
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    if offloads:
        pipe.enable_model_cpu_offload(device=device)
    stated = {
        "device": device.type,
        "vae_tiling": inference.vae_tiling,
        "dtype": str(dtype).removeprefix("torch."),
        "product_shown": shown,
        "prediction_type": pipe.scheduler.config.prediction_type,
    }
    controlnets = [entry for entry in entries if entry.control]
    return Models(
        pipe=pipe,
        controls=tuple(filter(None, map(attrgetter("control"), controlnets))),
        controlnet_scales=tuple(map(attrgetter("scale"), controlnets)),
        controlnet_spans=tuple(map(attrgetter("span"), controlnets)),
        switches=tuple(switch for switch in switches if switch.span != ALWAYS),
        has_ip_adapter=bool(folders["ip_adapter"]),
        product_conditioning=shown,
        unit=pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1),
        resolution=model.resolution,
        prompt_chunks=metadata.prompt_chunks,
        manifest=describe_models(model, entries) | stated,
        device=device,
    )


def make_pipeline(parts: Parts, controlnets: list[Path], references: bool) -> Pipe:
    """The stock pipeline of a base, with its ControlNets. references: whether an IP-Adapter is to read some.

    Raises:
        ConfigError: a ControlNet does not fit the base.
    """
    components = parts.pipeline_components(references=references)
    if not controlnets:
        pipe: Pipe = StableDiffusionXLPipeline(**components)
    else:
        nets = []
        for folder in controlnets:
            net: Any = load_controlnet("adapters.controlnets", str(folder), parts.unet)
            nets.append(net.eval().to(parts.unet.device, parts.unet.dtype))
        pipe = StableDiffusionXLControlNetPipeline(**components, controlnet=MultiControlNetModel(nets))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def set_product_input(unet: Network, loras: list[Path], shown: str) -> str:
    """Give the UNet the input channels in which it reads the product, if it does; returns how the product is shown."""
    channels = ProductConditioning.channels.name
    if shown == channels:
        own = [folder for folder in loras if (folder / CONV_FILE).is_file()]
        if len(own) > 1:
            raise ConfigError(
                f"adapters.loras: {own[0]} and {own[1]} both bring input channels, and the base has one set of them.",
                "Use one of the two.",
            )
        for folder in own or loras[:1]:
            try:
                load_conv(unet, folder)
            except (OSError, ValueError, KeyError) as error:
                raise unloadable("adapters.lora", folder, error) from error
    elif reads_product(unet):  # an inpainting base, and adapters that were not trained on one
        split_conv_in(unet)
        return channels
    return shown


def describe_models(model: ModelConfig, entries: list[AdapterEntry]) -> Json:
    """Names and SHA-256 of the base and of every adapter, for certificates."""
    used = {"base": model.base, "vae": model.vae}
    if any(entry.kind == "ip_adapter" for entry in entries):
        used["image_encoder"] = model.image_encoder
    parts: Json = {name: describe_weights(value) for name, value in used.items() if value}
    merged = []
    for value, scale in zip(model.loras, model.merged_loras(), strict=True):
        merged.append({**describe_weights(value), "scale": scale})
    if merged:
        parts["merged_loras"] = merged
    parts["adapters"] = [entry.describe() for entry in entries]
    return parts

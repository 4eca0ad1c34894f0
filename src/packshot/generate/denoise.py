"""Text and reference to embeddings, noise to a decoded picture; the product's known latents guide the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from packshot.base.inpainting import ProductConv, product_channels
from packshot.base.prompts import Piece, count_chunks, embed, split_weights
from packshot.base.schedulers import sampling_with
from packshot.base.tokens import lost_words
from packshot.config.schema import GenerateSettings
from packshot.diffusion.hold_product import Callback
from packshot.diffusion.latents import encode_pixels
from packshot.diffusion.sample import NotFiniteError, sample
from packshot.errors import PackshotError
from packshot.generate.adapter_schedule import switching
from packshot.generate.adapters import Pipe
from packshot.generate.canvas import Working
from packshot.generate.conditions import control_map, scene_inputs
from packshot.generate.load import Models
from packshot.generate.references import Reference, image_embeds
from packshot.imaging.pixels import from_network, to_network
from packshot.runs.folder import log

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Conditioning:
    """All that steers the denoiser besides the product: keyword arguments of the pipeline, and what did not fit.

    lost_words: the tail of the prompt (and of the negative prompt) beyond the text encoders' 77 tokens, "" if none.
    inputs: what control maps are drawn from besides the product, see ``scene_inputs``.
    """

    arguments: dict[str, Any]
    lost_words: dict[str, str]
    inputs: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def encode(
    models: Models,
    prompt: str,
    settings: GenerateSettings,
    references: Sequence[Reference] = (),
    inputs: Mapping[str, Any] | None = None,
) -> Conditioning:
    """Encode prompt, negative prompt and references once for all pictures of a request.

    Without words the prompt is what a dropped one is in training: zeros, of a base whose pipeline has them for that.
    """
    pipe = models.pipe
    guided = settings.guidance_scale > 1
    prompts = {"prompt": prompt, "negative_prompt": settings.negative_prompt or ""}
    pieces = {key: split_weights(text) if settings.prompt_weights else [Piece(text)] for key, text in prompts.items()}
    if not settings.prompt_weights:
        name_weights(prompts)
    needed = max(count_chunks(pipe.tokenizer, parts) for parts in pieces.values())
    chunks = max(models.prompt_chunks, min(needed, settings.prompt_chunks))
    lost = {}
    for key, text in prompts.items():
        cut = count_chunks(pipe.tokenizer, pieces[key]) > chunks
        lost[key] = lost_words(pipe.tokenizer, text, chunks) if cut else ""
        if lost[key]:
            log.warning("%s is longer than prompt_chunks=%d reads, lost: %r", key, chunks, lost[key])
    weighted = any(piece.weight != 1 for piece in chain.from_iterable(pieces.values()))
    if chunks > 1 or weighted:
        embeds = embed_chunks(pipe, pieces, chunks, guided, settings.negative_prompt is None)
    else:
        embeds = pipe.encode_prompt(
            prompt, device=models.device, do_classifier_free_guidance=guided, negative_prompt=settings.negative_prompt
        )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    arguments: dict[str, Any] = dict(zip(names, embeds, strict=True))
    if not prompt and pipe.config.force_zeros_for_empty_prompt:
        arguments |= {name: torch.zeros_like(arguments[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    if models.has_ip_adapter:
        arguments["ip_adapter_image_embeds"] = [image_embeds(pipe, references, guided, models.device)]
    return Conditioning(arguments, lost, inputs or scene_inputs({}))


def name_weights(prompts: Mapping[str, str]) -> None:
    """Say which words of prompts have weights that are not asked for, and are read as text."""
    for key, text in prompts.items():
        weighted = [f"({piece.text}:{piece.weight:g})" for piece in split_weights(text) if piece.weight != 1]
        if weighted:
            words = ", ".join(weighted)
            log.warning("%s: %s is read as it stands; prompt_weights=true reads it as a weight", key, words)


def embed_chunks(
    pipe: Pipe, pieces: Mapping[str, list[Piece]], chunks: int, guided: bool, silent: bool
) -> tuple[torch.Tensor | None, ...]:
    """What ``pipe.encode_prompt`` returns, of prompts in chunks. silent: there is no negative prompt; then it is zeros
    where the pipeline has it so."""
    dtype = pipe.text_encoder_2.dtype
    positive = embed(pipe, pieces["prompt"], chunks)
    if not guided:
        return positive.prompt_embeds_1LD.to(dtype), None, positive.pooled_1D.to(dtype), None
    negative = embed(pipe, pieces["negative_prompt"], chunks)
    states = negative.prompt_embeds_1LD
    pooled = negative.pooled_1D
    if silent and pipe.config.force_zeros_for_empty_prompt:
        states = torch.zeros_like(states)
        pooled = torch.zeros_like(pooled)
    return positive.prompt_embeds_1LD.to(dtype), states.to(dtype), positive.pooled_1D.to(dtype), pooled.to(dtype)


def product_pixels(working: Working) -> torch.Tensor:
    """The product as the VAE reads it, (1, 3, H, W) in [-1, 1]; channels first in memory, as the VAE's weights are."""
    return to_network(working.image_HW3[None]).contiguous()


def product_input(vae: Any, working: Working) -> torch.Tensor:
    """What an inpainting UNet reads of the product, (1, 5, h, w)."""
    keep_11HW = torch.from_numpy(working.keep_HW.astype(np.float32))[None, None]
    masked = encode_pixels(vae, product_pixels(working) * keep_11HW)
    return product_channels(keep_11HW.to(masked.device), masked)


@dataclass(frozen=True)
class EncodedProduct:
    """A product as the networks read it, the same for all pictures of a request.

    known_1CHW: its scaled latents. shown_15hw: what an inpainting UNet reads besides; None for other UNets.
    """

    known_1CHW: torch.Tensor
    shown_15hw: torch.Tensor | None


@torch.no_grad()
def encode_product(models: Models, working: Working) -> EncodedProduct:
    """A product's latents, at one working size."""
    pipe: Pipe = models.pipe
    shown = None
    if isinstance(pipe.unet.conv_in, ProductConv):
        shown = product_input(pipe.vae, working).to(models.device)
    return EncodedProduct(encode_pixels(pipe.vae, product_pixels(working)), shown)


def control_arguments(models: Models, working: Working, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's arguments for its ControlNets, if it has any."""
    if not models.controls:
        return {}
    starts, ends = zip(*models.controlnet_spans, strict=True)
    return {
        "image": [control_map(control, working, inputs) for control in models.controls],
        "controlnet_conditioning_scale": list(models.controlnet_scales),
        "control_guidance_start": list(starts),
        "control_guidance_end": list(ends),
    }


def notifying(callback: Callback, on_step: OnStep | None) -> Callback:
    """``callback`` that calls ``on_step`` after every denoising step."""
    if on_step is None:
        return callback

    def notified(
        pipe: Pipe, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        on_step()
        return callback(pipe, step, timestep, tensors)

    return notified


@torch.no_grad()
def denoise(
    models: Models,
    working: Working,
    conditioning: Conditioning,
    settings: GenerateSettings,
    seed: int,
    on_step: OnStep | None = None,
    product: EncodedProduct | None = None,
) -> np.ndarray:
    """One picture, decoded: float32 (H, W, 3) in [0, 1] at the working size.

    How the network sees the product meanwhile is what the adapters were trained on. An exception of ``on_step``, which
    is called after every step, ends the denoising and is passed on. product: encoded before for this working size.

    Raises:
        PackshotError: the denoiser or the decoder produced NaN or infinity.
    """
    pipe: Pipe = models.pipe
    product = product or encode_product(models, working)
    if product.shown_15hw is not None:
        pipe.unet.conv_in.show(product.shown_15hw)
    steps = settings.num_inference_steps
    try:
        with sampling_with(pipe, settings.scheduler):
            pixels = sample(
                pipe,
                product.known_1CHW,
                torch.from_numpy(working.held_hw[None].astype(np.float32)).to(models.device),
                models.product_conditioning,
                seed,
                steps,
                wrap=lambda hold: switching(models.switches, steps, notifying(hold, on_step)),
                guidance_scale=settings.guidance_scale,
                **conditioning.arguments,
                **control_arguments(models, working, conditioning.inputs),
            )
    except NotFiniteError as error:
        raise PackshotError(
            f"the denoiser produced NaN or infinity for seed {seed}.",
            "Lower guidance_scale or the adapters' scales, and check the adapters' training for NaN.",
        ) from error
    return from_network(pixels)

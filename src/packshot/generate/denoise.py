"""Text and reference to embeddings, noise to a decoded picture; the product's known latents guide the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from packshot.base.inpainting import ProductConv, product_channels
from packshot.base.tokens import lost_words
from packshot.config.schema import GenerateSettings
from packshot.diffusion.hold_product import Callback, first_latents, hold_product
from packshot.diffusion.latents import LatentScale
from packshot.errors import PackshotError
from packshot.generate.adapter_schedule import switching
from packshot.generate.canvas import Working
from packshot.generate.controls import control_map
from packshot.generate.load import Models
from packshot.generate.references import Reference, image_embeds
from packshot.runs.folder import log

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Conditioning:
    """All that steers the denoiser besides the product: keyword arguments of the pipeline, and what did not fit.

    lost_words: the tail of the prompt (and of the negative prompt) beyond the text encoders' 77 tokens, "" if none.
    light: where light is to come from, as ``View.light`` of ``diffusion.conditions``; (0, 0) leaves it open.
    """

    arguments: dict[str, Any]
    lost_words: dict[str, str]
    light: tuple[float, float] = (0.0, 0.0)


@torch.no_grad()
def encode(
    models: Models,
    prompt: str,
    settings: GenerateSettings,
    references: Sequence[Reference] = (),
    light_angle: float | None = None,
) -> Conditioning:
    """Encode prompt, negative prompt and references once for all pictures of a request.

    light_angle: degrees in the picture, see ``GenerateSettings``; None leaves the light open.

    Without words the prompt is what a dropped one is in training: zeros, of a base whose pipeline has them for that.
    """
    pipe = models.pipe
    lost = {}
    for key, text in (("prompt", prompt), ("negative_prompt", settings.negative_prompt or "")):
        lost[key] = lost_words(pipe.tokenizer, text)
        if lost[key]:
            log.warning("%s is longer than %d tokens, lost: %r", key, pipe.tokenizer.model_max_length, lost[key])
    guided = settings.guidance_scale > 1
    embeds = pipe.encode_prompt(
        prompt, device=pipe.device, do_classifier_free_guidance=guided, negative_prompt=settings.negative_prompt
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    arguments: dict[str, Any] = dict(zip(names, embeds, strict=True))
    if not prompt and pipe.config.force_zeros_for_empty_prompt:
        arguments |= {name: torch.zeros_like(arguments[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    if models.has_ip_adapter:
        arguments["ip_adapter_image_embeds"] = [image_embeds(pipe, references, guided)]
    around = None if light_angle is None else math.radians(light_angle)
    return Conditioning(arguments, lost, (0.0, 0.0) if around is None else (math.cos(around), math.sin(around)))


def _pixels(image_HW3: np.ndarray) -> torch.Tensor:
    """Uint8 picture to (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(image_HW3.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _to_latents(vae: Any, pixels_13HW: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] to scaled latents (1, C, h, w), fp32; the posterior's mode, so nothing random."""
    return LatentScale.of(vae.config).to_unet(vae.encode(pixels_13HW.to(vae.device)).latent_dist.mode())


def _from_latents(vae: Any, latents_BCHW: torch.Tensor) -> np.ndarray:
    """Scaled latents of one picture to float32 (H, W, 3) in [0, 1]."""
    pixels = vae.decode(LatentScale.of(vae.config).to_vae(latents_BCHW.float())).sample
    return (pixels[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).cpu().numpy()


def _in_channels(vae: Any, working: Working) -> torch.Tensor:
    """What an inpainting UNet reads of the product, (1, 5, h, w)."""
    keep_11HW = torch.from_numpy(working.keep_HW.astype(np.float32))[None, None]
    masked = _to_latents(vae, _pixels(working.image_HW3) * keep_11HW)
    return product_channels(keep_11HW.to(masked.device), masked)


def _controls(models: Models, working: Working, light: tuple[float, float]) -> dict[str, Any]:
    """The pipeline's arguments for its ControlNets, if it has any."""
    if not models.controls:
        return {}
    starts, ends = zip(*models.controlnet_spans, strict=True)
    return {
        "image": [control_map(control, working, light) for control in models.controls],
        "controlnet_conditioning_scale": list(models.controlnet_scales),
        "control_guidance_start": list(starts),
        "control_guidance_end": list(ends),
    }


def notifying(callback: Callback, on_step: OnStep | None) -> Callback:
    """``callback`` that calls ``on_step`` after every denoising step."""
    if on_step is None:
        return callback

    def notified(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
) -> np.ndarray:
    """One picture, decoded: float32 (H, W, 3) in [0, 1] at the working size.

    One picture per pipeline call: the guidance pair fills an accelerator at SDXL's size, memory does not grow with
    the number asked for, and no picture depends on its neighbours in a batch. Noise comes from a CPU generator.
    After every step the product's latents are put back (see ``diffusion.hold``), so the scene grows around the product
    with any base and any adapters; how the network sees it meanwhile is what the adapters were trained on.
    An exception of ``on_step``, which is called after every step, ends the denoising and is passed on.

    Raises:
        PackshotError: the denoiser or the decoder produced NaN or infinity.
    """
    pipe: Any = models.pipe
    vae = pipe.vae
    frame, factor = working.frame, pipe.vae_scale_factor
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, pipe.unet.config.in_channels, frame.height // factor, frame.width // factor)
    noise = torch.randn(shape, generator=generator).to(pipe.device)
    known = _to_latents(vae, _pixels(working.image_HW3))
    if isinstance(pipe.unet.conv_in, ProductConv):
        pipe.unet.conv_in.show(_in_channels(vae, working).to(pipe.device))
    held = torch.from_numpy(working.held_HW[None, ::factor, ::factor].astype(np.float32)).to(pipe.device)
    steps, shown = settings.num_inference_steps, models.product_conditioning
    hold = notifying(hold_product(known, noise, held, shown), on_step)
    with switching(models.switches, steps, hold) as callback:
        latents = pipe(
            **conditioning.arguments,
            **_controls(models, working, conditioning.light),
            height=frame.height,
            width=frame.width,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            latents=first_latents(known, noise, held, shown, pipe.scheduler, steps).to(pipe.unet.dtype),
            generator=generator,
            output_type="latent",
            callback_on_step_end=callback,
        ).images
    decoded = _from_latents(vae, latents)
    if not (torch.isfinite(latents).all() and np.isfinite(decoded).all()):
        raise PackshotError(
            f"the denoiser produced NaN or infinity for seed {seed}.",
            "Lower guidance_scale or the adapters' scales, and check the adapters' training for NaN.",
        )
    return decoded

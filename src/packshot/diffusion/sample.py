"""The sampler of validation and generation: one picture around a product that is held in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from packshot.diffusion.hold_product import Callback, first_latents, hold_product
from packshot.diffusion.latents import decode_latents
from packshot.diffusion.protocols import Pipeline

Wrap = Callable[[Callback], AbstractContextManager[Callback]]


# Share of the guided prediction that is brought back to the spread of the one with the prompt (Lin et al. 2023, arXiv
# 2305.08891, section 3.4, where .7 is what they chose).
GUIDANCE_RESCALE = 0.7


class NotFiniteError(ArithmeticError):
    """The denoiser or the decoder produced NaN or infinity."""


@torch.no_grad()
def sample(
    pipe: Pipeline,
    known_1CHW: Tensor,
    held_1HW: Tensor,
    shown: str,
    seed: int,
    num_inference_steps: int,
    wrap: Wrap = nullcontext,
    *,
    prompt_embeds: Tensor,
    **arguments: object,
) -> Tensor:
    """Denoise one picture and decode it: pixels (3, H, W) in about [-1, 1], fp32.

    One picture for each call: the guidance pair fills an accelerator at SDXL's size, memory does not grow with the
    number asked for, and no picture depends on its neighbours in a batch. The noise comes from a CPU generator, so it
    is the same on every device. After every step the product's latents are put back (see ``hold_product``), so the
    scene grows around the product with any base and any adapters.

    pipe: a stock pipeline. known_1CHW: the product's scaled latents, fp32, on the pipeline's device. held_1HW: 1 in the
    cells that show nothing but product, else 0. shown: a name of ``objective.product_conditioning``. wrap: a context
    around the call that may replace the callback that runs after every step. prompt_embeds: their dtype is the one that
    the denoiser works in. arguments: further ones of the pipeline.

    Raises:
        NotFiniteError: the result has NaN or infinity.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(known_1CHW.shape, generator=generator).to(known_1CHW.device)
    first = first_latents(known_1CHW, noise, held_1HW, shown, pipe.scheduler, num_inference_steps)
    scale = pipe.vae_scale_factor
    with wrap(hold_product(known_1CHW, noise, held_1HW, shown)) as callback:
        latents = pipe(
            **arguments,
            prompt_embeds=prompt_embeds,
            **rescaled_guidance(pipe),
            height=known_1CHW.shape[-2] * scale,
            width=known_1CHW.shape[-1] * scale,
            num_inference_steps=num_inference_steps,
            latents=first.to(prompt_embeds.dtype),
            generator=generator,
            output_type="latent",
            callback_on_step_end=callback,
        ).images
    pixels = decode_latents(pipe.vae, latents)[0]
    if not (torch.isfinite(latents).all() and torch.isfinite(pixels).all()):
        raise NotFiniteError("the denoiser or the decoder produced NaN or infinity")
    return pixels


def rescaled_guidance(pipe: Pipeline) -> dict[str, float]:
    """The pipeline's argument against overexposed pictures, which networks trained with zero terminal SNR need.

    The stock ControlNet pipeline for SDXL has no such argument.
    """
    if not pipe.scheduler.config.get("rescale_betas_zero_snr", False):
        return {}
    takes = "guidance_rescale" in inspect.signature(type(pipe).__call__).parameters
    return {"guidance_rescale": GUIDANCE_RESCALE} if takes else {}

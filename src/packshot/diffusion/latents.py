"""Between what a VAE gives and what a UNet reads: latents of about unit variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packshot.diffusion.protocols import Autoencoder, Config


@dataclass(frozen=True)
class LatentScale:
    """The shift and scale that a VAE's configuration names; most have the factor alone.

    mean_C11, std_C11: of its latents, per channel; one channel of 0 and 1 where the configuration has none.
    """

    factor: float
    mean_C11: Tensor
    std_C11: Tensor

    @classmethod
    def of(cls, config: Config) -> LatentScale:
        """config: that of an AutoencoderKL: ``scaling_factor`` and, if it has them, ``latents_mean`` and ``_std``."""

        def channels(values: list[float] | None, default: float) -> Tensor:
            return torch.tensor([default] if values is None else values).view(-1, 1, 1)

        means = channels(config.get("latents_mean"), 0.0)
        spreads = channels(config.get("latents_std"), 1.0)
        return cls(config["scaling_factor"], means, spreads)

    def to_unet(self, latents: Tensor) -> Tensor:
        """From the VAE's (..., C, h, w)."""
        return (latents - self.mean_C11.to(latents)) / self.std_C11.to(latents) * self.factor

    def to_vae(self, latents: Tensor) -> Tensor:
        """Back again."""
        return latents / self.factor * self.std_C11.to(latents) + self.mean_C11.to(latents)


def working_device(network: Autoencoder) -> torch.device:
    """Where a network computes; a hook of accelerate's brings it there only when it is called."""
    hook = getattr(network, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or network.device)


@torch.no_grad()
def encode_pixels(vae: Autoencoder, pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] to scaled latents (B, C, h, w) where the VAE computes: the posterior's mode, nothing random."""
    posterior = vae.encode(pixels_B3HW.to(working_device(vae))).latent_dist
    return LatentScale.of(vae.config).to_unet(posterior.mode())


@torch.no_grad()
def decode_latents(vae: Autoencoder, latents_BCHW: Tensor) -> Tensor:
    """Scaled latents to pixels (B, 3, H, W) in about [-1, 1], in fp32 whatever the denoiser's precision."""
    with torch.autocast(latents_BCHW.device.type, enabled=False):
        return vae.decode(LatentScale.of(vae.config).to_vae(latents_BCHW.float())).sample

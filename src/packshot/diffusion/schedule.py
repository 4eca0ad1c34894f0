"""The forward process of DDPM and what a network is asked to predict. Everything in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def alphas_cumprod(scheduler_config: Mapping[str, Any]) -> Tensor:
    """Cumulative product of alphas, shape (T,), fp32, from a diffusers scheduler config.

    Ho et al. 2020 (arXiv 2006.11239) section 2; ``scaled_linear`` is the schedule of latent diffusion.

    Raises:
        ValueError: a beta schedule other than ``linear`` and ``scaled_linear``.
    """
    start, end = scheduler_config["beta_start"], scheduler_config["beta_end"]
    steps, kind = scheduler_config["num_train_timesteps"], scheduler_config["beta_schedule"]
    if kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise ValueError(f"beta_schedule {kind!r} is not supported")
    return torch.cumprod(1 - betas, dim=0).float()


def _per_sample(values_T: Tensor, timesteps_B: Tensor) -> Tensor:
    return values_T.to(timesteps_B.device)[timesteps_B].view(-1, 1, 1, 1)


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps (Ho et al. 2020, equation 4), fp32."""
    a_t = _per_sample(alphas_cumprod_T, timesteps_B)
    return a_t.sqrt() * latents_BCHW.float() + (1 - a_t).sqrt() * noise_BCHW.float()


def _epsilon(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    return noise_BCHW.float()


def _v_prediction(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    # Salimans & Ho 2022 (arXiv 2202.00512), appendix D
    a_t = _per_sample(alphas_cumprod_T, timesteps_B)
    return a_t.sqrt() * noise_BCHW.float() - (1 - a_t).sqrt() * latents_BCHW.float()


# By the scheduler's ``prediction_type``: (x_0, eps, t, alphas_cumprod) -> what the network has to say.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": _epsilon,
    "v_prediction": _v_prediction,
}


def snr(timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    """Signal-to-noise ratio a_t / (1 - a_t), shape (B,)."""
    a_t = alphas_cumprod_T.to(timesteps_B.device)[timesteps_B]
    return a_t / (1 - a_t)


def min_snr_weight(timesteps_B: Tensor, alphas_cumprod_T: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weight min(snr, gamma)/snr for epsilon, min(snr, gamma)/(snr + 1) for v; shape (B,).

    Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """
    ratio = snr(timesteps_B, alphas_cumprod_T)
    divisor = {"epsilon": ratio, "v_prediction": ratio + 1}[prediction_type]
    return ratio.clamp(max=gamma) / divisor


def masked_mse(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B1HW: Tensor | None = None) -> Tensor:
    """Squared error per sample, shape (B,), fp32.

    weight_B1HW: >= 0, at latent resolution. The mean is taken over the weight, so that a small background counts
    as much as a large one.
    """
    error = (prediction_BCHW.float() - target_BCHW.float()).square().mean(dim=1, keepdim=True)
    if weight_B1HW is None:
        return error.mean(dim=(1, 2, 3))
    total = weight_B1HW.sum(dim=(1, 2, 3)).clamp(min=1e-6)
    return (error * weight_B1HW).sum(dim=(1, 2, 3)) / total

"""The forward process of DDPM and what a network is asked to predict. Everything in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from packshot.diffusion.protocols import Config


def alphas_cumprod(scheduler_config: Config) -> Tensor:
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


def per_sample(values_T: Tensor, timesteps_B: Tensor) -> Tensor:
    return values_T.to(timesteps_B.device)[timesteps_B].float().view(-1, 1, 1, 1)


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps (Ho et al. 2020, equation 4), fp32."""
    a_t = per_sample(alphas_cumprod_T, timesteps_B)
    return a_t.sqrt() * latents_BCHW.float() + (1 - a_t).sqrt() * noise_BCHW.float()


def epsilon_target(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    return noise_BCHW.float()


def velocity_target(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    # Salimans & Ho 2022 (arXiv 2202.00512), appendix D
    a_t = per_sample(alphas_cumprod_T, timesteps_B)
    return a_t.sqrt() * noise_BCHW.float() - (1 - a_t).sqrt() * latents_BCHW.float()


# By the scheduler's ``prediction_type``: (x_0, eps, t, alphas_cumprod) -> what the network has to predict.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": epsilon_target,
    "v_prediction": velocity_target,
}


def snr(timesteps_B: Tensor, alphas_cumprod_T: Tensor) -> Tensor:
    """Signal-to-noise ratio a_t / (1 - a_t), shape (B,), fp32; 0 at the last step of a zero-terminal-SNR schedule."""
    a_t = alphas_cumprod_T.to(timesteps_B.device)[timesteps_B].float()
    return a_t / (1 - a_t)


def unweighted(timesteps_B: Tensor, alphas_cumprod_T: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """Loss weight 1, shape (B,), fp32."""
    return torch.ones(timesteps_B.shape, device=timesteps_B.device)


def min_snr_weight(timesteps_B: Tensor, alphas_cumprod_T: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Loss weight min(snr, gamma)/snr for epsilon, min(snr, gamma)/(snr + 1) for v; shape (B,), fp32, in [0, 1].

    Hang et al. 2023 (arXiv 2303.09556), section 3.4. Where the snr is zero the weight is 0 for v; for epsilon it is 0/0
    and ``check_objective`` refuses the config.

    Raises:
        KeyError: a prediction type other than ``epsilon`` and ``v_prediction``.
    """
    ratio = snr(timesteps_B, alphas_cumprod_T)
    divisor = {"epsilon": ratio, "v_prediction": ratio + 1}[prediction_type]
    return ratio.clamp(max=gamma) / divisor


# of the snr (SDXL starts at 1175): the clean end would weigh next to nothing
DEBIASED_LIMIT = 1000.0


def debiased_weight(timesteps_B: Tensor, alphas_cumprod_T: Tensor, limit: float, prediction_type: str) -> Tensor:
    """Loss weight 1/sqrt(snr), its snr kept under ``limit``, shape (B,), fp32; for v that times snr/(snr + 1).

    Yu et al. 2023 (arXiv 2310.08442): an epsilon error counts as it disturbs the picture. The paper's weight is for
    epsilon; a squared v error is the squared epsilon error times (snr + 1)/snr, so that both give the same loss. Where
    the snr is zero the weight is 0 for v; for epsilon it is infinite and ``check_objective`` refuses the config.

    Raises:
        KeyError: a prediction type other than ``epsilon`` and ``v_prediction``.
    """
    ratio = snr(timesteps_B, alphas_cumprod_T)
    return {
        "epsilon": ratio.clamp(max=limit).rsqrt(),
        # the same times snr/(snr + 1), arranged to stay finite where the snr is zero
        "v_prediction": torch.maximum(ratio.sqrt(), ratio / limit**0.5) / (ratio + 1),
    }[prediction_type]


# By ``objective.loss_weighting``: (timesteps, alphas_cumprod, gamma, prediction_type) -> weight per sample, (B,).
LOSS_WEIGHTS: dict[str, Callable[[Tensor, Tensor, float, str], Tensor]] = {
    "none": unweighted,
    "min_snr": min_snr_weight,
    "debiased": lambda timesteps, alphas, gamma, kind: debiased_weight(timesteps, alphas, DEBIASED_LIMIT, kind),
}


def rescale_zero_terminal_snr(alphas_cumprod_T: Tensor) -> Tensor:
    """The schedule shifted and scaled so that the last step is pure noise, shape (T,), fp32.

    Lin et al. 2023 (arXiv 2305.08891), algorithm 1: the first value stays, the last is exactly 0. A schedule that ends
    in 0 is left as it is.
    """
    root = alphas_cumprod_T.double().sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)).square().float()


# location and scale are those of logit_normal; the other draws take and ignore them
def draw_uniform(generator: torch.Generator, low: int, high: int, location: float = 0.0, scale: float = 1.0) -> Tensor:
    """A timestep in [low, high), int64, shape ()."""
    return torch.randint(low, high, (), generator=generator)


def _place(share: Tensor, low: int, high: int) -> Tensor:
    return (low + share * (high - low)).long().clamp(low, high - 1)


def draw_logit_normal(
    generator: torch.Generator, low: int, high: int, location: float = 0.0, scale: float = 1.0
) -> Tensor:
    """A timestep in [low, high), int64, shape (), by the logistic of a normal draw: the middle comes most often.

    Esser et al. 2024 (arXiv 2403.03206), section 3.1. location: > 0 prefers noisy steps, < 0 clean ones; scale: > 0,
    the larger the wider.
    """
    return _place(torch.sigmoid(location + scale * torch.randn((), generator=generator)), low, high)


def draw_cubic(generator: torch.Generator, low: int, high: int, location: float = 0.0, scale: float = 1.0) -> Tensor:
    """A timestep in [low, high), int64, shape (), noisy steps preferred: (1 - u^3) of the way up, u uniform.

    Layout is decided there. The same draw as in diffusers' T2I-Adapter training.
    """
    return _place(1 - torch.rand((), generator=generator) ** 3, low, high)


# By ``objective.timestep_sampling``: (generator, low, high[, location, scale]) -> a timestep in [low, high).
TIMESTEPS: dict[str, Callable[..., Tensor]] = {
    "uniform": draw_uniform,
    "logit_normal": draw_logit_normal,
    "cubic": draw_cubic,
}


def draw_timestep(
    generator: torch.Generator,
    sampling: str,
    num_timesteps: int,
    min_timestep: int = 0,
    max_timestep: int | None = None,
    location: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """A timestep in [min_timestep, max_timestep], both included, int64, shape ().

    sampling: a key of ``TIMESTEPS``. num_timesteps: length of the schedule. max_timestep: None is the schedule's last.
    location, scale: of logit_normal.

    Raises:
        ValueError: the range is empty or leaves the schedule.
    """
    last = num_timesteps - 1 if max_timestep is None else max_timestep
    if not 0 <= min_timestep <= last < num_timesteps:
        raise ValueError(
            f"timesteps {min_timestep} to {last} are not a range within the schedule's 0 to {num_timesteps - 1}"
        )
    return TIMESTEPS[sampling](generator, min_timestep, last + 1, location, scale)


def offset_noise(noise_CHW: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Noise with one further normal draw per channel, times ``strength`` (>= 0), shape (C, H, W), fp32.

    Guttenberg 2023, "Diffusion with Offset Noise": the mean of a picture becomes something to learn. The result has
    variance 1 + strength^2. With strength 0 nothing is drawn.
    """
    if strength == 0:
        return noise_CHW.float()
    shift = torch.randn((noise_CHW.shape[0], 1, 1), generator=generator)
    return noise_CHW.float() + strength * shift.to(noise_CHW.device)


def perturb_noise(noise_CHW: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """The noise that the network's input gets under input perturbation, eps + strength xi, shape (C, H, W), fp32.

    Ning et al. 2023 (arXiv 2301.11706); 0.1 there. xi: standard normal. The target keeps eps: the network learns to
    undo the errors that sampling makes. With strength 0 nothing is drawn.
    """
    if strength == 0:
        return noise_CHW.float()
    return noise_CHW.float() + strength * torch.randn(noise_CHW.shape, generator=generator).to(noise_CHW.device)


def boundary_weight(alpha_B1HW: Tensor, product: float, background: float, boundary: float, width: int) -> Tensor:
    """Loss weight per cell: product and background by their share of it, a ring outside the product ``boundary`` times.

    alpha_B1HW: the product's share of each latent cell, [0, 1]; (1, H, W) does too. The weights are >= 0. width: of the
    ring, in cells, a diagonal step counts 1; a cell less than half covered is outside. Returns fp32, shaped as alpha.
    The ring is where a product grows when it grows (and where shadows fall).
    """
    alpha_B1HW = alpha_B1HW.float()
    weight = product * alpha_B1HW + background * (1 - alpha_B1HW)
    if boundary == 1.0 or width == 0:
        return weight
    covered = (alpha_B1HW >= 0.5).float()
    grown = torch.nn.functional.max_pool2d(covered, 2 * width + 1, stride=1, padding=width)
    return weight * torch.where((grown > 0) & (covered == 0), boundary, 1.0)


def masked_mse(prediction_BCHW: Tensor, target_BCHW: Tensor, weight_B1HW: Tensor | None = None) -> Tensor:
    """Squared error per sample, shape (B,), fp32.

    weight_B1HW: >= 0, at latent resolution. The mean is taken over the weight, so that a small background counts
    as much as a large one.
    """
    error = (prediction_BCHW.float() - target_BCHW.float()).square().mean(dim=1, keepdim=True)
    if weight_B1HW is None:
        return error.mean(dim=(1, 2, 3))
    weight_B1HW = weight_B1HW.float()
    total = weight_B1HW.sum(dim=(1, 2, 3)).clamp(min=1e-6)
    return (error * weight_B1HW).sum(dim=(1, 2, 3)) / total

"""The product held in place while a scene is denoised around it, and how the network is shown it meanwhile.

Three rules, by the name of ``objective.product_conditioning``:

- ``noised``: the product carries as much noise as the rest (blended latent diffusion, Avrahami et al. 2022, arXiv
  2206.02779). Any base does it untrained, but at the noisiest steps, where the layout is decided, it sees no product.
- ``clean``: the product is there from the first step, without noise. A network has to be trained on that.
- ``channels``: ``noised``, and the network also reads the product from input channels of its own
  (``base.inpainting``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from packshot.diffusion.protocols import Pipeline, Scheduler

# of ``callback_on_step_end``: (pipeline, number of the step, its timestep, tensors) to the tensors that it replaces
Callback = Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]

# ---- training ----


def show_clean(noisy_BCHW: Tensor, latents_BCHW: Tensor, held_B1HW: Tensor) -> Tensor:
    """The network's input with the held cells (1; else 0) free of noise, as ``clean`` shows them; (B, C, H, W), fp32.

    Nothing is left to predict there: their loss weight has to be 0.
    """
    return torch.where(held_B1HW > 0, latents_BCHW.float(), noisy_BCHW)


# ---- sampling ----


def scale_by_sigma(scheduler: Scheduler, step: int) -> Tensor:
    return (scheduler.sigmas[step] ** 2 + 1) ** 0.5


def unscaled(scheduler: Scheduler, step: int) -> Tensor:
    return torch.ones(())


# By scheduler class: what ``scale_model_input`` divides the sampler's state by before its step number ``step``.
INPUT_SCALES: dict[str, Callable[[Scheduler, int], Tensor]] = {
    "EulerDiscreteScheduler": scale_by_sigma,
    "EulerAncestralDiscreteScheduler": scale_by_sigma,
    "DDIMScheduler": unscaled,
    "DPMSolverMultistepScheduler": unscaled,
    "UniPCMultistepScheduler": unscaled,
    "LCMScheduler": unscaled,
}


def noised_state(scheduler: Scheduler, known_1CHW: Tensor, noise_1CHW: Tensor, step: int) -> Tensor:
    return scheduler.add_noise(known_1CHW, noise_1CHW, scheduler.timesteps[step : step + 1])


def clean_state(scheduler: Scheduler, known_1CHW: Tensor, noise_1CHW: Tensor, step: int) -> Tensor:
    name = type(scheduler).__name__
    if name not in INPUT_SCALES:
        known = ", ".join(INPUT_SCALES)
        raise ValueError(f"how {name} scales a network's input is not known; a product is shown clean by {known}")
    return known_1CHW * INPUT_SCALES[name](scheduler, step).to(known_1CHW.device)


# By how the product is shown: (scheduler, known, noise, step) -> the sampler's state of held cells before that step.
STATES: dict[str, Callable[[Scheduler, Tensor, Tensor, int], Tensor]] = {
    "noised": noised_state,
    "clean": clean_state,
    "channels": noised_state,
}


def hold_product(known_1CHW: Tensor, noise_1CHW: Tensor, held_1HW: Tensor, shown: str) -> Callback:
    """A ``callback_on_step_end`` for a stock pipeline that puts the product's latents back after every step.

    known_1CHW: the product's scaled latents, fp32. noise_1CHW: standard normal, fp32. held_1HW: 1 in the cells that are
    held, 0 elsewhere. shown: a rule's name. After the last step the held cells are ``known_1CHW``, in the
    pipeline's dtype.

    Raises:
        ValueError: from the callback, if it is not known how the pipeline's scheduler scales what the network sees and
            the product is shown ``clean``.
    """
    state = STATES[shown]

    def keep_product(pipe: Pipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = tensors["latents"]
        later = step + 1
        is_last = later == len(pipe.scheduler.timesteps)
        target = known_1CHW if is_last else state(pipe.scheduler, known_1CHW, noise_1CHW, later)
        return {"latents": torch.lerp(latents.float(), target, held_1HW).to(latents.dtype)}

    return keep_product


def first_latents(
    known_1CHW: Tensor,
    noise_1CHW: Tensor,
    held_1HW: Tensor,
    shown: str,
    scheduler: Scheduler,
    num_inference_steps: int,
) -> Tensor:
    """The ``latents`` to hand to a stock pipeline, (1, C, H, W): it multiplies them by ``scheduler.init_noise_sigma``.

    Arguments as of :func:`hold_product`; the scheduler is the pipeline's, and is left as it is. All but ``clean``
    start from the noise alone.

    Raises:
        ValueError: see :func:`hold_product`.
    """
    if STATES[shown] is noised_state:
        return noise_1CHW
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    state = STATES[shown](scheduler, known_1CHW, noise_1CHW, 0)
    return torch.lerp(noise_1CHW, state / scheduler.init_noise_sigma, held_1HW)

"""What the sampler needs of diffusers' objects, whose attributes are set at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, device


class Scheduler(Protocol):
    """A sampler of diffusers. sigmas: the Euler family has them; see ``hold_product.INPUT_SCALES``."""

    config: Mapping[str, Any]
    timesteps: Tensor
    sigmas: Tensor
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int) -> None: ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...


class Autoencoder(Protocol):
    """An AutoencoderKL."""

    config: Mapping[str, Any]
    device: device

    def encode(self, x: Tensor) -> Any: ...

    def decode(self, z: Tensor) -> Any: ...


class Pipeline(Protocol):
    """A text-to-image pipeline of SDXL."""

    scheduler: Scheduler
    vae: Autoencoder
    vae_scale_factor: int

    def __call__(self, **arguments: object) -> Any: ...

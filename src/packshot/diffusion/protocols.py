"""What the sampler needs of diffusers' objects, whose attributes are set at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, device

Config = Mapping[str, Any]  # of a part of diffusers


class Scheduler(Protocol):
    """A sampler of diffusers. sigmas: the Euler family has them; see ``hold_product.INPUT_SCALES``."""

    config: Config
    timesteps: Tensor
    sigmas: Tensor
    init_noise_sigma: float

    def set_timesteps(self, num_inference_steps: int) -> None: ...

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...


class Decoded(Protocol):
    """What an AutoencoderKL returns."""

    sample: Tensor


class Autoencoder(Protocol):
    """An AutoencoderKL."""

    config: Config
    device: device

    def encode(self, x: Tensor) -> Any: ...

    def decode(self, z: Tensor) -> Decoded: ...


class Drawn(Protocol):
    """What a pipeline returns."""

    images: Tensor


class Pipeline(Protocol):
    """A text-to-image pipeline of SDXL."""

    scheduler: Scheduler
    vae: Autoencoder
    vae_scale_factor: int

    def __call__(self, **arguments: object) -> Drawn: ...

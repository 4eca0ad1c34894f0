"""Inpainting UNets: beside the noisy latents they read a mask and the latents of the product before grey.

Their first convolution has nine input channels: noisy latents, mask (1 = to be invented), latents of the masked
picture, as Stable Diffusion's inpainting checkpoints have them. Here it is taken apart into the half for the noisy
latents and the half for the product, whose outputs add up to the same. Everything around the UNet (pipelines,
schedulers) then sees one with four channels, and a base that has only the first half can be given the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packshot.config.schema import ProductConditioning
from packshot.errors import ConfigError

LATENT_CHANNELS, PRODUCT_CHANNELS = 4, 5
CONV_FILE = "conv_in.safetensors"


class ProductConv(nn.Conv2d):
    """A UNet's ``conv_in`` that also reads the product; ``product`` is its second half.

    Until something is shown, it is the first half alone. strength: weight of the second.
    """

    def __init__(self, latents: nn.Conv2d, product: nn.Conv2d) -> None:
        super().__init__(latents.in_channels, latents.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias, self.product = latents.weight, latents.bias, product
        self.strength = 1.0
        self._shown: Tensor | None = None

    def show(self, product_B5HW: Tensor | None) -> None:
        """What is read from now on besides the input: mask and scaled latents, on the network's device."""
        self._shown = product_B5HW

    def forward(self, input: Tensor) -> Tensor:
        """input: noisy latents, (B, 4, H, W); a multiple of the B shown (guidance), or of one."""
        latents = super().forward(input)
        if self._shown is None:
            return latents
        copies = len(input) // len(self._shown)
        shown = self._shown.to(self.product.weight.dtype).repeat(copies, 1, 1, 1)
        return latents + self.strength * self.product(shown).to(latents.dtype)


def reads_product(unet: Any) -> bool:
    """Whether a UNet's first convolution has nine channels, or had them before it was taken apart."""
    return isinstance(unet.conv_in, ProductConv) or unet.config.in_channels == LATENT_CHANNELS + PRODUCT_CHANNELS


def take_apart(unet: Any) -> ProductConv:
    """Replace ``conv_in``. A UNet that has no second half is given one of zeros, which is trained."""
    conv, ready = unet.conv_in, reads_product(unet)
    product = nn.Conv2d(PRODUCT_CHANNELS, conv.out_channels, 3, padding=1, bias=False, device="meta")
    latents = nn.Conv2d(LATENT_CHANNELS, conv.out_channels, 3, padding=1, device="meta")
    weight = conv.weight.data
    if not ready:
        zeros = weight.new_zeros(len(weight), PRODUCT_CHANNELS, 3, 3)
        weight = torch.cat([weight, zeros], dim=1)
    latents.weight = nn.Parameter(weight[:, :LATENT_CHANNELS].contiguous(), requires_grad=False)
    latents.bias = conv.bias
    product.weight = nn.Parameter(weight[:, LATENT_CHANNELS:].contiguous(), requires_grad=not ready)
    unet.conv_in = ProductConv(latents, product)
    unet.register_to_config(in_channels=LATENT_CHANNELS)
    return unet.conv_in


def prepare_unet(unet: Any, shown: ProductConditioning) -> None:
    """Give the UNet the first convolution that ``objective.product_conditioning`` asks for.

    Call it after the adapters are in place: peft freezes every other parameter.

    Raises:
        ConfigError: an inpainting base, and the product is to be shown in another way; or an adapter sits on the layer.
    """
    if shown is ProductConditioning.channels:
        if type(unet.conv_in) is not nn.Conv2d:
            raise ConfigError(
                "method.target_modules adapts conv_in, which objective.product_conditioning=channels replaces.",
                "Leave conv_in out of it.",
            )
        take_apart(unet)
    elif reads_product(unet):
        raise ConfigError(
            f"model.base is an inpainting model: its UNet has {unet.config.in_channels} input channels, and "
            f"objective.product_conditioning={shown} fills {LATENT_CHANNELS}.",
            "Set objective.product_conditioning=channels (train_lora.py), or choose another base.",
        )


def export_conv(unet: Any, folder: Path) -> None:
    """``conv_in.safetensors``: the whole first convolution under a UNet's own names, if its second half was trained."""
    conv = unet.conv_in
    if isinstance(conv, ProductConv) and conv.product.weight.requires_grad:
        weight = torch.cat([conv.weight.float(), conv.product.weight.float()], dim=1)  # trained in fp32 over any base
        tensors = {"conv_in.weight": weight, "conv_in.bias": conv.bias}
        save_file({name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}, folder / CONV_FILE)


def load_conv(unet: Any, folder: Path) -> None:
    """Take the UNet's ``conv_in`` apart, with the second half of an export folder if there is one.

    Raises:
        ValueError: there is none, and the UNet has none either; or it does not fit.
    """
    file = folder / CONV_FILE
    if not file.is_file():
        if not reads_product(unet):
            raise ValueError(f"the folder has no {CONV_FILE}, and the base is no inpainting model")
        take_apart(unet)
        return
    weight, conv = load_file(file)["conv_in.weight"], take_apart(unet)
    expected = (conv.out_channels, LATENT_CHANNELS + PRODUCT_CHANNELS, 3, 3)
    if tuple(weight.shape) != expected:
        raise ValueError(f"conv_in of shape {tuple(weight.shape)}, the base takes {expected}")
    conv.product.weight.data = weight[:, LATENT_CHANNELS:].contiguous().to(conv.weight)
    conv.product.requires_grad_(False)


def product_channels(keep_B1HW: Tensor, masked_latents_B4hw: Tensor) -> Tensor:
    """(B, 5, h, w): what :meth:`ProductConv.show` takes. keep: the product's mask at picture size, 0 or 1; a cell that
    has any of the product counts as product. masked_latents: scaled, of the picture with grey around the product."""
    size = masked_latents_B4hw.shape[-2:]
    known = nn.functional.adaptive_max_pool2d(keep_B1HW, size)
    return torch.cat([1 - known, masked_latents_B4hw], dim=1)

"""Inpainting UNets, which also read a mask and the latents of the product before grey.

Their first convolution has nine input channels: noisy latents, mask (1 = to be invented), latents of the masked
picture, as Stable Diffusion's inpainting checkpoints have them. Here it is split into the half for the noisy latents
and the half for the product, whose outputs add up to the same. Everything around the UNet (pipelines, schedulers) then
sees four channels, and a base that has only the first half can be given the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packshot.config.schema import ProductConditioning
from packshot.errors import ConfigError
from packshot.lists import map_values

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LATENT_CHANNELS = 4
PRODUCT_CHANNELS = 5
CONV_FILE = "conv_in.safetensors"


class ProductConv(nn.Conv2d):
    """A UNet's ``conv_in`` that also reads the product; ``product`` is its second half.

    Until :meth:`show` is called, it is the first half alone. strength: weight of the second.
    """

    def __init__(self, latents: nn.Conv2d, product: nn.Conv2d) -> None:
        super().__init__(latents.in_channels, latents.out_channels, 3, padding=1, device="meta")
        self.weight = latents.weight
        self.bias = latents.bias
        self.product = product
        self.strength = 1.0
        self._shown: Tensor | None = None

    def show(self, product_B5HW: Tensor | None) -> None:
        """Set what is read from now on in addition to the input: mask and scaled latents, on the network's device."""
        self._shown = product_B5HW

    def forward(self, input: Tensor) -> Tensor:
        """input: noisy latents, (B, 4, H, W); a multiple of the B shown (guidance), or of one."""
        latents = super().forward(input)
        if self._shown is None:
            return latents
        copies = len(input) // len(self._shown)
        shown = self._shown.to(self.product.weight.dtype).repeat(copies, 1, 1, 1)
        return latents + self.strength * self.product(shown).to(latents.dtype)


def reads_product(unet: UNet2DConditionModel) -> bool:
    """Whether a UNet's first convolution has nine channels, or had them before it was split."""
    return isinstance(unet.conv_in, ProductConv) or unet.config.in_channels == LATENT_CHANNELS + PRODUCT_CHANNELS


def split_conv_in(unet: UNet2DConditionModel) -> ProductConv:
    """Replace ``conv_in`` by its two halves. A UNet without a second half is given one of zeros, which is trained."""
    conv = unet.conv_in
    ready = reads_product(unet)
    product = nn.Conv2d(PRODUCT_CHANNELS, conv.out_channels, 3, padding=1, bias=False, device="meta")
    latents = nn.Conv2d(LATENT_CHANNELS, conv.out_channels, 3, padding=1, device="meta")
    weight = conv.weight.data
    if not ready:
        zeros = weight.new_zeros(len(weight), PRODUCT_CHANNELS, 3, 3)
        weight = torch.cat([weight, zeros], dim=1)
    latents.weight = nn.Parameter(weight[:, :LATENT_CHANNELS].contiguous(), requires_grad=False)
    latents.bias = conv.bias
    product.weight = nn.Parameter(weight[:, LATENT_CHANNELS:].contiguous(), requires_grad=not ready)
    split = ProductConv(latents, product)
    unet.conv_in = split
    unet.register_to_config(in_channels=LATENT_CHANNELS)
    return split


def prepare_unet(unet: UNet2DConditionModel, shown: ProductConditioning) -> None:
    """Give the UNet the first convolution that ``objective.product_conditioning`` asks for.

    Call it after the adapters are in place: peft freezes every other parameter.

    Raises:
        ConfigError: the base is an inpainting model and the product is not conditioned by channels; or an adapter
            adapts the layer.
    """
    if shown is ProductConditioning.channels:
        if type(unet.conv_in) is not nn.Conv2d:
            raise ConfigError(
                "method.target_modules adapts conv_in, which objective.product_conditioning=channels replaces.",
                "Leave conv_in out of it.",
            )
        split_conv_in(unet)
    elif reads_product(unet):
        raise ConfigError(
            f"model.base is an inpainting model: its UNet has {unet.config.in_channels} input channels, and "
            f"objective.product_conditioning={shown} fills {LATENT_CHANNELS}.",
            "Set objective.product_conditioning=channels (train_lora.py), or choose another base.",
        )


def export_conv(unet: UNet2DConditionModel, folder: Path) -> None:
    """``conv_in.safetensors``: the whole first convolution under a UNet's own names, if its second half was trained."""
    conv = unet.conv_in
    if isinstance(conv, ProductConv) and conv.product.weight.requires_grad:
        assert conv.bias is not None  # UNets have one
        # The second half is trained in fp32, also over a base of another dtype.
        weight = torch.cat([conv.weight.float(), conv.product.weight.float()], dim=1)
        tensors = {"conv_in.weight": weight, "conv_in.bias": conv.bias.float()}
        save_file(map_values(lambda tensor: tensor.detach().cpu().contiguous(), tensors), folder / CONV_FILE)


def load_conv(unet: UNet2DConditionModel, folder: Path) -> None:
    """Split the UNet's ``conv_in``; its second half comes from an export folder if that has one.

    Raises:
        ValueError: neither the folder nor the UNet has a second half; or that of the folder does not fit.
    """
    file = folder / CONV_FILE
    if not file.is_file():
        if not reads_product(unet):
            raise ValueError(f"the folder has no {CONV_FILE}, and the base is not an inpainting model")
        split_conv_in(unet)
        return
    weight = load_file(file)["conv_in.weight"]
    conv = split_conv_in(unet)
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

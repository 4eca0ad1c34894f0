"""Stage ``vae``: SDXL's AutoencoderKL, narrow, with an 8x smaller latent."""

# diffusers annotates block tuples as one-element tuples and module attributes as optional.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from packshot.pipeline.shards import split
from tools.mini.budgeted_training import DEVICE, Loss, Plan, Progress, fast_precision, run_stretch
from tools.mini.data import SIZE, Render, Renders, images_and_plates, to_images, to_pixels
from tools.mini.folder import Family, digest_of_tensors

# Side in px and number of the crops in a batch. Small ones show more scenes at the same cost; whole images show the
# border and its padding as often as it will be met.
CROPS = ((64, 8), (SIZE, 2))
KL_WEIGHT = 1e-4  # on the KL per pixel: keeps latents near unit scale and the decoder tolerant of small errors
CELL = 8  # px; side of what one latent stands for
CARRIED = 12  # channels of the residual stream that carry the three colours at the start
STREAM_CONSTANT = 4.0
# ITU-R BT.601 luma and colour differences, rows Y, Cb, Cr.
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def build_vae(latent_channels: int = 4) -> AutoencoderKL:
    """The autoencoder before training: pixels_B3HW in [-1, 1] to latents_B(latent_channels)(H/8)(W/8)."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    start_as_block_means(vae)
    return vae


@torch.no_grad()
def start_as_block_means(vae: AutoencoderKL) -> None:
    """Initialise the network as the linear autoencoder that keeps the mean colour of every 8 x 8 block.

    Left to itself the normalised network spends most of a short training on finding out how to pass a flat colour.
    So the first channels of the residual stream carry, per colour x, the four values x, -x, K, -K: the constants make
    the group's norm almost independent of x, and silu(y) - silu(-y) = y undoes the activation. Residual branches start
    at zero (Zhang et al. 2019, Fixup) and everything else keeps its random start.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            mean = torch.zeros(3, 3)
            mean[:2, :2] = 0.25  # the padding is on the right and below, so this window is the pixel's own block
            _carry(module.conv, mean)
        elif isinstance(module, Upsample2D):
            centre = torch.zeros(3, 3)
            centre[1, 1] = 1.0
            _carry(module.conv, centre)
    _open_stream(vae.encoder.conv_in)
    _open_stream(vae.decoder.conv_in)
    _close_stream(vae.encoder.conv_out, vae.encoder.conv_norm_out)
    _close_stream(vae.decoder.conv_out, vae.decoder.conv_norm_out)
    channels = vae.config.latent_channels
    vae.encoder.conv_out.weight[channels:] = 0.0
    vae.encoder.conv_out.bias[channels:] = -6.0  # log variance: little noise at first
    for conv in (vae.quant_conv, vae.post_quant_conv):
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)


def _carry(conv: torch.nn.Conv2d, kernel_HW: torch.Tensor) -> None:
    """Let a convolution hand the carried channels on, each through ``kernel``."""
    conv.weight[:CARRIED] = 0.0
    conv.bias[:CARRIED] = 0.0
    for channel in range(CARRIED):
        conv.weight[channel, channel] = kernel_HW


def _open_stream(conv: torch.nn.Conv2d) -> None:
    """Write x, -x, K, -K for the first three input channels."""
    conv.weight[:CARRIED] = 0.0
    conv.bias[:CARRIED] = 0.0
    centre = conv.kernel_size[0] // 2
    for colour in range(3):
        first = 4 * colour
        conv.weight[first, colour, centre, centre] = 1.0
        conv.weight[first + 1, colour, centre, centre] = -1.0
        conv.bias[first + 2] = STREAM_CONSTANT
        conv.bias[first + 3] = -STREAM_CONSTANT


def _close_stream(conv: torch.nn.Conv2d, norm: torch.nn.GroupNorm) -> None:
    """Read the first three output channels from the stream behind its last norm and activation."""
    conv.weight[:3] = 0.0
    conv.bias[:3] = 0.0
    per_group = norm.num_channels // norm.num_groups
    constants = min(CARRIED, per_group) // 2  # of the channels in a carried group that hold +K or -K
    scale = STREAM_CONSTANT * (constants / per_group) ** 0.5
    centre = conv.kernel_size[0] // 2
    for colour in range(3):
        first = 4 * colour
        conv.weight[colour, first, centre, centre] = scale
        conv.weight[colour, first + 1, centre, centre] = -scale


def _ycbcr(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.einsum("kc,bchw->bkhw", pixels_BCHW.new_tensor(TO_YCBCR), pixels_BCHW)


def _edges(pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pixels_BCHW.diff(dim=-1), pixels_BCHW.diff(dim=-2)


@dataclass(frozen=True)
class Crop:
    """A square window of a render's image or plate, or of its mirrored view.

    plate, flip: which view of the render. top, left, side: the window in that view, in pixels.
    """

    render: Render
    plate: bool
    flip: bool
    top: int
    left: int
    side: int

    def pixels(self) -> np.ndarray:
        """uint8 (side, side, 3)."""
        view = self.render.plate if self.plate else self.render.image
        if self.flip:
            view = view[:, ::-1]
        return view[self.top : self.top + self.side, self.left : self.left + self.side]


def _product_corner(render: Render, flip: bool, side: int) -> tuple[int, int]:
    """Top and left of the window whose middle is the middle of the product, as far as the view allows."""
    mask = render.mask[:, ::-1] if flip else render.mask
    rows, columns = np.nonzero(mask)
    top = np.clip(rows.mean() - side / 2, 0, SIZE - side)
    left = np.clip(columns.mean() - side / 2, 0, SIZE - side)
    return int(top), int(left)


def _draw_crops(renders: Renders, generator: torch.Generator, cell: int) -> list[Crop]:
    """Crops of images and plates, half of them mirrored; a quarter of all centre on the product.

    cell: corners are multiples of this many pixels.
    """
    side, count = CROPS[int(torch.randint(len(CROPS), (1,), generator=generator))]
    crops = []
    for render in renders.draw(generator, count):
        plate, flip, centred = (torch.rand(3, generator=generator) < torch.tensor([0.35, 0.5, 0.25])).tolist()
        top, left = torch.randint(SIZE - side + 1, (2,), generator=generator).tolist()
        if centred and render.mask.any():
            top, left = _product_corner(render, flip, side)
        crops.append(Crop(render, plate, flip, top - top % cell, left - left % cell, side))
    return crops


class PosteriorCache:
    """What a frozen encoder makes of every view of a render. Encodes a render when it is first asked for."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae
        self._moments: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def moments(self, crop: Crop) -> torch.Tensor:
        """Mean and log variance of the crop's latents, moments_(2C)HW, from an encoding of the whole view."""
        key = crop.render.id
        if key not in self._moments:
            views = [crop.render.image, crop.render.plate]
            views += [view[:, ::-1] for view in views]
            self._moments[key] = self._vae.quant_conv(self._vae.encoder(to_pixels(views).to(DEVICE))).half().cpu()
        top, left, side = crop.top // CELL, crop.left // CELL, crop.side // CELL
        return self._moments[key][2 * crop.flip + crop.plate, :, top : top + side, left : left + side].float()


def reconstruction_loss(output_BCHW: torch.Tensor, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """L1 on luma and, weighted up because the eye's colour errors are small numbers, on chroma; L1 on edges."""
    output = _ycbcr(output_BCHW)
    target = _ycbcr(pixels_BCHW)
    flat = F.l1_loss(output[:, :1], target[:, :1]) + 2.0 * F.l1_loss(output[:, 1:], target[:, 1:])
    edges = sum(map(F.l1_loss, _edges(output), _edges(target)))
    return flat + 0.5 * edges


def encoder_fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """16 hex digits over the tensors that make latents, of an autoencoder's state dict at any precision."""
    parts = ("encoder.", "quant_conv.")
    return digest_of_tensors({name: weight for name, weight in weights.items() if name.startswith(parts)})


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: list[np.ndarray], batch_size: int = 32) -> torch.Tensor:
    """Posterior means, unscaled latents_BCHW in fp32, of uint8 images."""
    means = []
    for batch in split(images, batch_size):
        pixels = to_pixels(list(batch)).to(vae.device)
        means.append(vae.encode(pixels).latent_dist.mean.cpu())
    return torch.cat(means)


@torch.inference_mode()
def measure_vae(vae: AutoencoderKL, renders: list[Render]) -> dict[str, float]:
    """PSNR in dB (peak 2 for pixels in [-1, 1]) over RGB, luma and chroma, and the latents' standard deviation."""
    errors, latents = [], []
    for images in split(images_and_plates(renders), 32):
        pixels = to_pixels(list(images)).to(vae.device)
        latent = vae.encode(pixels).latent_dist.mean
        delta = vae.decode(latent).sample.clamp(-1, 1) - pixels
        luma, chroma = _ycbcr(delta).tensor_split((1,), dim=1)
        errors.append(torch.stack([part.pow(2).mean((1, 2, 3)) for part in (delta, luma, chroma)]))
        latents.append(latent)
    rgb, luma, chroma = (10 * torch.log10(4 / torch.cat(errors, dim=1))).mean(dim=1).tolist()
    return {"psnr": rgb, "psnr_luma": luma, "psnr_chroma": chroma, "latent_std": torch.cat(latents).std().item()}


def _preview(vae: AutoencoderKL, renders: Renders, path: Path, progress: Progress) -> None:
    images = images_and_plates(renders.held_out[:4])
    with torch.inference_mode():
        output = to_images(vae(to_pixels(images).to(vae.device)).sample)
    rows = np.vstack([np.hstack(images), np.hstack(list(output))])
    cv2.imwrite(str(path), cv2.cvtColor(rows, cv2.COLOR_RGB2BGR))
    values = measure_vae(vae, renders.held_out[:24])
    print(f"vae  step {progress.step}  held out {values}", flush=True)


def _draw_latents(mean: torch.Tensor, log_variance: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return mean + noise * (0.5 * log_variance).exp()


def _whole_loss(vae: AutoencoderKL, renders: Renders) -> Loss:
    """Reconstruction and divergence, for the encoder and the decoder together."""

    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        crops = _draw_crops(renders, generator, cell=1)
        pixels = to_pixels(list(map(Crop.pixels, crops))).to(DEVICE, memory_format=torch.channels_last)
        with fast_precision():
            moments = vae.quant_conv(vae.encoder(pixels))
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        with fast_precision():
            output = vae.decode(_draw_latents(mean, log_variance, generator)).sample
        divergence = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).sum() / pixels[:, 0].numel()
        reconstruction = reconstruction_loss(output.float(), pixels)
        return reconstruction + KL_WEIGHT * divergence, {"reconstruction": reconstruction.item()}

    return loss_of


def _decoder_loss(vae: AutoencoderKL, renders: Renders) -> Loss:
    """Reconstruction alone, for the decoder behind a frozen encoder, whose output is computed once and kept."""
    cache = PosteriorCache(vae)

    def loss_of(generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        crops = _draw_crops(renders, generator, cell=CELL)
        pixels = to_pixels(list(map(Crop.pixels, crops))).to(DEVICE)
        mean, log_variance = torch.stack(list(map(cache.moments, crops))).chunk(2, dim=1)
        latents = _draw_latents(mean, log_variance, generator).to(DEVICE, memory_format=torch.channels_last)
        with fast_precision():
            output = vae.decode(latents).sample
        return reconstruction_loss(output.float(), pixels), {}

    return loss_of


def train_vae(
    renders: Renders, family: Family, folder: Path, minutes: float, seed: int, channels: int, decoder_only: bool
) -> None:
    """Train the autoencoder and stage it; its scaling factor is one over the latents' standard deviation.

    decoder_only: the encoder stays as it is, so that a UNet trained on its latents stays valid.
    """
    torch.manual_seed(seed)
    vae = build_vae(channels).to(DEVICE, memory_format=torch.channels_last)
    family.begin(vae, "vae")
    inputs = f"channels {channels}"
    if decoder_only:
        inputs = f"encoder {encoder_fingerprint(vae.state_dict())}"
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    plan = Plan("vae", folder, minutes, learning_rate=family.rate(1e-3), batch_size=8, seed=seed, inputs=inputs)
    loss_of = _decoder_loss(vae, renders) if decoder_only else _whole_loss(vae, renders)
    progress = run_stretch(plan, vae, loss_of, lambda at: _preview(vae, renders, folder / "preview.png", at))
    measures = measure_vae(vae, renders.held_out)
    if decoder_only:
        vae.register_to_config(scaling_factor=family.start_config("vae")["scaling_factor"])
    else:
        vae.register_to_config(scaling_factor=round(1 / measures["latent_std"], 5))
    record = family.record("vae", progress, renders, measures["psnr"], measures, vae.num_parameters())
    family.keep_if_better("vae", record, lambda staging: vae.half().save_pretrained(staging / "vae"))

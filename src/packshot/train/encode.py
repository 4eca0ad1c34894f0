"""The frozen encoders of a run: framed samples and captions to the tensors that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packshot.base.inpainting import ProductConv, product_channels
from packshot.base.load import Parts
from packshot.base.prompts import Piece, embed
from packshot.base.tokens import lost_words
from packshot.config.schema import DataConfig
from packshot.dataset import buckets
from packshot.diffusion.latents import encode_pixels
from packshot.diffusion.protocols import Autoencoder
from packshot.engine.memory import return_freed_memory
from packshot.engine.packed import Tensors
from packshot.engine.tensor_cache import content_key
from packshot.errors import ConfigError
from packshot.imaging.matte import held_by_mask
from packshot.imaging.pixels import to_network, to_unit
from packshot.methods.base import FramedSample, Method
from packshot.runs.folder import log

if TYPE_CHECKING:  # imported where they are built
    from diffusers import StableDiffusionXLPipeline

# Pictures that go through an encoder together: so many at most, and so many pixels, which is one picture of SDXL's. The
# VAE takes 2.5 GiB for that in fp32. Four small pictures stay in a processor's cache, and eight do not.
ENCODE_BATCH = 4
ENCODE_PIXELS = 1024 * 1024


def encode_batch(shape: tuple[int, int]) -> int:
    """How many pictures of (height, width) px are encoded together.

    It follows from the data alone, because no bit may depend on the machine.
    """
    return max(1, min(ENCODE_BATCH, ENCODE_PIXELS // (shape[0] * shape[1])))


@dataclass(frozen=True)
class Identity:
    """Digests of the encoders: part of the names of cache entries."""

    vae: str
    text: str
    method: str


class Encoder:
    """The frozen encoders of a run.

    resolution: side of the square bucket, px. prompt_chunks: how many chunks of 75 tokens every caption fills.

    Raises:
        ConfigError: the base cannot draw squares of that side.
    """

    def __init__(self, parts: Parts, method: Method, resolution: int, data: DataConfig, prompt_chunks: int = 1) -> None:
        self.parts = parts
        self.method = method
        self.prompt_chunks = prompt_chunks
        self.reads_product = isinstance(parts.unet.conv_in, ProductConv)
        cell = 2 ** (len(parts.unet.config.block_out_channels) - 1) * self.vae_scale
        try:
            step = buckets.bucket_step(resolution, cell)
        except ValueError as error:
            lower = max(cell, resolution // cell * cell)
            raise ConfigError(
                f"model.resolution={resolution} does not fit this base, whose sides are multiples of {cell} px.",
                f"Set it to {lower} or {lower + cell}.",
            ) from error
        self.shapes = buckets.shapes(resolution, step) if data.buckets else [(resolution, resolution)]

    @cached_property
    def identity(self) -> Identity:
        """Read when encoding starts: by then the encoders have the dtype they encode in, which is part of it."""
        text = self.parts.identity("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return Identity(
            vae=self.parts.identity("vae"),
            text=content_key(text, self.prompt_chunks) if self.prompt_chunks > 1 else text,
            method=self.method.cache_key(),
        )

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.parts.vae_config("block_out_channels")) - 1)

    @cached_property
    def _pipeline(self) -> StableDiffusionXLPipeline:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**self.parts.pipeline_components(references=False))

    def release(self) -> None:
        """Free the encoders that are not trained; the VAE stays, for validation pictures."""
        self.__dict__.pop("_pipeline", None)
        text = () if self.method.trains_text else ("text_encoder", "text_encoder_2")
        for name in (*text, *self.method.encoders):
            setattr(self.parts, name, None)
            if hasattr(self.method, name):
                setattr(self.method, name, None)
        return_freed_memory()

    @cached_property
    def _vae(self) -> Autoencoder:
        # NHWC in memory, as the pictures are: the fast layout of convolutions
        return cast("Autoencoder", self.parts.vae.to(memory_format=torch.channels_last))  # type: ignore[call-arg]

    @torch.no_grad()
    def latents(self, seen: Sequence[FramedSample]) -> list[Tensors]:
        """``mean`` to ``time_ids`` of an Example, for framed samples of one size; planes are bytes."""
        posterior = self._vae.encode(vae_pixels(seen).to(self._vae.device)).latent_dist
        entries = []
        for mean, std, sample in zip(posterior.mean.cpu(), posterior.std.cpu(), seen, strict=True):
            planes = sample.get("planes") or mask_planes(sample, self.vae_scale)
            time_ids = torch.tensor(sample["geometry"].time_ids())
            entries.append({"mean": mean, "std": std, **planes, "time_ids": time_ids})
        return entries

    def ready(self, sample: FramedSample) -> FramedSample:
        """The sample with all that needs no encoder: to be done in other threads, ahead of the encoders."""
        made = {"pixels_HW3": network_pixels(sample), "planes": mask_planes(sample, self.vae_scale)}
        return cast("FramedSample", {**sample, **made})

    @torch.no_grad()
    def product(self, seen: Sequence[FramedSample]) -> list[Tensors]:
        """``product`` of an Example, for framed samples of one size; see ``base.inpainting``."""
        solid = np.stack(list(map(product_mask, seen))) >= 128
        keep_B1HW = torch.from_numpy(solid[:, None].astype(np.float32))
        latents = encode_pixels(self._vae, vae_pixels(seen) * keep_B1HW).cpu()
        return [{"product": channels} for channels in product_channels(keep_B1HW, latents)]

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> list[Tensors]:
        """``prompt_embeds`` (77 x chunks, D) and ``pooled_prompt_embeds`` (P,), in the encoders' dtype.

        With one chunk they are what the stock pipeline makes.

        If the text encoders are trained: what they read, ``input_ids`` and ``input_ids_2``, (77,) each.
        """
        for text in texts:
            lost = lost_words(self.parts.tokenizer, text, self.prompt_chunks)
            if lost:
                log.warning(
                    "a caption is longer than objective.prompt_chunks=%d reads; lost: %r", self.prompt_chunks, lost
                )
        if self.method.trains_text:
            return list(map(self._token_ids, texts))
        if self.prompt_chunks > 1:
            return list(map(self._chunks_of_text, texts))
        prompts = cast("str", list(texts))  # it takes several, unlike its annotation
        prompt_embeds, _, pooled, _ = self._pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        rows = zip(prompt_embeds.cpu(), pooled.cpu(), strict=True)
        return [{"prompt_embeds": embeds, "pooled_prompt_embeds": one} for embeds, one in rows]

    def _chunks_of_text(self, text: str) -> Tensors:
        whole = embed(self._pipeline, [Piece(text)], self.prompt_chunks)
        return {"prompt_embeds": whole.prompt_embeds_1LD[0].cpu(), "pooled_prompt_embeds": whole.pooled_1D[0].cpu()}

    def _token_ids(self, text: str) -> Tensors:
        ids = {}
        for name, tokenizer in (("input_ids", self.parts.tokenizer), ("input_ids_2", self.parts.tokenizer_2)):
            length = tokenizer.model_max_length
            read = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            ids[name] = read.input_ids[0]
        return ids


def vae_pixels(seen: Sequence[FramedSample]) -> Tensor:
    """What the VAE reads of framed samples of one size: (B, 3, H, W) in [-1, 1], with the channels last in memory."""
    pixels = []
    for sample in seen:
        pixels.append(sample["pixels_HW3"] if "pixels_HW3" in sample else network_pixels(sample))
    return torch.from_numpy(np.stack(pixels)).movedim(-1, -3)


def network_pixels(sample: FramedSample) -> np.ndarray:
    """A framed picture as float32 (H, W, 3) in [-1, 1]."""
    return to_network(np.asarray(sample["image"])).movedim(-3, -1).numpy()


def mask_planes(sample: FramedSample, cell: int) -> Tensors:
    """``alpha``, ``held`` and ``inside`` of an Example as bytes, (1, h, w). cell: side of a latent cell, px."""
    mask_HW = product_mask(sample)
    size = (mask_HW.shape[0] // cell, mask_HW.shape[1] // cell)
    held_HW = held_by_mask(mask_HW, cell)
    return {
        "alpha": plane(cell_means(to_unit(mask_HW), size)),
        "held": plane(torch.from_numpy(held_HW.astype(np.float32))[None]),
        "inside": plane(cell_means(sample["geometry"].inside(), size).floor()),
    }


def product_mask(sample: FramedSample) -> np.ndarray:
    """The product's mask, uint8 (H, W); 0 everywhere without a mask."""
    if sample["mask"] is None:
        return np.zeros((sample["image"].height, sample["image"].width), np.uint8)
    return np.asarray(sample["mask"])


def cell_means(values_HW: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Mean over each latent cell, shape (1, h, w), fp32."""
    return F.adaptive_avg_pool2d(torch.from_numpy(values_HW)[None], size)


def plane(values: Tensor) -> Tensor:
    """Values in [0, 1] as bytes, rounded to steps of 1/255."""
    return (values * 255).round().to(torch.uint8)

"""Everything of a sample that is the same at each access: encoded once and cached, or anew each time, equally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from packshot.config.schema import DataConfig
from packshot.core.run import log
from packshot.data import buckets, geometry
from packshot.data.dataset import Rows
from packshot.models.load import Parts, weights_hash
from packshot.train.cache import TensorCache, Tensors, content_key

VERSION = 2  # raise it when the same sample gives other tensors


def framed(sample: dict[str, Any], target: tuple[int, int]) -> dict[str, Any]:
    """The sample as the model sees it: image and mask through one geometry, which is added as ``geometry``."""
    image, mask = sample["image"], sample["mask"]
    frame = geometry.plan((image.height, image.width), target, geometry.product_box(mask))
    seen = {**sample, "image": Image.fromarray(geometry.apply(frame, np.asarray(image))), "geometry": frame}
    if mask is not None:
        seen["mask"] = Image.fromarray(geometry.apply(frame, np.asarray(mask), pad="constant"))
    return seen


@dataclass(frozen=True)
class Identity:
    """What encoded a sample: part of the names of cache entries."""

    vae: str
    text: str
    method: str


class Encoder:
    """The frozen encoders of a run. ``resolution`` is the side of the square bucket, px."""

    def __init__(self, parts: Parts, method: Any, resolution: int, data: DataConfig) -> None:
        self.parts, self.method = parts, method
        step = 2 ** (len(parts.unet.config.block_out_channels) - 1) * self.vae_scale
        square = [(resolution, resolution)]
        self.shapes = buckets.shapes(resolution, max(step, resolution // 16)) if data.buckets else square
        self.identity = Identity(
            vae=weights_hash(parts.vae),
            text=weights_hash(parts.text_encoder, parts.text_encoder_2),
            method=method.cache_key(),
        )

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.parts.vae.config.block_out_channels) - 1)

    @cached_property
    def _pipeline(self) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(**self.parts.pipeline_components())

    def release(self) -> None:
        """Free the encoders that are not trained; the VAE stays, for validation pictures."""
        self.__dict__.pop("_pipeline", None)
        text = () if self.method.trains_text else ("text_encoder", "text_encoder_2")
        for name in (*text, "image_encoder"):
            setattr(self.parts, name, None)
        self.method.image_encoder = None

    @torch.no_grad()
    def latents(self, seen: dict[str, Any]) -> Tensors:
        """``mean`` and ``std`` (C, h, w) of the posterior, ``alpha`` (1, h, w) of the product, ``time_ids`` (6,)."""
        pixels = np.asarray(seen["image"], dtype=np.float32) / 127.5 - 1
        pixels_1CHW = torch.from_numpy(pixels.transpose(2, 0, 1))[None].to(self.parts.vae.device)
        posterior = self.parts.vae.encode(pixels_1CHW).latent_dist
        size = posterior.mean.shape[-2:]
        alpha = torch.zeros(1, *size)
        if seen["mask"] is not None:
            mask = torch.from_numpy(np.asarray(seen["mask"], dtype=np.float32) / 255)[None]
            alpha = F.adaptive_avg_pool2d(mask, size)
        return {
            "mean": posterior.mean[0].cpu(),
            "std": posterior.std[0].cpu(),
            "alpha": alpha,
            "time_ids": torch.tensor(seen["geometry"].time_ids()),
        }

    @torch.no_grad()
    def text(self, text: str) -> Tensors:
        """``prompt_embeds`` (77, D) and ``pooled_prompt_embeds`` (P,), as the stock pipeline makes them; fp32.

        If the text encoders are trained: what they read, ``input_ids`` and ``input_ids_2``, (77,) each.
        """
        self._warn_if_truncated(text)
        if self.method.trains_text:
            pairs = (("input_ids", self.parts.tokenizer), ("input_ids_2", self.parts.tokenizer_2))
            return {name: _token_ids(tokenizer, text) for name, tokenizer in pairs}
        prompt_embeds, _, pooled, _ = self._pipeline.encode_prompt(text, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds[0].float().cpu(), "pooled_prompt_embeds": pooled[0].float().cpu()}

    def _warn_if_truncated(self, text: str) -> None:
        lost = lost_words(self.parts.tokenizer, text)
        if lost:
            log.warning("a caption is longer than the %d tokens the model reads; lost: %r", 77, lost)


def _token_ids(tokenizer: Any, text: str) -> Tensor:
    length = tokenizer.model_max_length
    read = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return read.input_ids[0]


def lost_words(tokenizer: Any, text: str) -> str:
    """What the text encoders do not read of a text: all behind the 77th token; "" when it fits."""
    ids = tokenizer(text).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]) if len(ids) > tokenizer.model_max_length else ""


class Examples(Sequence[dict[str, Any]]):
    """A dataset as the loop reads it: encoded samples by index.

    Each has the tensors of :meth:`Encoder.latents` and :meth:`Encoder.text`, those of the method under ``encoded``, the
    embeddings of the empty prompt under ``empty`` and, if the method asks for pixels, the framed sample under ``seen``
    (else None). ``groups`` names the bucket of each sample.
    """

    def __init__(self, rows: Rows, encoder: Encoder, folder: Path | None) -> None:
        self.rows, self.ids, self.encoder = rows, rows.ids, encoder
        self.groups = [buckets.nearest(size, encoder.shapes) for size in rows.sizes]
        self._caches = {name: TensorCache(folder / f"{name}-{id[:12]}") for name, id in self._kinds()} if folder else {}

    def _kinds(self) -> list[tuple[str, str]]:
        identity = self.encoder.identity
        names = [("latents", identity.vae)]
        if not self.encoder.method.trains_text:
            names.append(("text", identity.text))
        return [*names, ("method", content_key(identity.method))] if identity.method else names

    def __len__(self) -> int:
        return len(self.ids)

    def seen(self, index: int) -> dict[str, Any]:
        """The framed sample: ``image``, ``mask``, ``text``, ``id``, ``geometry``."""
        return framed(self.rows.read(index, ("image", "mask")), self.encoder.shapes[self.groups[index]])

    def _key(self, index: int) -> str:
        return content_key(VERSION, self.rows.digest(index), self.encoder.shapes[self.groups[index]])

    def fill(self, accelerator: Accelerator) -> None:
        """Encode what no earlier run has encoded. Without a cache there is nothing to do."""
        if not self._caches:
            return
        encoder = self.encoder

        def per_sample(encode: Callable[[dict[str, Any]], Tensors]):
            # jobs hold an index, not a sample: a large set must not be decoded into memory
            for index, name in enumerate(self.ids):
                yield self._key(index), f"sample {name}", lambda index=index: encode(self.seen(index))

        self._caches["latents"].fill("encoding pictures", per_sample(encoder.latents), accelerator)
        if "method" in self._caches:
            self._caches["method"].fill("encoding references", per_sample(encoder.method.encode), accelerator)
        if "text" not in self._caches:
            return
        texts = sorted({*self.rows.texts, ""})
        jobs = ((content_key(text), f"caption {text!r}", lambda text=text: encoder.text(text)) for text in texts)
        self._caches["text"].fill("encoding captions", jobs, accelerator)

    def __getitem__(self, index: Any) -> Any:
        needs_pixels = self.encoder.method.needs_pixels
        if not self._caches:
            return self.fresh(index)
        key = self._key(index)
        example: dict[str, Any] = self._caches["latents"].get(key)
        example["encoded"] = self._caches["method"].get(key) if "method" in self._caches else {}
        example["seen"] = self.seen(index) if needs_pixels else None
        text, empty = (self._text(words) for words in (self.rows.texts[index], ""))
        return {**example, "id": self.ids[index], **text, "empty": empty}

    def _text(self, text: str) -> Tensors:
        return self._caches["text"].get(content_key(text)) if "text" in self._caches else self.encoder.text(text)

    def fresh(self, index: int) -> dict[str, Any]:
        """The same without the cache."""
        seen, encoder = self.seen(index), self.encoder
        return {
            **encoder.latents(seen),
            "encoded": encoder.method.encode(seen),
            "seen": seen if encoder.method.needs_pixels else None,
            "id": self.ids[index],
            **encoder.text(self.rows.texts[index]),
            "empty": encoder.text(""),
        }

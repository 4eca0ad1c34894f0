"""Everything of a sample that is the same at each access: encoded once and cached, or anew each time, equally."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from packshot.base.inpainting import ProductConv, product_channels
from packshot.base.load import Parts
from packshot.base.tokens import lost_words
from packshot.config.schema import DataConfig
from packshot.dataset import buckets
from packshot.dataset.rows import Rows
from packshot.diffusion.latents import encode_pixels
from packshot.engine.memory import return_freed_memory
from packshot.engine.tensor_cache import Job, TensorCache, Tensors, content_key
from packshot.errors import ConfigError, PackshotError
from packshot.imaging import framing
from packshot.imaging.matte import held_by_mask
from packshot.imaging.pixels import to_network, to_unit
from packshot.runs.folder import log

VERSION = 7  # raise it when the same sample gives other tensors
# Pictures that go through an encoder together: so many at most, and so many pixels, which is one picture of SDXL's. The
# VAE takes 2.5 GiB for that in fp32; eight of them would fill a card beside the network.
ENCODE_BATCH, ENCODE_PIXELS = 8, 1024 * 1024
TEXT_BATCH = 32
MOST_KIN = 8  # other samples whose encodings a sample may be conditioned on
# what letterbox bars show of a sample's other pictures, see framing.apply
PADDING = {"mask": "constant", "depth": "edge", "shadow": "edge"}


def encode_batch(shape: tuple[int, int]) -> int:
    """How many pictures of (height, width) px are encoded together: it follows from the data, as no bit may depend on
    the machine."""
    return max(1, min(ENCODE_BATCH, ENCODE_PIXELS // (shape[0] * shape[1])))


def _cut(items: list[Any], size: int) -> list[list[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def framed(sample: dict[str, Any], target: tuple[int, int]) -> dict[str, Any]:
    """The sample as the model sees it: its pictures through one geometry, which is added as ``geometry``.

    Raises:
        PackshotError: they differ in size.
    """
    image, mask = sample["image"], sample["mask"]
    others = {name: sample[name] for name in PADDING if sample.get(name) is not None}
    for name, other in others.items():
        if other.size != image.size:
            raise PackshotError(
                f"sample {sample['id']}: the picture has {image.width}x{image.height} px, its {name} "
                f"{other.width}x{other.height}.",
                f"Build the dataset again: it is not known where in the picture the {name} belongs.",
            )
    frame = framing.plan((image.height, image.width), target, framing.product_box(mask))
    seen = {**sample, "image": Image.fromarray(framing.apply(frame, np.asarray(image))), "geometry": frame}
    for name, other in others.items():
        seen[name] = Image.fromarray(framing.apply(frame, np.asarray(other), pad=PADDING[name]))
    return seen


@dataclass(frozen=True)
class Identity:
    """What encoded a sample: part of the names of cache entries."""

    vae: str
    text: str
    method: str


class Encoder:
    """The frozen encoders of a run. ``resolution`` is the side of the square bucket, px.

    Raises:
        ConfigError: the base cannot draw squares of that side.
    """

    def __init__(self, parts: Parts, method: Any, resolution: int, data: DataConfig) -> None:
        self.parts, self.method = parts, method
        self.shows_product = isinstance(parts.unet.conv_in, ProductConv)
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
        return Identity(
            vae=self.parts.identity("vae"),
            text=self.parts.identity("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
            method=self.method.cache_key(),
        )

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell."""
        return 2 ** (len(self.parts.vae_config("block_out_channels")) - 1)

    @cached_property
    def _vae(self) -> Any:
        # NHWC in memory, as the pictures are: the fast layout of convolutions
        return self.parts.vae.to(memory_format=torch.channels_last)

    @cached_property
    def _pipeline(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(**self.parts.pipeline_components(references=False))

    def release(self) -> None:
        """Free the encoders that are not trained; the VAE stays, for validation pictures."""
        self.__dict__.pop("_pipeline", None)
        text = () if self.method.trains_text else ("text_encoder", "text_encoder_2")
        for name in (*text, "image_encoder"):
            setattr(self.parts, name, None)
        self.method.image_encoder = None
        return_freed_memory()

    @torch.no_grad()
    def latents(self, seen: Sequence[dict[str, Any]]) -> list[Tensors]:
        """Of framed samples of one size: ``mean`` and ``std`` (C, h, w) of the posterior, ``alpha`` (1, h, w), the
        product's share of each cell, ``held`` (1, h, w), 1 in the cells that are held to it, ``inside`` (1, h, w), 0 in
        cells that a letterbox bar touches, else 1, and ``time_ids`` (6,)."""
        posterior = self._vae.encode(_pixels(seen).to(self._vae.device)).latent_dist
        size = tuple(posterior.mean.shape[-2:])
        rows = zip(posterior.mean.cpu(), posterior.std.cpu(), seen, strict=True)
        return [
            {
                "mean": mean,
                "std": std,
                "alpha": _alpha(sample["mask"], size),
                "held": _held(sample["mask"], size, self.vae_scale),
                "inside": _share(sample["geometry"].inside(), size).floor(),
                "time_ids": torch.tensor(sample["geometry"].time_ids()),
            }
            for mean, std, sample in rows
        ]

    @torch.no_grad()
    def product(self, seen: Sequence[dict[str, Any]]) -> list[Tensors]:
        """Of framed samples of one size: ``product`` (5, h, w), see ``models.inpainting.product_channels``."""
        keep = np.stack([_solid(sample["mask"], sample["image"].size) for sample in seen])[:, None]
        keep_B1HW = torch.from_numpy(keep)
        latents = encode_pixels(self._vae, _pixels(seen) * keep_B1HW).cpu()
        return [{"product": one} for one in product_channels(keep_B1HW, latents)]

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> list[Tensors]:
        """``prompt_embeds`` (77, D) and ``pooled_prompt_embeds`` (P,), as the stock pipeline makes them; fp32.

        If the text encoders are trained: what they read, ``input_ids`` and ``input_ids_2``, (77,) each.
        """
        for text in texts:
            self._warn_if_truncated(text)
        if self.method.trains_text:
            pairs = (("input_ids", self.parts.tokenizer), ("input_ids_2", self.parts.tokenizer_2))
            return [{name: _token_ids(tokenizer, text) for name, tokenizer in pairs} for text in texts]
        prompt_embeds, _, pooled, _ = self._pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
        rows = zip(prompt_embeds.float().cpu(), pooled.float().cpu(), strict=True)
        return [{"prompt_embeds": embeds, "pooled_prompt_embeds": one} for embeds, one in rows]

    def _warn_if_truncated(self, text: str) -> None:
        lost = lost_words(self.parts.tokenizer, text)
        if lost:
            log.warning("a caption is longer than the %d tokens the model reads; lost: %r", 77, lost)


def _pixels(seen: Sequence[dict[str, Any]]) -> Tensor:
    return to_network(np.stack([np.asarray(sample["image"]) for sample in seen]))


def _solid(mask: Image.Image | None, size: tuple[int, int]) -> np.ndarray:
    """1 where the product is, else 0; float32 (H, W)."""
    if mask is None:
        return np.zeros(size[::-1], np.float32)
    return (np.asarray(mask) >= 128).astype(np.float32)


def _alpha(mask: Image.Image | None, size: tuple[int, int]) -> Tensor:
    """The product's share of each latent cell, shape (1, h, w), in [0, 1]."""
    if mask is None:
        return torch.zeros(1, *size)
    return _share(to_unit(np.asarray(mask)), size)


def _held(mask: Image.Image | None, size: tuple[int, int], cell: int) -> Tensor:
    """1 in the latent cells that inference holds, else 0, shape (1, h, w)."""
    if mask is None:
        return torch.zeros(1, *size)
    return torch.from_numpy(held_by_mask(np.asarray(mask), cell).astype(np.float32))[None]


def _share(values_HW: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Mean over each latent cell, shape (1, h, w), fp32."""
    return F.adaptive_avg_pool2d(torch.from_numpy(values_HW)[None], size)


def _token_ids(tokenizer: Any, text: str) -> Tensor:
    length = tokenizer.model_max_length
    read = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return read.input_ids[0]


def choose_kin(kinds: Sequence[Hashable | None], ids: Sequence[str]) -> list[list[int]]:
    """For each sample the ``MOST_KIN`` others, or as many as there are, that may lend it their encodings.

    kinds: what kin have in common (see ``Method.kinship``); None: a sample without any. The choice follows from the ids
    of those of one kind alone, whatever their order; each is chosen as often as any other.
    """
    chosen: list[list[int]] = [[] for _ in kinds]
    members: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        if kind is not None:
            members.setdefault(kind, []).append(index)
    for indices in members.values():
        ring = sorted(indices, key=lambda index: content_key(ids[index]))
        for place, index in enumerate(ring):
            following = (ring[(place + step) % len(ring)] for step in range(1, min(MOST_KIN + 1, len(ring))))
            chosen[index] = [other for other in following if ids[other] != ids[index]]
    return chosen


class Encodings(Sequence[Tensors]):
    """Results of ``Method.encode`` for some samples, each read or made when it is asked for: one access uses one."""

    def __init__(self, indices: list[int], read: Callable[[int], Tensors]) -> None:
        self._indices, self._read = indices, read

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: Any) -> Any:
        return self._read(self._indices[number])


class Examples(Sequence[dict[str, Any]]):
    """A dataset as the loop reads it: encoded samples by index.

    Each has the tensors of :meth:`Encoder.latents`, :meth:`Encoder.text` and, if the UNet reads the product,
    :meth:`Encoder.product`; under ``encoded`` what the method made of it and, after that, of its kin
    (:class:`Encodings`), the embeddings of the empty prompt under ``empty`` and,
    if the method reads pictures, the framed sample under ``seen`` (else None). ``groups`` names the bucket of each
    sample. count: use only the first samples of the set.
    """

    def __init__(self, rows: Rows, encoder: Encoder, folder: Path | None, count: int | None = None) -> None:
        self.rows, self.ids, self.encoder = rows, rows.ids[:count], encoder
        self._nearest = [buckets.nearest(size, encoder.shapes) for size in rows.sizes]
        self.groups = self._nearest[:count]
        self._folder = folder

    @cached_property
    def _caches(self) -> dict[str, TensorCache]:
        folder = self._folder
        return {name: TensorCache(folder / f"{name}-{id[:12]}") for name, id in self._kinds()} if folder else {}

    def _kinds(self) -> list[tuple[str, str]]:
        identity = self.encoder.identity
        names = [("latents", identity.vae)]
        if self.encoder.shows_product:
            names.append(("product", identity.vae))
        if not self.encoder.method.trains_text:
            names.append(("text", identity.text))
        return [*names, ("method", content_key(identity.method))] if identity.method else names

    @cached_property
    def kin(self) -> list[list[int]]:
        """The samples whose encodings each can be conditioned on instead of its own; see :func:`choose_kin`. Of a set
        of which only the first are used the others may be among them."""
        kinship, ids = self.encoder.method.kinship, self.rows.ids
        if kinship is None:
            return [[] for _ in self.ids]
        chosen = choose_kin([kinship(self.rows.read(index, ())) for index in range(len(ids))], ids)[: len(self)]
        log.info(
            "%d of %d samples can be shown the reference of another of their look",
            sum(map(bool, chosen)),
            len(self),
        )
        return chosen

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Identity of the samples and their captions, in order."""
        return self.rows.fingerprint()

    def seen(self, index: int) -> dict[str, Any]:
        """The framed sample: ``image``, ``mask``, ``text``, ``id``, ``geometry``, and what else the method reads."""
        pictures = {"image", "mask", *self.encoder.method.pictures}
        return framed(self.rows.read(index, sorted(pictures)), self._shape(index))

    def _shape(self, index: int) -> tuple[int, int]:
        return self.encoder.shapes[self._nearest[index]]

    def _key(self, index: int) -> str:
        return content_key(VERSION, self.rows.digest(index), self._shape(index))

    def _chunks(self, indices: Iterable[int]) -> list[list[Job]]:
        """Samples, a batch of the encoders at a time, of one bucket each."""
        ordered = sorted(indices, key=lambda index: (self._nearest[index], index))
        together = (list(members) for _, members in groupby(ordered, key=lambda index: self._nearest[index]))
        # jobs hold an index, not a sample: a large set must not be decoded into memory
        return [
            [Job(self._key(index), f"sample {self.rows.ids[index]}", index) for index in chunk]
            for members in together
            for chunk in _cut(members, encode_batch(self._shape(members[0])))
        ]

    def fill(self, accelerator: Accelerator) -> None:
        """Encode what no earlier run has encoded. Without a cache there is nothing to do."""
        _ = self.kin  # read once, before the loader's processes are forked
        if not self._caches:  # every access encodes: the loader's processes share what is loaded before they are forked
            self.encoder.parts.load("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            return
        encoder, chunks = self.encoder, self._chunks(range(len(self)))

        def seen(indices: list[int]) -> list[dict[str, Any]]:
            return [self.seen(index) for index in indices]

        self._caches["latents"].fill("encoding pictures", chunks, lambda i: encoder.latents(seen(i)), accelerator)
        if "product" in self._caches:
            self._caches["product"].fill("encoding products", chunks, lambda i: encoder.product(seen(i)), accelerator)
        if "method" in self._caches:
            encode, lenders = encoder.method.encode, {*range(len(self)), *chain.from_iterable(self.kin)}
            chunks = self._chunks(lenders)
            self._caches["method"].fill("encoding references", chunks, lambda i: encode(seen(i)), accelerator)
        if "text" in self._caches:
            texts = sorted({*self.rows.texts[: len(self)], ""})
            jobs = [Job(content_key(text), f"caption {text!r}", text) for text in texts]
            self._caches["text"].fill("encoding captions", _cut(jobs, TEXT_BATCH), encoder.text, accelerator)

    def __getitem__(self, index: Any) -> Any:
        if not self._caches:
            return self.fresh(index)
        key = self._key(index)
        example: dict[str, Any] = self._caches["latents"].get(key)
        if "product" in self._caches:
            example |= self._caches["product"].get(key)
        example["encoded"] = Encodings([index, *self.kin[index]], self._cached_encoding)
        example["seen"] = self.seen(index) if self.encoder.method.pictures else None
        text, empty = (self._text(words) for words in (self.rows.texts[index], ""))
        return {**example, "id": self.ids[index], **text, "empty": empty}

    def _cached_encoding(self, index: int) -> Tensors:
        return self._caches["method"].get(self._key(index)) if "method" in self._caches else {}

    def _text(self, text: str) -> Tensors:
        return self._caches["text"].get(content_key(text)) if "text" in self._caches else self.encoder.text([text])[0]

    def fresh(self, index: int) -> dict[str, Any]:
        """The same without the cache."""
        seen, encoder = self.seen(index), self.encoder

        def encoded(other: int) -> Tensors:
            return encoder.method.encode([seen if other == index else self.seen(other)])[0]

        return {
            **encoder.latents([seen])[0],
            **(encoder.product([seen])[0] if encoder.shows_product else {}),
            "encoded": Encodings([index, *self.kin[index]], encoded),
            "seen": seen if encoder.method.pictures else None,
            "id": self.ids[index],
            **encoder.text([self.rows.texts[index]])[0],
            "empty": encoder.text([""])[0],
        }

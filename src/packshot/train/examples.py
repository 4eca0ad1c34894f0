"""Encoded samples as the loop reads them: from a cache on the disk, or encoded anew with identical results."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import NotRequired, TypedDict, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from packshot.dataset import buckets
from packshot.dataset.flips import flippable
from packshot.dataset.rows import Row, Rows
from packshot.engine.packed import Tensors
from packshot.engine.tensor_cache import Filling, Job, TensorCache, content_key, fill
from packshot.errors import PackshotError
from packshot.imaging import framing
from packshot.methods.base import FramedSample
from packshot.runs.folder import log
from packshot.train.encode import Encoder, encode_batch
from packshot.train.pictures import pack_pictures, unpack_pictures

VERSION = 9  # raise it when the same sample, or the same text, gives other tensors: it is in the names of the folders
TEXT_BATCH = 32
# What is cached of a picture, in the log's words.
KINDS = {"latents": "pictures", "product": "products", "method": "references", "seen": "framed pictures"}
MAX_PEERS = 8  # other samples whose encodings a sample may be conditioned on
T = TypeVar("T")


class Example(TypedDict):
    """An encoded sample, without batch dimension.

    mean, std: of the VAE's posterior, (C, h, w). alpha: the product's share of each latent cell in steps of 1/255,
    (1, h, w). held: 1 in the cells that are held to the product, else 0. inside: 0 in cells that a letterbox bar
    touches, else 1. time_ids: (6,). product: (5, h, w), if the UNet reads it. All are fp32, whatever the cache holds.
    prompt, empty: what the network reads of the caption and of the empty text, see ``Encoder.text``. bare: there is no
    caption. prompts: of each caption, where there are several. encoded: what the method made of the sample, then of its
    peers. seen: the framed sample, if the method reads pictures, as far as it reads them. mirror: the mirror image as
    a list of one, where the sample may be flipped.
    """

    id: str
    bare: NotRequired[bool]
    mean: Tensor
    std: Tensor
    alpha: Tensor
    held: Tensor
    inside: Tensor
    time_ids: Tensor
    product: NotRequired[Tensor]
    prompt: Tensors
    prompts: NotRequired[Sequence[Tensors]]
    empty: Tensors
    encoded: Sequence[Tensors]
    seen: FramedSample | None
    mirror: NotRequired[Sequence[Example]]


def cache_name(kind: str, digest: str) -> str:
    """The folder of a kind of encoding. digest: of what all its entries depend on."""
    return f"{kind}-{VERSION}-{digest[:12]}"


def say_other_versions(folder: Path) -> None:
    """Log how much of the cache another version of Packshot has written: this one does not read it."""
    ours = re.compile(rf"\w+-{VERSION}-[0-9a-f]{{12}}")
    others = re.compile(rf"({'|'.join([*KINDS, 'text'])})-(\d+-)?[0-9a-f]{{12}}")
    found = []
    for place in folder.glob("*-*"):
        if others.fullmatch(place.name) and not ours.fullmatch(place.name):
            found += filter(Path.is_file, place.iterdir())
    if found:
        size = sum(file.stat().st_size for file in found) / 2**20
        log.info(
            "%s holds %d files (%.1f MiB) of another version of Packshot, which this one does not read: what it needs "
            "is encoded again. If no older version is used any more, delete %s",
            folder,
            len(found),
            size,
            " ".join(sorted({file.parent.name for file in found})),
        )


def chunked(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, ``size`` at a time."""
    for first in range(0, len(items), size):
        yield items[first : first + size]


def framed(sample: Row, target: tuple[int, int]) -> FramedSample:
    """The sample as the model sees it: its pictures through one geometry, which is added as ``geometry``.

    sample: ``full_size`` has (height, width) of the whole picture, where ``image`` was decoded smaller.

    Raises:
        PackshotError: they differ in size.
    """
    seen = dict(sample)
    height, width = seen.pop("full_size", None) or sample["image"].size[::-1]
    geometry = framing.plan((height, width), target, framing.product_box(sample["mask"]))
    seen["geometry"] = geometry
    for name, picture in sample.items():
        if not isinstance(picture, Image.Image):
            continue
        if name != "image" and picture.size != (width, height):
            raise PackshotError(
                f"sample {sample['id']}: the picture has {width}x{height} px, its {name} "
                f"{picture.width}x{picture.height}.",
                f"Build the dataset again: it is not known where in the picture the {name} belongs.",
            )
        # letterbox bars hold no product; other pictures go on as they are at the rim
        pad = "constant" if name == "mask" else "edge"
        seen[name] = Image.fromarray(framing.apply(geometry, np.asarray(picture), pad=pad))
    return cast("FramedSample", seen)


def mirrored(sample: FramedSample) -> FramedSample:
    """The framed sample's mirror image: all its pictures, and the geometry that shows them."""
    turned: dict[str, object] = {**sample, "geometry": sample["geometry"].mirrored()}
    for name, picture in turned.items():
        if isinstance(picture, Image.Image):
            turned[name] = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return cast("FramedSample", turned)


def kept(samples: Sequence[FramedSample]) -> list[Tensors]:
    """The cache entries of framed pictures, which were made together with what the encoder reads."""
    return [sample.get("kept", {}) for sample in samples]


def widened(tensors: Tensors) -> Tensors:
    """An entry as the network's batches take it: bytes are planes in [0, 1] again, lower precisions fp32; token ids
    stay."""
    wide = {}
    for name, tensor in tensors.items():
        if tensor.dtype is torch.uint8:
            wide[name] = tensor.float() / 255
        else:
            wide[name] = tensor.float() if tensor.is_floating_point() else tensor
    return wide


def choose_peers(keys: Sequence[Hashable | None], ids: Sequence[str]) -> list[list[int]]:
    """For each sample the ``MAX_PEERS`` others, or as many as there are, whose encodings it may be conditioned on.

    keys: equal for peers (see ``Method.peer_key``); None: a sample without peers. The choice follows from the ids of
    the peers alone, whatever their order, and each sample is chosen as often as any other.
    """
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            members.setdefault(key, []).append(index)
    chosen: list[list[int]] = [[] for _ in keys]
    for indices in members.values():
        # each takes those that follow it on a ring in the order of their hashed ids
        ring = sorted(indices, key=lambda index: content_key(ids[index]))
        twice_around = ring + ring
        count = min(MAX_PEERS, len(ring) - 1)
        for place, index in enumerate(ring):
            following = twice_around[place + 1 : place + 1 + count]
            chosen[index] = [other for other in following if ids[other] != ids[index]]
    return chosen


class Encodings(Sequence[T]):
    """What some samples give, each read or made when it is indexed: one access uses one."""

    def __init__(self, indices: Sequence[int], read: Callable[[int], T]) -> None:
        self._indices = indices
        self._read = read

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> T:  # type: ignore[override]  # nothing slices it
        return self._read(self._indices[number])


class Examples(Sequence[Example]):
    """A dataset as the loop reads it: encoded samples by index.

    ``groups`` names the bucket of each sample. folder: of the cache; None: every access encodes. count: use only the
    first samples of the set. flip: samples whose captions allow it have a mirror image, whose index is the sample's
    plus the number of rows. smallest_bucket: see ``dataset.buckets.sort_into``.
    """

    def __init__(
        self,
        rows: Rows,
        encoder: Encoder,
        folder: Path | None,
        count: int | None = None,
        flip: bool = False,
        smallest_bucket: int = 1,
    ) -> None:
        self.rows = rows
        self.whole = len(rows.ids)
        self.ids = rows.ids[:count]
        self.encoder = encoder
        self._captions: list[list[str] | None] = getattr(rows, "captions", None) or [None] * len(rows.ids)
        self.flips = flippable(rows.texts, self._captions) if flip else [False] * self.whole
        self._nearest = buckets.sort_into(rows.sizes, encoder.shapes, smallest_bucket)
        self.moved = 0  # samples whose own bucket is closed
        if smallest_bucket > 1:
            own = buckets.sort_into(rows.sizes, encoder.shapes)
            self.moved = sum(map(operator.ne, own, self._nearest))
        self.groups = self._nearest[:count]
        self._folder = folder

    @cached_property
    def _caches(self) -> dict[str, TensorCache]:
        """One cache for each kind of encoding; none without a folder."""
        if self._folder is None:
            return {}
        method = self.encoder.method
        identity = self.encoder.identity
        kinds = {"latents": identity.vae}
        if self.encoder.reads_product:
            kinds["product"] = identity.vae
        if not method.trains_text:
            kinds["text"] = identity.text
        if identity.method:
            kinds["method"] = content_key(identity.method)
        if method.pictures:
            kinds["seen"] = content_key(*self._pictures, method.reach)
        return {name: TensorCache(self._folder / cache_name(name, digest)) for name, digest in kinds.items()}

    @cached_property
    def peers(self) -> list[list[int]]:
        """The samples whose encodings each may be conditioned on instead of its own; see :func:`choose_peers`.

        Where only the first samples of a set are used, peers may come from the rest.
        """
        peer_key = self.encoder.method.peer_key
        if peer_key is None:
            return [[] for _ in self.ids]
        keys = [peer_key(self.rows.read(index, ())) for index in range(len(self.rows.ids))]
        chosen = choose_peers(keys, self.rows.ids)[: len(self)]
        count = sum(map(bool, chosen))
        log.info("%d of %d samples can be shown the reference of another of their look", count, len(self))
        return chosen

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Identity of the samples and their captions, in order."""
        return self.rows.fingerprint()

    def seen(self, index: int) -> FramedSample:
        """The framed sample, with image, mask and the further pictures that the method reads."""
        shape = self._shape(index)
        sample = framed(self.rows.read(index % self.whole, self._pictures, covering=shape), shape)
        return mirrored(sample) if index >= self.whole else sample

    @property
    def _pictures(self) -> list[str]:
        return sorted({"image", "mask", *self.encoder.method.pictures})

    def _kept(self, index: int) -> FramedSample:
        """:meth:`seen` from the cache, as far as the method reads it."""
        kept = unpack_pictures(self._caches["seen"].get(self._picture_key(index)))
        return cast("FramedSample", {**self.rows.read(index % self.whole, ()), **kept})

    def _bucket(self, index: int) -> int:
        return self._nearest[index % self.whole]

    def _ready(self, index: int) -> FramedSample:
        ready = self.encoder.ready(self.seen(index))
        if "seen" in self._caches:
            ready["kept"] = pack_pictures(ready, self._pictures, self.encoder.method.reach)
        return ready

    def _shape(self, index: int) -> tuple[int, int]:
        return self.encoder.shapes[self._bucket(index)]

    def _key(self, index: int) -> str:
        side = ("mirrored",) if index >= self.whole else ()
        return content_key(self.rows.digest(index % self.whole), self._shape(index), *side)

    def _key_of_pictures(self, job: Job) -> str:
        return self._picture_key(job.item)

    def _picture_key(self, index: int) -> str:
        """The key of the framed pictures, which follow from further columns too."""
        further = sorted({*self.encoder.method.pictures} - {"image", "mask"})
        digests = [self.rows.column_digest(name, index % self.whole) for name in further]
        return content_key(self._key(index), *digests)

    def _chunks(self, indices: Iterable[int]) -> list[list[Job]]:
        """Samples of one bucket each, as many as go through an encoder together."""
        ordered = sorted(indices, key=lambda index: (self._bucket(index), index))
        chunks = []
        for _, members in groupby(ordered, key=self._bucket):
            bucket = list(members)
            for chunk in chunked(bucket, encode_batch(self._shape(bucket[0]))):
                # jobs hold an index, not a sample: a large set must not be decoded into memory
                chunks.append(list(map(self._job, chunk)))
        return chunks

    def _job(self, index: int) -> Job:
        return Job(self._key(index), f"sample {self.rows.ids[index % self.whole]}", index)

    def _with_mirrors(self, chunks: Iterable[list[Job]]) -> list[list[Job]]:
        """The chunks, and after each with a sample that may be flipped the mirror image of all of it.

        What is encoded together changes the last bits; so it may depend neither on ``flip`` nor on the captions.
        """
        made = []
        for chunk in chunks:
            made.append(chunk)
            if any(self.flips[job.item] for job in chunk):
                made.append([self._job(self.whole + job.item) for job in chunk])
        return made

    def fill(self, accelerator: Accelerator) -> None:
        """Encode what no earlier run has encoded. Without a cache there is nothing to do."""
        _ = self.peers  # read once, before the loader's processes are forked
        if not self._caches:  # every access encodes: the loader's processes share what is loaded before they are forked
            self.encoder.parts.load("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            return
        if accelerator.is_main_process and self._folder:
            say_other_versions(self._folder)
        encoder = self.encoder
        own = range(len(self))
        encoders = {"latents": encoder.latents, "product": encoder.product, "method": encoder.method.encode}
        fillings = []
        if "seen" in self._caches:
            fillings.append(Filling(self._caches["seen"], f"keeping {KINDS['seen']}", kept, self._key_of_pictures))
        for name, encode in encoders.items():
            if name in self._caches:
                fillings.append(Filling(self._caches[name], f"encoding {KINDS[name]}", encode))
        fill("encoding pictures", fillings, self._with_mirrors(self._chunks(own)), accelerator, prepare=self._ready)
        others = {*chain.from_iterable(self.peers)} - {*own}
        if "method" in self._caches and others:  # where only the first samples of a set are used
            chunks = self._with_mirrors(self._chunks(others))
            self._caches["method"].fill("encoding peers", chunks, encoder.method.encode, accelerator, prepare=self.seen)
        if "text" in self._caches:
            several = chain.from_iterable(captions or () for captions in self._captions[: len(self)])
            texts = sorted({*self.rows.texts[: len(self)], *several, ""})
            jobs = [Job(content_key(text), f"caption {text!r}", text) for text in texts]
            chunked_jobs = list(chunked(jobs, TEXT_BATCH))
            self._caches["text"].fill("encoding captions", chunked_jobs, encoder.text, accelerator)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # nothing slices it
        example = self.cached(index) if self._caches else self.fresh(index)
        if self.flips[index]:
            read = self.cached if self._caches else self.fresh
            example["mirror"] = Encodings([self.whole + index], read)
        return example

    def cached(self, index: int) -> Example:
        """A sample, or its mirror image, from the cache."""
        key = self._key(index)
        tensors = self._caches["latents"].get(key)
        if "product" in self._caches:
            tensors |= self._caches["product"].get(key)
        seen = self._kept(index) if "seen" in self._caches else None
        encodings = Encodings([index, *self.peers[index % self.whole]], self._cached_encoding)
        return self._example(index, tensors, self._text, encodings, seen)

    def fresh(self, index: int) -> Example:
        """The same encoded anew."""
        encoder = self.encoder
        seen = self.seen(index)

        def encoding(other: int) -> Tensors:
            return widened(encoder.method.encode([seen if other == index else self.seen(other)])[0])

        tensors = encoder.latents([seen])[0]
        if encoder.reads_product:
            tensors |= encoder.product([seen])[0]
        encodings = Encodings([index, *self.peers[index % self.whole]], encoding)
        shown = seen if encoder.method.pictures else None
        return self._example(index, tensors, lambda text: encoder.text([text])[0], encodings, shown)

    def _example(
        self,
        index: int,
        tensors: Tensors,
        encode_text: Callable[[str], Tensors],
        encoded: Sequence[Tensors],
        seen: FramedSample | None,
    ) -> Example:
        index %= self.whole
        text = self.rows.texts[index]
        captions = self._captions[index] or [text]
        example = {
            **widened(tensors),
            "id": self.ids[index],
            "bare": not text,
            "prompts": Encodings(range(len(captions)), lambda number: widened(encode_text(captions[number]))),
            "prompt": widened(encode_text(text)),
            "empty": widened(encode_text("")),
            "encoded": encoded,
            "seen": seen,
        }
        return cast("Example", example)

    def _cached_encoding(self, index: int) -> Tensors:
        return widened(self._caches["method"].get(self._key(index))) if "method" in self._caches else {}

    def _text(self, text: str) -> Tensors:
        return self._caches["text"].get(content_key(text)) if "text" in self._caches else self.encoder.text([text])[0]

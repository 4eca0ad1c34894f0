"""The pictures whose look a background takes: opened, weighed, and encoded for the IP-Adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from packshot.config.schema import reference_weights
from packshot.generate.adapters import Pipe
from packshot.generate.product import Source, open_image

GREY = (127, 127, 127)


@dataclass(frozen=True)
class Reference:
    """A picture (RGB or RGBA), the SHA-256 of its file or pixels, and how often it counts among others."""

    image: Image.Image
    sha256: str
    weight: int = 1


def open_references(given: Source | Sequence[Source] | None, weights: Sequence[int] = ()) -> list[Reference]:
    """The references of a request; weights: one per picture, or none.

    Raises:
        ConfigError: a file is missing or not an image, or the weights do not fit.
    """
    sources: Sequence[Source] = (given,) if isinstance(given, Source) else given or ()
    counts = reference_weights(len(sources), weights)
    references = []
    for source, count in zip(sources, counts, strict=True):
        photo = open_image("reference", source)
        references.append(Reference(photo.image, photo.sha256, count))
    return references


def image_embeds(pipe: Pipe, references: Sequence[Reference], guided: bool, device: torch.device | str) -> torch.Tensor:
    """(2 or 1, n, ...) with the null image first; without a reference the null image stands on both sides.

    n is the sum of the weights: a reference of weight 2 stands there twice. Attention's softmax runs over the tokens of
    all n images, so one that is there twice has twice the odds against the others. Weights 2 and 1 make two thirds and
    one third where attention likes both equally; elsewhere it may prefer the second one still.
    """
    pictures = [over_grey(reference.image) for reference in references] or [Image.new("RGB", (64, 64), GREY)]
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    # diffusers' own rule: a pooled projection takes the pooled embedding, every other one the hidden states.
    hidden = type(projection).__name__ != "ImageProjection"
    positive, null = pipe.encode_image(pictures, device, 1, hidden)
    halves = [null] if guided else []
    halves.append(positive if references else null)
    counts = torch.tensor([reference.weight for reference in references] or [1], device=positive.device)
    return torch.stack(halves).repeat_interleave(counts, dim=1)


def over_grey(image: Image.Image) -> Image.Image:
    """Over grey: what is transparent has no look."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (*GREY, 255)), image).convert("RGB")

"""Pictures inside the rows of a dataset: the source's own bytes where they can stay, else newly encoded ones."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from packshot.errors import PackshotError
from packshot.imaging.decode import decode_image, open_up_to
from packshot.imaging.profiles import READ_AS_SRGB
from packshot.make_dataset.sources import Raw, read_items
from packshot.pipeline.step import Sample
from packshot.runs.files import sha256

# Formats that stay as they are, by their first bytes: readers of datasets open them all.
_KEPT = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF")
_LOSSY = (b"\xff\xd8\xff", b"RIFF")
_TURNED = "turned upright"  # readers turn pictures by their EXIF orientation
QUALITY = 95  # of JPEG, for scaled pictures of lossy sources


def png(image: Image.Image) -> Sample:
    """An image as the ``image`` feature of ``datasets`` stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return {"bytes": buffer.getvalue(), "path": None}


def open_png(value: Sample) -> Image.Image:
    """A stored image of any size: what is too large was left out before."""
    return open_up_to(None, value["bytes"])


def keeps_bytes(data: bytes, image: Image.Image, changes: list[str]) -> bool:
    """Whether the source's bytes may stand in a row: decoding changed nothing that a reader would not do as well."""
    harmless = all(change.startswith(_TURNED) or change.endswith(READ_AS_SRGB) for change in changes)
    return image.mode == "RGB" and data.startswith(_KEPT) and harmless


def scaled(image: Image.Image, max_side: int | None) -> Image.Image:
    """The image, scaled down where its longer side is above the limit."""
    if max_side is None or max(image.size) <= max_side:
        return image
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return small


def encode_scaled(image: Image.Image, data: bytes) -> Sample:
    """A scaled picture in the manner of its source: lossy ones as JPEG, others as PNG."""
    if image.mode != "RGB" or not data.startswith(_LOSSY):
        return png(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return {"bytes": buffer.getvalue(), "path": None}


def source_bytes(sample: Sample) -> bytes:
    """The bytes of a picture that was not copied into the first step's file: read from the source again.

    Raises:
        PackshotError: the source changed since the first step.
    """
    raw: Raw = next(read_items([json.loads(sample["item"])]))
    if raw.data is None or sha256(raw.data) != sample["id"]:
        raise PackshotError(
            f"{sample['source']} changed while the dataset was built. {raw.error}".strip(),
            "Run it again: run.resume=true.",
        )
    return raw.data


def stored_picture(sample: Sample) -> Sample:
    """The picture as the dataset holds it."""
    if sample["image"] is not None:
        return sample["image"]
    return {"bytes": source_bytes(sample), "path": None}


def picture(sample: Sample) -> Image.Image:
    """The decoded picture of a sample, RGB or RGBA."""
    if sample["image"] is not None:
        return open_png(sample["image"])
    data = source_bytes(sample)
    limit: Any = sample["width"] * sample["height"]
    return decode_image(data, sample["source"], limit)

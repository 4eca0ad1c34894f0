"""Pictures inside the rows of a dataset."""

from __future__ import annotations

import io

from PIL import Image

from packshot.imaging.decode import open_up_to
from packshot.pipeline.step import Sample


def png(image: Image.Image) -> Sample:
    """An image as the ``image`` feature of ``datasets`` stores it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=4)
    return {"bytes": buffer.getvalue(), "path": None}


def open_png(value: Sample) -> Image.Image:
    """Inverse of :func:`png`, of any size: what is too large was left out before."""
    return open_up_to(None, value["bytes"])

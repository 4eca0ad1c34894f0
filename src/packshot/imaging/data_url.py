"""Pictures inside text: pages that need no other file, and questions to a server."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_url(image: Image.Image, longest_side: int, quality: int = 88) -> str:
    """The picture at no more than ``longest_side`` px as a data URL: PNG with transparency, JPEG without."""
    small = image.copy()
    small.thumbnail((longest_side, longest_side))
    clear = small.mode == "RGBA"
    buffer = io.BytesIO()
    small.save(buffer, "PNG") if clear else small.convert("RGB").save(buffer, "JPEG", quality=quality)
    return f"data:image/{'png' if clear else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"

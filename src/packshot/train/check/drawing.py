"""Drawing what ``mode=check`` shows: panels side by side, a line per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from packshot.imaging.framing import scaled_size
from packshot.imaging.pixels import from_network, to_bytes

SIDE = 320  # px, longer side of a panel
STRIP = 24  # px above a panel, for its label
WORDS = 440  # px, width of the column of words
FONT = 15  # px
GAP = 8  # px
OUTLINE = (255, 0, 170)
UNKNOWN = (255, 0, 255)  # a control map's pixels below 0, which say "unknown"
LOST = (208, 0, 0)


@dataclass(frozen=True)
class Line:
    """One sample: labelled panels, its caption in what is read and what is lost, and further lines of text."""

    panels: list[tuple[str, Image.Image]]
    read: str
    lost: str
    notes: list[str]


def fitted(picture: Image.Image) -> Image.Image:
    """The picture with a longer side of ``SIDE``."""
    scale = SIDE / max(picture.size)
    return picture.resize(scaled_size(picture.size, scale), Image.Resampling.LANCZOS)


def outlined(picture: Image.Image, mask: Image.Image | None) -> Image.Image:
    """The picture at panel size with the outline of its mask (white = product)."""
    large = fitted(picture)
    if mask is None:
        return large
    inside = (np.asarray(mask.resize(large.size, Image.Resampling.BILINEAR)) >= 128).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    pixels = np.array(large)
    cv2.drawContours(pixels, contours, -1, OUTLINE, 2, cv2.LINE_AA)
    return Image.fromarray(pixels)


def from_vae(pixels_CHW: Tensor) -> Image.Image:
    """A decoder's output, about [-1, 1]."""
    return Image.fromarray(to_bytes(from_network(pixels_CHW)))


def from_condition(tensor_CHW: Tensor) -> Image.Image:
    """A picture in [0, 1] that the network is given; what is unknown in it (below 0) in magenta."""
    values = tensor_CHW.permute(1, 2, 0).float().numpy()
    pixels = to_bytes(values)
    pixels[(values < 0).any(axis=2)] = UNKNOWN
    return Image.fromarray(pixels)


def from_weight(weight_HW: Tensor) -> Image.Image:
    """Loss weights, the largest white."""
    values = weight_HW.float().numpy()
    pixels = to_bytes(values / max(float(values.max()), 1e-12))
    height, width = pixels.shape
    scale = max(1, SIDE // max(height, width))  # latent cells stay visible as such
    return Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST).convert("RGB")


def sheet(lines: Sequence[Line], title: str) -> Image.Image:
    """All lines below each other, their panels in columns."""
    columns = max(len(line.panels) for line in lines)
    font = ImageFont.load_default(FONT)
    pitch = SIDE + STRIP + GAP
    result = Image.new("RGB", (GAP + columns * (SIDE + GAP) + WORDS, STRIP + pitch * len(lines)), "white")
    draw = ImageDraw.Draw(result)
    draw.text((GAP, 3), title, fill="black", font=font)
    for number, line in enumerate(lines):
        top = STRIP + number * pitch
        for column, (label, picture) in enumerate(line.panels):
            left = GAP + column * (SIDE + GAP)
            draw.text((left, top + 3), label, fill=(90, 90, 90), font=font)
            result.paste(fitted(picture), (left, top + STRIP))
        corner = (GAP + columns * (SIDE + GAP), top + STRIP)
        height = _flow(draw, font, corner, [(line.read, "black"), (line.lost, LOST)])
        draw.multiline_text((corner[0], height + GAP), "\n".join(line.notes), fill=(90, 90, 90), font=font)
    return result


def _flow(draw: ImageDraw.ImageDraw, font: object, corner: tuple[int, int], parts: Sequence[tuple[str, object]]) -> int:
    """Text of several colours, wrapped at the width of its column; returns where it ends, px from the top."""
    x, y = corner
    for text, colour in parts:
        for word in text.split():
            width = draw.textlength(f"{word} ", font=font)  # type: ignore[arg-type]
            if x > corner[0] and x + width > corner[0] + WORDS - GAP:
                x, y = corner[0], y + FONT + 4
            draw.text((x, y), word, fill=colour, font=font)  # type: ignore[arg-type]
            x += width
    return y + FONT + 4


def curve(values: Sequence[float], size: tuple[int, int] = (640, 240)) -> Image.Image:
    """A line through the learning rates of all steps, peak at the top."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    peak = max(values) or 1.0
    xs = np.linspace(8, size[0] - 8, len(values))
    points = [(float(x), size[1] - 8 - (size[1] - 40) * value / peak) for x, value in zip(xs, values, strict=True)]
    draw.line(points if len(points) > 1 else points * 2, fill=(30, 90, 200), width=2)
    words = f"learning rate, peak {peak:.3g}, last {values[-1]:.3g}, {len(values)} steps"
    draw.text((8, 6), words, fill="black", font=ImageFont.load_default(FONT))
    return picture

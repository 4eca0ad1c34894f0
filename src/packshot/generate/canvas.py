"""Where the product stands: the output canvas, and the working copy of it that the diffusion model sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from packshot.config.schema import GenerateSettings, Placement
from packshot.errors import ConfigError
from packshot.generate.product import Product, core_of
from packshot.imaging.matte import held_cells
from packshot.imaging.pixels import to_bytes, to_unit

# Kernels without negative lobes: a pixel whose resampled alpha is full has then seen nothing but product.
_SHRINK, _GROW = Image.Resampling.HAMMING, Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Canvas:
    """The product on the output's pixel grid.

    rgb_HW3: uint8, the photo (placed: zero outside the pasted window). matte_HW: uint8 alpha for compositing.
    foreground_HW3: uint8 product colours, equal to rgb_HW3 where matte_HW is 255, continued outwards elsewhere.
    core_HW: bool, the pixels that must come out unchanged.
    transform: how a pixel of the photo got here, in words and numbers; part of the certificate.
    depth_HW: uint8 nearness in any scale, None where it is not known.
    mask_reasons: codes of what speaks against the mask (``imaging.mask_doubt``).
    """

    rgb_HW3: np.ndarray
    matte_HW: np.ndarray
    foreground_HW3: np.ndarray
    core_HW: np.ndarray
    transform: dict[str, Any]
    depth_HW: np.ndarray | None = None
    mask_reasons: tuple[str, ...] = ()


def place(product: Product, settings: GenerateSettings) -> Canvas:
    """Put the product on the canvas that the settings ask for."""
    return replace(PLACEMENTS[settings.placement](product, settings), mask_reasons=product.mask_reasons)


def place_original(product: Product, settings: GenerateSettings) -> Canvas:
    """The photo's own frame and size: nothing is moved or resampled."""
    height, width = product.alpha_HW.shape
    transform = {
        "placement": "original",
        "size": [width, height],
        "source_box": [0, 0, width, height],
        "offset": [0, 0],
        "scale": [1.0, 1.0],
        "resampling": "none",
    }
    core = core_of(product.alpha_HW)
    return Canvas(product.rgb_HW3, product.matte_HW, product.foreground_HW3, core, transform, product.depth_HW)


def place_center(product: Product, settings: GenerateSettings) -> Canvas:
    """The product in the middle of ``settings.size``, its larger relative side at ``product_scale`` of the canvas.

    One resampling: ``photo.resize(placed_size, resampling, box=source_box)`` in Pillow, pasted at ``offset``.
    """
    if len(settings.size) != 2:
        raise ConfigError("placement=center needs a canvas.", "Add size=[width,height], in px.")
    width, height = settings.size
    rows_total, columns_total = product.alpha_HW.shape
    rows, columns = np.nonzero(product.matte_HW)
    left, top, right, bottom = (int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    scale = settings.product_scale * min(width / (right - left), height / (bottom - top))
    placed = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    offset = ((width - placed[0]) // 2, (height - placed[1]) // 2)
    method = _SHRINK if scale <= 1 else _GROW
    box = (left, top, right, bottom)

    def resampled(array: np.ndarray, fill: Any = 0) -> np.ndarray:
        result = np.full((height, width, *array.shape[2:]), fill, np.uint8)
        picture = np.asarray(Image.fromarray(array).resize(placed, method, box=box))
        result[offset[1] : offset[1] + placed[1], offset[0] : offset[0] + placed[0]] = picture
        return result

    rgb, matte = resampled(product.rgb_HW3), resampled(product.matte_HW)
    mean = product.rgb_HW3[product.alpha_HW >= 128].mean(axis=0)
    foreground = resampled(product.foreground_HW3, fill=np.rint(mean))
    foreground = np.where((matte == 255)[..., None], rgb, foreground)
    core = core_of(np.minimum(resampled(product.alpha_HW), matte))
    transform = {
        "placement": "center",
        "size": [width, height],
        "source_box": list(box),
        "offset": list(offset),
        "placed_size": list(placed),
        "scale": [placed[0] / (box[2] - box[0]), placed[1] / (box[3] - box[1])],
        "resampling": f"pillow {method.name.lower()}",
        "touches_frame": min(left, top) == 0 or bottom == rows_total or right == columns_total,
    }
    depth = None if product.depth_HW is None else resampled(product.depth_HW)
    return Canvas(rgb, matte, foreground, core, transform, depth)


PLACEMENTS: dict[Placement, Callable[[Product, GenerateSettings], Canvas]] = {
    Placement.original: place_original,
    Placement.center: place_center,
}


@dataclass(frozen=True)
class Frame:
    """The working copy: (height, width) in px, and the box inside it that shows the canvas; the rest is letterbox."""

    height: int
    width: int
    top: int
    left: int
    content_height: int
    content_width: int

    @property
    def content(self) -> tuple[slice, slice]:
        """Index of the canvas inside the working copy."""
        return np.s_[self.top : self.top + self.content_height, self.left : self.left + self.content_width]


def plan_frame(height: int, width: int, resolution: int, unit: int) -> Frame:
    """A working size of about ``resolution`` squared pixels, sides multiples of ``unit``, aspect kept by letterboxing.

    ``unit`` is what VAE and UNet together halve: 32 px for SDXL.
    """
    scale = resolution / (height * width) ** 0.5
    frame_height, frame_width = (max(unit, round(side * scale / unit) * unit) for side in (height, width))
    fit = min(frame_height / height, frame_width / width)
    content_height, content_width = max(1, round(height * fit)), max(1, round(width * fit))
    return Frame(
        frame_height,
        frame_width,
        (frame_height - content_height) // 2,
        (frame_width - content_width) // 2,
        content_height,
        content_width,
    )


@dataclass(frozen=True)
class Working:
    """What the diffusion model is told of the product.

    image_HW3: uint8, product colours everywhere (they continue past the edge, so no old background leaks in).
    keep_HW: bool, max-pooled: true wherever a product pixel falls; for conditioning, so that thin parts do not vanish.
    coverage_HW: float32 in [0, 1], averaged: the product's share of a pixel.
    held_hw: bool, the latent cells that show nothing but product, and are held to it. A cell on the
        product's edge stays free: holding it, even in part (the hold repeats at every step), paints its whole square in
        the product's colour, which the composite then shows as a fringe.
    depth_HW: float32 nearness in [0, 1], in any scale; None where it is not known.
    """

    frame: Frame
    image_HW3: np.ndarray
    keep_HW: np.ndarray
    coverage_HW: np.ndarray
    held_hw: np.ndarray
    depth_HW: np.ndarray | None = None


def make_working(canvas: Canvas, frame: Frame, cell: int) -> Working:
    """Resample the canvas into the working copy. cell: pixels that one latent stands for, along a side."""
    size = (frame.content_width, frame.content_height)
    margins = (
        (frame.top, frame.height - frame.top - frame.content_height),
        (frame.left, frame.width - frame.left - frame.content_width),
    )
    solid = canvas.matte_HW >= 128
    keep = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(solid).float()[None, None], size[::-1])
    coverage = to_unit(np.asarray(Image.fromarray(canvas.matte_HW).resize(size, Image.Resampling.BOX)))
    image = np.asarray(Image.fromarray(canvas.foreground_HW3).resize(size, Image.Resampling.LANCZOS))
    coverage = np.pad(coverage, margins)
    depth = None
    if canvas.depth_HW is not None:
        small = np.asarray(Image.fromarray(canvas.depth_HW).resize(size, Image.Resampling.BILINEAR))
        depth = np.pad(to_unit(small), margins, mode="edge")
    return Working(
        frame,
        np.pad(image, (*margins, (0, 0)), mode="edge"),
        np.pad(keep[0, 0].bool().numpy(), margins),
        coverage,
        held_cells(coverage, cell),
        depth,
    )


def background_at(decoded_HW3: np.ndarray, frame: Frame, height: int, width: int) -> np.ndarray:
    """The generated picture without its letterbox at the canvas's size; float [0, 1] in, uint8 (H, W, 3) out."""
    content = np.ascontiguousarray(decoded_HW3[frame.content], np.float32)
    planes = [
        np.asarray(Image.fromarray(content[..., c]).resize((width, height), Image.Resampling.BICUBIC)) for c in range(3)
    ]
    return to_bytes(np.stack(planes, axis=-1))

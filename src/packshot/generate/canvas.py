"""Where the product stands: the output canvas, and the working copy of it that the diffusion model sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import cv2
import numpy as np
import torch
from PIL import Image

from packshot.config.generate import POSITIONS
from packshot.config.schema import GenerateSettings, Placement
from packshot.errors import ConfigError
from packshot.generate.json_types import Json
from packshot.generate.product import Product, core_of
from packshot.imaging.matte import covered_box, held_cells
from packshot.imaging.pixels import to_unit

# Kernels without negative lobes: a pixel whose resampled alpha is full has then seen nothing but product.
SHRINK = Image.Resampling.HAMMING
GROW = Image.Resampling.BILINEAR
LARGEST_CANVAS = 8192  # px, each side


@dataclass(frozen=True)
class Canvas:
    """The product on the output's pixel grid.

    rgb_HW3: uint8, the photo (placed: zero outside the pasted window). matte_HW: uint8 alpha for compositing.
    foreground_HW3: uint8 product colours, equal to rgb_HW3 where matte_HW is 255, continued outwards elsewhere.
    core_HW: bool, the pixels that must come out unchanged.
    transform: how a pixel of the photo got here, in words and numbers; part of the certificate.
    inputs: what else control maps are drawn from, uint8 (H, W), by name.
    mask_reasons: codes of what speaks against the mask (``imaging.mask_doubt``).
    """

    rgb_HW3: np.ndarray
    matte_HW: np.ndarray
    foreground_HW3: np.ndarray
    core_HW: np.ndarray
    transform: Json
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    mask_reasons: tuple[str, ...] = ()

    @cached_property
    def product_box(self) -> tuple[slice, slice]:
        """Index of the smallest box with all of the product, its soft edge included; empty without a product."""
        return covered_box(self.matte_HW)

    @cached_property
    def outside_HW(self) -> np.ndarray:
        """uint8, 255 where the picture shows no product, not even a soft edge; else 0."""
        reach = cv2.dilate(self.matte_HW, np.ones((3, 3), np.uint8))
        return np.where(reach == 0, np.uint8(255), np.uint8(0))


def place(product: Product, settings: GenerateSettings) -> Canvas:
    """Put the product on the canvas that the settings ask for.

    Raises:
        ConfigError: the product would not fit on it.
    """
    as_it_is = settings.placement is Placement.original
    canvas = place_original(product) if as_it_is else place_on_canvas(product, settings)
    return replace(canvas, mask_reasons=product.mask_reasons)


def place_original(product: Product) -> Canvas:
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
    return Canvas(product.rgb_HW3, product.matte_HW, product.foreground_HW3, core, transform, product.inputs)


@dataclass(frozen=True)
class Layout:
    """Where the product goes. size: of the canvas; source_box: the product in the photo, left, top, right, bottom;
    placed_size: of that box on the canvas; offset: left, top of it there. All in px."""

    size: tuple[int, int]
    source_box: tuple[int, int, int, int]
    placed_size: tuple[int, int]
    offset: tuple[int, int]

    def resample(self, array: np.ndarray, fill: np.ndarray | int = 0) -> np.ndarray:
        """A picture of the photo on the canvas; around the product it is filled."""
        width, height = self.size
        left, top = self.offset
        result = np.full((height, width, *array.shape[2:]), fill, np.uint8)
        picture = np.asarray(Image.fromarray(array).resize(self.placed_size, self.method, box=self.source_box))
        result[top : top + self.placed_size[1], left : left + self.placed_size[0]] = picture
        return result

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the canvas per pixel of the photo, across and down; they differ by rounding alone."""
        left, top, right, bottom = self.source_box
        return self.placed_size[0] / (right - left), self.placed_size[1] / (bottom - top)

    @property
    def method(self) -> Image.Resampling:
        """The one resampling of the photo."""
        return SHRINK if max(self.scale) <= 1 else GROW


def canvas_size(width: int, height: int, settings: GenerateSettings) -> tuple[int, int]:
    """Width and height of the canvas for a product of a width and height in the photo.

    With an aspect ratio it is the smallest canvas of that shape on which the product needs no resampling.

    Raises:
        ConfigError: that canvas would be too large.
    """
    ratio = settings.canvas_ratio()
    if ratio is None:
        return settings.size[0], settings.size[1]
    share = settings.product_scale * (1 - 2 * settings.margin)
    canvas_height = math.ceil(max(height / share, width / share / ratio))
    canvas_width = math.ceil(canvas_height * ratio)
    if max(canvas_width, canvas_height) > LARGEST_CANVAS:
        raise ConfigError(
            f"aspect_ratio={settings.aspect_ratio} makes a canvas of {canvas_width}x{canvas_height} px around this "
            "product.",
            f"Set size instead; each side may have {LARGEST_CANVAS} px.",
        )
    return canvas_width, canvas_height


def plan_layout(box: tuple[int, int, int, int], settings: GenerateSettings) -> Layout:
    """The canvas and the product's place on it. box: the product in the photo.

    The larger relative side of the product takes ``product_scale`` of the canvas within its margins.

    Raises:
        ConfigError: the product would leave the canvas, or the canvas would be too large.
    """
    product_width = box[2] - box[0]
    product_height = box[3] - box[1]
    width, height = canvas_size(product_width, product_height, settings)
    border = round(settings.margin * min(width, height))
    inner = (width - 2 * border, height - 2 * border)
    scale = settings.product_scale * min(inner[0] / product_width, inner[1] / product_height)
    if settings.aspect_ratio is not None:
        scale = 1.0
    placed = (max(1, round(product_width * scale)), max(1, round(product_height * scale)))
    if settings.placement is Placement.coordinates:
        left = round(settings.position[0] * width - placed[0] / 2)
        top = round(settings.position[1] * height - placed[1] / 2)
    else:
        left_share, top_share = POSITIONS[settings.placement.name]
        left = border + int((inner[0] - placed[0]) * left_share)
        top = border + int((inner[1] - placed[1]) * top_share)
    if min(left, top) < 0 or left + placed[0] > width or top + placed[1] > height:
        raise ConfigError(
            f"position={settings.position} puts a product of {placed[0]}x{placed[1]} px partly outside the canvas of "
            f"{width}x{height} px.",
            "Choose a position further inside, or a smaller product_scale.",
        )
    return Layout((width, height), box, placed, (left, top))


def place_on_canvas(product: Product, settings: GenerateSettings) -> Canvas:
    """The product at its place on a canvas of its own: resampled once, never stretched, never cut."""
    return lay_out(product, layout_of(product, settings), settings.placement.name)


def layout_of(product: Product, settings: GenerateSettings) -> Layout:
    """:func:`plan_layout` of a product. Raises ConfigError as it does."""
    rows, columns = covered_box(product.matte_HW)
    return plan_layout((columns.start, rows.start, columns.stop, rows.stop), settings)


def check_place(product: Product, settings: GenerateSettings) -> None:
    """Raises ConfigError where the product would not fit on its canvas; nothing is resampled to find out."""
    if settings.placement is not Placement.original:
        layout_of(product, settings)


def place_again(product: Product, transform: Json) -> Canvas:
    """The canvas whose transform a certificate states. Raises ValueError: no picture can have been made so."""
    if transform["placement"] == "original":
        return place_original(product)
    refuse_impossible(product, transform)
    left, top, right, bottom = transform["source_box"]
    layout = Layout(
        size=(transform["size"][0], transform["size"][1]),
        source_box=(left, top, right, bottom),
        placed_size=(transform["placed_size"][0], transform["placed_size"][1]),
        offset=(transform["offset"][0], transform["offset"][1]),
    )
    return lay_out(product, layout, transform["placement"])


def refuse_impossible(product: Product, transform: Json) -> None:
    """Raises ValueError for a transform with a box outside of the photograph, or a product outside of its canvas."""
    height, width = product.alpha_HW.shape
    left, top, right, bottom = transform["source_box"]
    inside = 0 <= left < right <= width and 0 <= top < bottom <= height
    placed_size = transform["placed_size"] or (0, 0)
    for size, placed, start in zip(transform["size"], placed_size, transform["offset"], strict=True):
        inside = inside and 0 <= start < start + placed <= size
    if not inside or max(transform["size"]) > LARGEST_CANVAS:
        raise ValueError("the certificate's transform cannot be that of a picture")


def lay_out(product: Product, layout: Layout, placement: str) -> Canvas:
    """The product on a planned canvas.

    The transform describes how to do it again in Pillow: ``photo.resize(placed_size, resampling, box=source_box)``,
    pasted at ``offset``.
    """
    rows_total, columns_total = product.alpha_HW.shape
    box = layout.source_box
    rgb = layout.resample(product.rgb_HW3)
    matte = layout.resample(product.matte_HW)
    mean = product.rgb_HW3[product.alpha_HW >= 128].mean(axis=0)
    foreground = layout.resample(product.foreground_HW3, fill=np.rint(mean))
    foreground = np.where((matte == 255)[..., None], rgb, foreground)
    core = core_of(np.minimum(layout.resample(product.alpha_HW), matte))
    transform = {
        "placement": placement,
        "size": list(layout.size),
        "source_box": list(box),
        "offset": list(layout.offset),
        "placed_size": list(layout.placed_size),
        "scale": list(layout.scale),
        "resampling": f"pillow {layout.method.name.lower()}",
        "touches_frame": min(box[:2]) == 0 or box[3] == rows_total or box[2] == columns_total,
    }
    inputs = {name: layout.resample(picture) for name, picture in product.inputs.items()}
    return Canvas(rgb, matte, foreground, core, transform, inputs)


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
    frame_height = max(unit, round(height * scale / unit) * unit)
    frame_width = max(unit, round(width * scale / unit) * unit)
    fit = min(frame_height / height, frame_width / width)
    content_height = max(1, round(height * fit))
    content_width = max(1, round(width * fit))
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
    """What the diffusion model is given of the product.

    image_HW3: uint8, product colours everywhere (they continue past the edge, so no old background leaks in).
    keep_HW: bool, max-pooled: true wherever a product pixel falls; for conditioning, so that thin parts do not vanish.
    coverage_HW: float32 in [0, 1], averaged: the product's share of a pixel.
    held_hw: bool, the latent cells that show nothing but product, and are held to it. A cell on the
        product's edge stays free: holding it, even in part (the hold repeats at every step), paints its whole square in
        the product's colour, which the composite then shows as a fringe.
    inputs: what else control maps are drawn from, float32 (H, W) in [0, 1], by name.
    """

    frame: Frame
    image_HW3: np.ndarray
    keep_HW: np.ndarray
    coverage_HW: np.ndarray
    held_hw: np.ndarray
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


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
    inputs = {}
    for name, picture in canvas.inputs.items():
        small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        inputs[name] = np.pad(to_unit(small), margins, mode="edge")
    return Working(
        frame,
        np.pad(image, (*margins, (0, 0)), mode="edge"),
        np.pad(keep[0, 0].bool().numpy(), margins),
        coverage,
        held_cells(coverage, cell),
        inputs,
    )


def background_at(decoded_HW3: np.ndarray, frame: Frame, height: int, width: int) -> np.ndarray:
    """The generated picture without its letterbox at the canvas's size; float [0, 1] in, uint8 (H, W, 3) out."""
    content = np.ascontiguousarray(decoded_HW3[frame.content], np.float32)
    planes = []
    for channel in range(3):
        plane = Image.fromarray(content[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
        scaled = np.asarray(plane) * np.float32(255)
        # OpenCV rounds and clips in one go: on 12 megapixels numpy takes two seconds for it
        planes.append(cv2.addWeighted(scaled, 1.0, scaled, 0.0, 0.0, dtype=cv2.CV_8U))
    return cv2.merge(planes)

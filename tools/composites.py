"""Product photographs that are composed: a cut-out before a ground, with what light and a camera add to it.

The truth of such a picture is known to the pixel. ``tools/fit_mask_judge.py`` trains on them, from other cut-outs than
``benchmarks/photographs.py`` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

Rng = np.random.Generator
Shape = tuple[int, int]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Cutout:
    """A product alone. name: of its file. rgb_HW3: uint8. alpha_HW: float32 in [0, 1]. Cropped to the product."""

    name: str
    rgb_HW3: np.ndarray
    alpha_HW: np.ndarray


@dataclass(frozen=True)
class Photograph:
    """A composed picture and its truth. rgb_HW3: uint8. alpha_HW: float32, the product. ground: key of ``GROUNDS``."""

    rgb_HW3: np.ndarray
    alpha_HW: np.ndarray
    ground: str


def crop(name: str, rgba_HW4: np.ndarray) -> Cutout:
    """A cut-out without its empty rim. rgba: uint8."""
    left, top, width, height = cv2.boundingRect((rgba_HW4[..., 3] > 8).astype(np.uint8))
    part_HW4 = rgba_HW4[top : top + height, left : left + width]
    return Cutout(name, part_HW4[..., :3], part_HW4[..., 3].astype(np.float32) / 255)


def read_cutout(file: Path) -> Cutout:
    with Image.open(file) as image:
        return crop(file.stem, np.asarray(image.convert("RGBA")))


# ---- drawn packages ----


def rounded(
    layers: Sequence[np.ndarray], box: tuple[int, int, int, int], radius: int, values: Sequence[Colour | float]
) -> None:
    """A rectangle with round corners, in each layer in its value. box: left, top, right, bottom."""
    left, top, right, bottom = box
    radius = min(radius, (right - left) // 2, (bottom - top) // 2)
    for layer, value in zip(layers, values, strict=True):
        cv2.rectangle(layer, (left + radius, top), (right - radius, bottom), value, -1)
        cv2.rectangle(layer, (left, top + radius), (right, bottom - radius), value, -1)
        for x in (left + radius, right - radius):
            for y in (top + radius, bottom - radius):
                cv2.circle(layer, (x, y), radius, value, -1, cv2.LINE_AA)


def some_colour(rng: Rng, low: float = 8, high: float = 250) -> Colour:
    red, green, blue = rng.uniform(low, high, 3)
    vivid = rng.choice([0.04, 0.3, 1.0])
    middle = (red + green + blue) / 3
    red, green, blue = (middle + vivid * (value - middle) for value in (red, green, blue))
    return float(red), float(green), float(blue)


def shaded_round(rgb_HW3: np.ndarray, rng: Rng) -> None:
    """Light from one side on a cylinder, and a highlight."""
    width = rgb_HW3.shape[1]
    across = np.linspace(-1, 1, width)
    light = rng.uniform(0.5, 0.75) + rng.uniform(0.3, 0.5) * np.cos(1.3 * (across - rng.uniform(-0.6, 0.6)))
    rgb_HW3 *= light[None, :, None]
    middle, breadth = rng.uniform(-0.8, 0.8), rng.uniform(0.03, 0.15)
    rgb_HW3 += (rng.uniform(0, 70) * np.exp(-(((across - middle) / breadth) ** 2)))[None, :, None]


def drawn_package(rng: Rng, colour: Colour | None = None) -> Cutout:
    """A bottle, jar, can, tube or box with a cap and a label."""
    slim, capped, round_body = [
        (0.4, 0.5, True),
        (0.95, 0.95, True),
        (0.55, 0, True),
        (0.3, 0.9, True),
        (0.8, 0, False),
    ][int(rng.integers(5))]
    height = 900
    width = int(height * slim * rng.uniform(0.75, 1.3))
    rgb_HW3 = np.zeros((height, width, 3), np.float32)
    alpha_HW = np.zeros((height, width), np.float32)
    layers = (rgb_HW3, alpha_HW)
    body = colour or some_colour(rng)
    top = 0
    if capped:
        half = int(width * capped * rng.uniform(0.6, 1)) // 2
        cap_height = int(height * rng.uniform(0.08, 0.22))
        cap = body if rng.random() < 0.2 else some_colour(rng)
        rounded(layers, (width // 2 - half, 0, width // 2 + half, cap_height), int(rng.integers(2, 20)), (cap, 1.0))
        top = cap_height - 4
        if rng.random() < 0.4:  # a neck and shoulders
            shoulder = top + int(height * rng.uniform(0.03, 0.2))
            neck = int(half * rng.uniform(0.6, 1))
            corners = [(width // 2 - neck, top), (width // 2 + neck, top), (width - 1, shoulder), (0, shoulder)]
            for layer, value in zip(layers, (body, 1.0), strict=True):
                cv2.fillPoly(layer, [np.array(corners)], value, cv2.LINE_AA)
            top = shoulder - 2
    rounded(layers, (0, top, width - 1, height - 1), int(width * rng.uniform(0.01, 0.25)), (body, 1.0))
    if rng.random() < 0.8:
        label = some_colour(rng, 90, 255)
        inset = 0 if rng.random() < 0.5 else int(width * rng.uniform(0.05, 0.2))
        first = top + int((height - top) * rng.uniform(0.1, 0.4))
        last = first + int((height - first) * rng.uniform(0.3, 0.8))
        cv2.rectangle(rgb_HW3, (inset, first), (width - 1 - inset, last), label, -1)
        for _ in range(int(rng.integers(0, 6))):
            x, y = int(width * rng.uniform(0.15, 0.5)), int(rng.uniform(first, last))
            corner = (x + int(width * rng.uniform(0.1, 0.35)), min(last, y + int(rng.uniform(4, 50))))
            cv2.rectangle(rgb_HW3, (x, y), corner, some_colour(rng), -1)
    if round_body and rng.random() < 0.8:
        shaded_round(rgb_HW3, rng)
    return Cutout("drawn", np.clip(rgb_HW3, 0, 255).astype(np.uint8), alpha_HW)


def drawn_tool(rng: Rng) -> Cutout:
    """Something thin, such as a pen, pliers or a trumpet: bars, bent tubes and rings, lit along their middle."""
    side = 700
    canvas_HW4 = np.zeros((side, side, 4), np.float32)
    colours = [some_colour(rng) for _ in range(3)]
    middle = rng.uniform(0.3, 0.7, 2) * side
    main = rng.uniform(0, np.pi)
    for _ in range(int(rng.integers(1, 6))):
        thickness = int(rng.uniform(10, 80))
        turn = main + rng.normal(0, 0.25)
        half = rng.uniform(0.15, 0.42) * side * np.array([np.cos(turn), np.sin(turn)])
        points_N2 = np.stack([middle - half, middle + rng.normal(0, 0.03 * side, 2), middle + half])
        line = [np.clip(points_N2, 60, side - 60).astype(np.int32)]
        radius = int(rng.uniform(1.2, 2.5) * thickness)
        ring = bool(rng.random() < 0.35)
        end = tuple(int(value) for value in line[0][-1])
        colour = np.array(colours[int(rng.integers(3))])
        for share, light in ((1.0, 0.7), (0.6, 1.0), (0.2, 1.25)):
            value = (*np.clip(colour * light, 0, 255).tolist(), 1.0)
            width = max(1, int(thickness * share))
            cv2.polylines(canvas_HW4, line, False, value, width, cv2.LINE_AA)
            if ring:
                cv2.circle(canvas_HW4, end, radius, value, max(1, width // 2), cv2.LINE_AA)
    return crop("tool", np.dstack([canvas_HW4[..., :3], canvas_HW4[..., 3:] * 255]).astype(np.uint8))


# ---- products in other colours ----


def in_colour(cutout: Cutout, colour: Colour | np.ndarray, share: float) -> Cutout:
    """The product with its mean colour moved towards another one."""
    weight_HW1 = cutout.alpha_HW[..., None]
    mean = (cutout.rgb_HW3 * weight_HW1).sum(axis=(0, 1)) / weight_HW1.sum()
    moved_HW3 = np.clip(cutout.rgb_HW3 + share * (np.array(colour) - mean), 0, 255)
    return Cutout(cutout.name, moved_HW3.astype(np.uint8), cutout.alpha_HW)


def of_material(cutout: Cutout, rng: Rng) -> Cutout:
    """The product with a pattern or a rough surface, as cloth, paper and stone have it."""
    shape = cutout.alpha_HW.shape
    strength = rng.uniform(0.05, 0.35)
    if rng.random() < 0.5:
        light_HW1 = 1 + strength * clouds(rng, shape, int(rng.integers(4, 40)), rng.uniform(0.6, 1))[..., None]
        rgb_HW3 = cutout.rgb_HW3 * light_HW1
    else:
        rgb_HW3 = cutout.rgb_HW3 * (1 - strength) + texture(rng, shape) * strength
    return Cutout(cutout.name, np.clip(rgb_HW3, 0, 255).astype(np.uint8), cutout.alpha_HW)


# ---- grounds: float32 (H, W, 3) in steps of 255 ----


def clouds(rng: Rng, shape: Shape, grain: int = 4, roughness: float = 0.6) -> np.ndarray:
    """Noise of several sizes, about -1 to 1, float32 (H, W)."""
    total_HW = np.zeros(shape, np.float32)
    weight, size = 1.0, grain
    while size < max(shape):
        noise = rng.standard_normal((size, size)).astype(np.float32)
        total_HW += weight * cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)
        weight, size = weight * roughness, size * 2
    return total_HW / (np.abs(total_HW).max() + 1e-6)


def plain(rng: Rng, shape: Shape, colour: Colour | np.ndarray) -> np.ndarray:
    """One colour that changes softly across the picture."""
    y_H1, x_1W = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])[None]
    light_HW = 1 + rng.normal(0, 0.05) * y_H1 + rng.normal(0, 0.04) * x_1W - rng.uniform(0, 0.08) * (y_H1**2 + x_1W**2)
    return (np.array(colour) * light_HW[..., None]).astype(np.float32)


def white(rng: Rng, shape: Shape) -> np.ndarray:
    if rng.random() < 0.5:
        return np.full((*shape, 3), 255, np.float32)
    return plain(rng, shape, rng.uniform(236, 252) + rng.uniform(-4, 4, 3))


def grey(rng: Rng, shape: Shape) -> np.ndarray:
    return plain(rng, shape, np.full(3, rng.uniform(60, 225)))


def black(rng: Rng, shape: Shape) -> np.ndarray:
    return plain(rng, shape, np.full(3, rng.uniform(2, 40)))


def sweep(rng: Rng, shape: Shape) -> np.ndarray:
    """Coloured paper that bends from the table up to the wall."""
    ground = plain(rng, shape, some_colour(rng, 60))
    y_H11 = np.linspace(0, 1, shape[0])[:, None, None]
    bend = 1 / (1 + np.exp(-(y_H11 - rng.uniform(0.5, 0.85)) / rng.uniform(0.01, 0.12)))
    return ground * (1 + rng.normal(0, 0.15) * bend).astype(np.float32)


def wood(rng: Rng, shape: Shape) -> np.ndarray:
    tone = np.array([[150, 105, 65], [196, 160, 120], [90, 60, 40], [220, 200, 170], [120, 110, 100]][rng.integers(5)])
    across = int(rng.integers(3, 12)), int(rng.integers(60, 240))
    grain = cv2.resize(rng.standard_normal(across[::-1]).astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)
    grain += 0.3 * clouds(rng, shape, 16)
    if rng.random() < 0.4:  # planks
        rows = np.floor(np.linspace(0, rng.uniform(3, 8), shape[0])).astype(int)
        grain += rng.normal(0, 0.8, 10)[rows][:, None]
        grain[np.diff(rows, prepend=0) > 0] -= 3
    turned = grain.T if rng.random() < 0.3 and shape[0] == shape[1] else grain
    return np.clip(tone * (1 + rng.uniform(0.04, 0.12) * turned[..., None]), 0, 255).astype(np.float32)


def texture(rng: Rng, shape: Shape) -> np.ndarray:
    """Stone, cloth or tiles of two colours."""
    first = np.array(some_colour(rng))
    second = np.clip(first + rng.normal(0, 50, 3), 0, 255)
    kind = rng.random()
    y_H1, x_1W = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    if kind < 0.5:
        share_HW = 0.5 + 0.5 * clouds(rng, shape, int(rng.integers(3, 24)), rng.uniform(0.5, 0.95))
    elif kind < 0.75:
        turn, step = rng.uniform(0, np.pi), rng.uniform(4, 80)
        share_HW = 0.5 + 0.5 * np.sin((np.cos(turn) * x_1W + np.sin(turn) * y_H1) / step)
    else:
        step = rng.uniform(20, 120)
        share_HW = np.maximum(x_1W % step < 0.06 * step, y_H1 % step < 0.06 * step).astype(np.float32)
    share_HW = share_HW + 0.1 * clouds(rng, shape, 64)
    return np.clip(first + (second - first) * share_HW[..., None], 0, 255).astype(np.float32)


def clutter(rng: Rng, shape: Shape) -> np.ndarray:
    """Many things of all colours and sizes, sharp or out of focus."""
    ground = plain(rng, shape, some_colour(rng))
    for _ in range(int(rng.integers(8, 60))):
        middle = int(rng.uniform(0, shape[1])), int(rng.uniform(0, shape[0]))
        axes = tuple(int(x) for x in np.exp(rng.uniform(1.5, np.log(0.4 * max(shape)), 2)))
        colour = np.clip(
            ground[rng.integers(shape[0]), rng.integers(shape[1])] * rng.uniform(0.4, 1.7), 0, 255
        ).tolist()
        colour = some_colour(rng) if rng.random() < 0.4 else colour
        if rng.random() < 0.5:
            cv2.ellipse(ground, middle, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
        else:
            corners = cv2.boxPoints((middle, axes, float(rng.uniform(0, 180))))
            cv2.fillPoly(ground, [corners.astype(np.int32)], colour, cv2.LINE_AA)
    ground *= 1 + rng.uniform(0, 0.15) * clouds(rng, shape, 8, 0.8)[..., None]
    soft = float(rng.choice([0, 0, 2, 8]))
    return cv2.GaussianBlur(ground, (0, 0), soft) if soft else ground


def wall(rng: Rng, shape: Shape) -> np.ndarray:
    """A wall above a table: two colours, or a wooden or patterned table, with a sharp or a soft edge."""
    tone = some_colour(rng, 60)
    upper = plain(rng, shape, tone)
    kind = rng.random()
    if kind < 0.45:
        lower = wood(rng, shape)
    elif kind < 0.6:
        lower = texture(rng, shape)
    else:
        lower = plain(rng, shape, np.array(tone) * rng.uniform(0.5, 1.2) if rng.random() < 0.4 else some_colour(rng))
    line = shape[0] * rng.uniform(0.5, 0.85)
    below = np.clip((np.arange(shape[0]) - line) / rng.choice([1, 1, 3, 12]) + 0.5, 0, 1)[:, None, None]
    return (upper * (1 - below) + lower * below).astype(np.float32)


GROUNDS: dict[str, Callable[[Rng, Shape], np.ndarray]] = {
    "white": white,
    "grey": grey,
    "black": black,
    "sweep": sweep,
    "wall": wall,
    "wood": wood,
    "texture": texture,
    "clutter": clutter,
}


# ---- pictures ----


@dataclass(frozen=True)
class Setting:
    """What light and a camera do.

    shadow, mirror, vignette: strength, 0 is none; of the mirror image at the foot. noise: in steps of 255. quality: of
    the JPEG, 0 is none. grey: whether it is a black-and-white photograph.
    """

    shadow: float
    mirror: float
    vignette: float
    noise: float
    quality: int
    grey: bool


def some_setting(rng: Rng) -> Setting:
    return Setting(
        shadow=float(rng.uniform(0.1, 0.6)) if rng.random() < 0.85 else 0.0,
        mirror=float(rng.uniform(0.15, 0.5)) if rng.random() < 0.25 else 0.0,
        vignette=float(rng.uniform(0.05, 0.2)) if rng.random() < 0.3 else 0.0,
        noise=float(rng.choice([0, 1, 2, 4])),
        quality=int(rng.choice([0, 95, 90, 80])),
        grey=bool(rng.random() < 0.06),
    )


def placed(cutout: Cutout, shape: Shape, rng: Rng, fill: float) -> tuple[np.ndarray, np.ndarray, int]:
    """The product on a canvas: float32 colours (H, W, 3) and alpha (H, W), and the row of its foot."""
    rows, columns = shape
    scale = min(fill * rows / cutout.alpha_HW.shape[0], min(0.97, fill + 0.15) * columns / cutout.alpha_HW.shape[1])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    solid_HW4 = np.dstack([cutout.rgb_HW3 * cutout.alpha_HW[..., None], cutout.alpha_HW])
    part_HW4 = cv2.resize(solid_HW4, None, fx=scale, fy=scale, interpolation=way)
    height, width = part_HW4.shape[:2]
    top = int(np.clip((rows - height) * rng.uniform(0.45, 0.75), 0, rows - height))
    left = int(np.clip((columns - width) * rng.uniform(0.35, 0.65), 0, columns - width))
    canvas_HW4 = np.zeros((rows, columns, 4), np.float32)
    canvas_HW4[top : top + height, left : left + width] = part_HW4
    alpha_HW = np.clip(canvas_HW4[..., 3], 0, 1)
    return canvas_HW4[..., :3] / np.maximum(alpha_HW, 1e-3)[..., None], alpha_HW, top + height


def shadow_below(alpha_HW: np.ndarray, foot: int, rng: Rng) -> np.ndarray:
    """How much light the product takes from the ground, in [0, 1]: its outline laid flat, and a line at its foot."""
    height = max(8, int((alpha_HW.max(axis=1) > 0.3).sum()))
    flat = rng.uniform(0.08, 0.35)
    lean = rng.normal(0, 0.5)
    matrix = np.array([[1, -lean, lean * foot], [0, flat, (1 - flat) * foot + 0.05 * height]], np.float32)
    fallen_HW = cv2.warpAffine(alpha_HW, matrix, alpha_HW.shape[::-1])
    fallen_HW = cv2.GaussianBlur(fallen_HW, (0, 0), max(1.5, height * rng.uniform(0.005, 0.06)))
    stands_W = alpha_HW[max(0, foot - max(3, height // 30)) : foot].max(axis=0) > 0.3
    touch_HW = np.zeros_like(alpha_HW)
    touch_HW[max(0, foot - height // 50) : foot + max(2, height // 50)] = stands_W
    touch_HW = cv2.GaussianBlur(touch_HW, (0, 0), max(1.0, height * 0.008))
    return np.clip(fallen_HW + 0.7 * touch_HW, 0, 1)


def mirror_image(
    rgb_HW3: np.ndarray, alpha_HW: np.ndarray, foot: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """The product's mirror image below its foot, which fades: colours, and share of the ground that it takes."""
    matrix = np.array([[1, 0, 0], [0, -1, 2 * foot - 1]], np.float32)
    size = alpha_HW.shape[::-1]
    fade = strength * np.clip(1 - (np.arange(len(alpha_HW)) - foot) / max(1, len(alpha_HW) - foot), 0, 1)
    return cv2.warpAffine(rgb_HW3, matrix, size), cv2.warpAffine(alpha_HW, matrix, size) * fade[:, None].astype(
        np.float32
    )


def photographed(rgb_HW3: np.ndarray, setting: Setting, rng: Rng) -> np.ndarray:
    """What the camera and its file add: uint8 (H, W, 3)."""
    rows, columns = rgb_HW3.shape[:2]
    y_H1, x_1W = np.linspace(-0.5, 0.5, rows)[:, None], np.linspace(-0.5, 0.5, columns)[None]
    shown = rgb_HW3 * (1 - 2 * setting.vignette * (y_H1**2 + x_1W**2))[..., None]
    shown = np.clip(shown + setting.noise * rng.standard_normal(shown.shape, np.float32), 0, 255).astype(np.uint8)
    if setting.grey:
        shown = cv2.cvtColor(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if setting.quality:
        _, data = cv2.imencode(".jpg", shown[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, setting.quality])
        shown = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[..., ::-1]
    return np.ascontiguousarray(shown)


def compose(cutout: Cutout, ground_HW3: np.ndarray, name: str, setting: Setting, rng: Rng, fill: float) -> Photograph:
    """A photograph of a product before a ground, which it darkens and which mirrors it. fill: its height, of 1."""
    shape = ground_HW3.shape[:2]
    rgb_HW3, alpha_HW, foot = placed(cutout, (shape[0], shape[1]), rng, fill)
    behind_HW3 = ground_HW3
    if setting.mirror:
        image_HW3, share_HW = mirror_image(rgb_HW3, alpha_HW, foot, setting.mirror)
        behind_HW3 = behind_HW3 + (image_HW3 - behind_HW3) * share_HW[..., None]
    if setting.shadow:
        behind_HW3 = behind_HW3 * (1 - setting.shadow * shadow_below(alpha_HW, foot, rng))[..., None]
    mixed_HW3 = behind_HW3 + (rgb_HW3 - behind_HW3) * alpha_HW[..., None]
    return Photograph(photographed(mixed_HW3, setting, rng), alpha_HW, name)

"""Training samples of the segmentation network: products in rendered scenes, in studios, and before other scenes.

Every sample is a picture with the product's share of every pixel. The kinds of pictures and their shares stand in
``KINDS``. What a product looks like comes from the cut-outs of rendered sets, from a folder of further cut-outs, and
from wires that are drawn here, because sets of packages have few thin and open shapes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from packshot.errors import ConfigError
from tools.mini.data import Render

SIDE = 256  # px, of a sample
Sample = tuple[np.ndarray, np.ndarray]  # uint8 (SIDE, SIDE, 3), float32 alpha (SIDE, SIDE)
WIRE_SHARE = 0.06  # of the products that are placed on another ground
EXTRA_SHARE = 0.4  # of the products, where a folder of further cut-outs is given
SECOND_PRODUCT = 0.08  # of the samples show two products, both of which count


@dataclass(frozen=True)
class Material:
    """What samples are made of. cutouts: uint8 (height, width, 4) pictures of further products."""

    scenes: list[Render]
    cutouts: list[np.ndarray]


@dataclass(frozen=True)
class Placed:
    """A product on the canvas: uint8 colours (SIDE, SIDE, 3), float32 alpha (SIDE, SIDE), how much light passes."""

    color: np.ndarray
    alpha: np.ndarray
    clearness: float = 0.0


def read_cutouts(folder: Path | None) -> list[np.ndarray]:
    """Every picture of a folder, as RGBA; none without a folder.

    Raises:
        ConfigError: the folder is missing, or a picture has no transparent pixels.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise ConfigError(f"--cutouts {folder}: there is no such folder.", "Name a folder of pictures with alpha.")
    found = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"))
        if pixels[..., 3].min() == 255 or pixels[..., 3].max() < 128:
            raise ConfigError(f"--cutouts {path}: alpha shows no outline.", "Remove the file from the folder.")
        found.append(pixels)
    return found


# ---- geometry ----


def place(alpha_HW: np.ndarray, rng: random.Random) -> np.ndarray:
    """A random affine map (2, 3) after which the product is still inside: crop, stretch, small turn, mirror."""
    rows, columns = np.nonzero(alpha_HW > 0.5)
    # pixel i lies between i - 1/2 and i + 1/2
    low = np.array([columns.min() - 0.5, rows.min() - 0.5])
    high = np.array([columns.max() + 0.5, rows.max() + 0.5])
    own = SIDE / max(alpha_HW.shape)  # the scale at which the picture as it is fills the canvas
    most = 0.97 * SIDE / (own * (high - low).max())
    scale = own * float(np.exp(rng.uniform(np.log(0.6), np.log(max(0.65, min(most, 2.4))))))
    stretch = float(np.exp(rng.uniform(-0.25, 0.25)))
    turn = np.deg2rad(rng.gauss(0, 4))
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ np.diag((scale * stretch, scale / stretch))
    if rng.random() < 0.5:
        matrix[:, 0] *= -1
    reach = np.abs(matrix) @ (high - low) / 2  # half of the turned and stretched box
    shrink = min(1.0, 0.5 * SIDE / reach.max())
    matrix *= shrink
    reach *= shrink
    free = SIDE / 2 - reach
    target = (SIDE - 1) / 2 + free * np.array([rng.uniform(-1, 1), rng.uniform(-1, 1)])
    return np.column_stack([matrix, target - matrix @ (low + high) / 2]).astype(np.float32)


def warp(array: np.ndarray, matrix_23: np.ndarray, border: int = cv2.BORDER_CONSTANT) -> np.ndarray:
    """The array under an affine map, at the canvas' size."""
    return cv2.warpAffine(array, matrix_23, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=border)


def mix(front_HW3: np.ndarray, back_HW3: np.ndarray, share_HW: np.ndarray) -> np.ndarray:
    """``front`` over ``back`` by ``share``, uint8."""
    share = share_HW[..., None]
    return np.rint(front_HW3 * share + back_HW3 * (1 - share)).clip(0, 255).astype(np.uint8)


# ---- products ----


def wire(rng: random.Random) -> np.ndarray:
    """A thin, open shape: a closed or open curve of a shaded wire, sometimes doubled or with beads. RGBA."""
    count = rng.randint(3, 7)
    angles = np.linspace(0, 2 * np.pi, 160)
    x = np.zeros(160)
    y = np.zeros(160)
    for k in range(1, count):
        x += rng.gauss(0, 1) / k * np.cos(k * angles + rng.uniform(0, 6.28))
        y += rng.gauss(0, 1) / k * np.sin(k * angles + rng.uniform(0, 6.28))
    points = np.stack([x, y], 1)
    points = (points - points.min(0)) / np.ptp(points, axis=0).max().clip(1e-3)
    points = (points * 190 + 33).astype(np.int32)[: rng.choice((160, 160, 120))]
    canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
    tone = np.array([rng.uniform(20, 235) for _ in range(3)])
    width = rng.randint(2, 9)
    for thickness, shade in ((width, 0.6), (max(1, width // 2), 1.0), (max(1, width // 4), 1.25)):
        color = (*(tone * shade).clip(0, 255), 255.0)
        cv2.polylines(canvas, [points.reshape(-1, 1, 2)], len(points) == 160, color, thickness, cv2.LINE_AA)
        if rng.random() < 0.5:
            for point in points[:: rng.randint(6, 16)].tolist():
                cv2.circle(canvas, point, thickness, color, -1, cv2.LINE_AA)
    return canvas


def _recolored(color_HW3: np.ndarray, rng: random.Random) -> np.ndarray:
    """The product in other colours: channels changed about, paler (white on white happens), darker."""
    form = rng.random()
    if form < 0.2:
        return np.ascontiguousarray(np.roll(color_HW3, rng.randint(1, 2), axis=-1))
    if form < 0.35:
        pale = rng.uniform(0.5, 0.9)
        grey = color_HW3.mean(-1, keepdims=True)
        return (255 * pale + (1 - pale) * (0.5 * grey + 0.5 * color_HW3)).astype(np.uint8)
    if form < 0.45:
        return (color_HW3 * rng.uniform(0.1, 0.5)).astype(np.uint8)
    return color_HW3


def _choose(material: Material, rng: random.Random) -> tuple[np.ndarray, float]:
    """A cut-out, uint8 RGBA, and how clear it is."""
    if rng.random() < WIRE_SHARE:
        return wire(rng), 0.0
    if material.cutouts and (not material.scenes or rng.random() < EXTRA_SHARE):
        return rng.choice(material.cutouts), 0.0
    scene = rng.choice(material.scenes)
    glass = scene.product.get("finish") in ("glass", "frosted")
    return scene.cutout, rng.uniform(0.2, 0.7) if glass and rng.random() < 0.6 else 0.0


def placed_product(material: Material, rng: random.Random) -> Placed:
    """A product somewhere on the canvas."""
    cutout, clearness = _choose(material, rng)
    matrix = place(cutout[..., 3] / 255, rng)
    # colours are spread under the soft edge before they are moved, or black would leak into it
    inside = cutout[..., 3:].astype(np.float32) / 255
    premultiplied = warp(cutout[..., :3] * inside, matrix)
    alpha = warp(inside[..., 0], matrix)
    color = (premultiplied / np.maximum(alpha, 1e-3)[..., None]).clip(0, 255).astype(np.uint8)
    return Placed(_recolored(color, rng), alpha, clearness)


# ---- grounds ----


def studio(rng: random.Random) -> np.ndarray:
    """A plain ground, white, grey or coloured, with a gradient, a vignette, and a horizon or the bend of a sweep."""
    light = rng.choice((1.0, rng.uniform(0.85, 1), rng.uniform(0.3, 0.85), rng.uniform(0, 1)))
    tint = np.array([rng.gauss(0, 0.03 if rng.random() < 0.65 else 0.25) for _ in range(3)])
    ground = np.full((SIDE, SIDE, 3), light, np.float32) + tint.astype(np.float32)
    slope = np.linspace(-1, 1, SIDE, dtype=np.float32)[:, None, None] * rng.gauss(0, 0.1)
    if rng.random() < 0.5:
        ground += slope if rng.random() < 0.6 else slope.transpose(1, 0, 2)
    form = rng.random()
    horizon = int(SIDE * rng.uniform(0.35, 0.9))
    if form < 0.3:  # an edge between floor and wall
        ground[horizon:] += rng.gauss(0, 0.12)
    elif form < 0.6:  # a sweep: the same, drawn softly
        rise = np.clip((np.arange(SIDE) - horizon) / rng.uniform(10, 90), -1, 1).astype(np.float32)
        ground += rise[:, None, None] * rng.gauss(0, 0.1)
    if rng.random() < 0.3:
        axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
        ground *= 1 - rng.uniform(0, 0.35) * (axis[:, None, None] ** 2 + axis[None, :, None] ** 2) / 2
    return np.clip(255 * ground, 0, 255).astype(np.uint8)


def pattern(rng: random.Random) -> np.ndarray:
    """A textured ground: stripes, tiles or clouds of two or three colours, so that no ground is known by heart."""
    low = rng.choice((2, 4, 8, 16, 32))
    noise = np.random.default_rng(rng.getrandbits(32)).random((low, rng.choice((2, low))), np.float32)
    share = cv2.resize(noise, (SIDE, SIDE), interpolation=rng.choice((cv2.INTER_NEAREST, cv2.INTER_CUBIC)))
    if rng.random() < 0.4:
        share = (share > 0.5).astype(np.float32)
    first = np.array([rng.uniform(0, 255) for _ in range(3)])
    second = first + np.array([rng.gauss(0, 60) for _ in range(3)])
    return mix(np.broadcast_to(first, (SIDE, SIDE, 3)), np.broadcast_to(second, (SIDE, SIDE, 3)), share.clip(0, 1))


def other_scene(material: Material, rng: random.Random) -> np.ndarray:
    """Another scene without its product, through a window."""
    scene = rng.choice(material.scenes)
    return warp(scene.plate, place(scene.alpha, rng), cv2.BORDER_REFLECT_101)


def shadowed(ground: np.ndarray, alpha_HW: np.ndarray, rng: random.Random) -> np.ndarray:
    """The ground with a soft shadow of the product: its outline, flattened towards its foot, moved and blurred."""
    bottom = int(np.nonzero(alpha_HW.max(1) > 0.3)[0].max())
    flat = rng.uniform(0.03, 0.6)
    matrix = np.array([[1, rng.gauss(0, 0.5), 0], [0, flat, (1 - flat) * bottom]], np.float32)
    matrix[0, 2] = -matrix[0, 1] * bottom
    shadow = cv2.GaussianBlur(warp(alpha_HW, matrix), (0, 0), rng.uniform(1, 12))
    return (ground * (1 - rng.uniform(0.1, 0.75) * shadow[..., None])).astype(np.uint8)


def mirrored_below(ground: np.ndarray, product: Placed, rng: random.Random) -> np.ndarray:
    """The ground with the product's mirror image below its foot, fading out, as on gloss."""
    bottom = int(np.nonzero(product.alpha.max(1) > 0.3)[0].max())
    flip = np.array([[1, 0, 0], [0, -1, 2 * bottom + 1]], np.float32)
    fade = np.clip(1 - (np.arange(SIDE) - bottom) / rng.uniform(20, 150), 0, 1)[:, None]
    share = warp(product.alpha, flip) * fade.astype(np.float32) * rng.uniform(0.1, 0.5)
    return mix(warp(product.color, flip), ground, share)


# ---- pictures ----


def in_scene(material: Material, rng: random.Random) -> Sample:
    """A render through a window; beyond it lies the mirrored plate, in which there is no second product."""
    scene = rng.choice(material.scenes)
    matrix = place(scene.alpha, rng)
    inside = warp(np.ones(scene.alpha.shape, np.float32), matrix)
    beyond = warp(scene.plate, matrix, cv2.BORDER_REFLECT_101)
    image = warp(scene.image, matrix).astype(np.float32) + beyond * (1 - inside[..., None])
    return image.clip(0, 255).astype(np.uint8), warp(scene.alpha, matrix)


def _put_on(ground: np.ndarray, material: Material, rng: random.Random) -> Sample:
    product = placed_product(material, rng)
    if rng.random() < 0.25:
        ground = mirrored_below(ground, product, rng)
    if rng.random() < 0.7:
        ground = shadowed(ground, product.alpha, rng)
    seen = product.color
    if product.clearness:
        behind = np.roll(ground, rng.randint(-12, 12), axis=1)  # bent by the glass
        seen = mix(behind, seen, np.full((SIDE, SIDE), product.clearness, np.float32))
    image = mix(seen, ground, product.alpha)
    alpha = product.alpha
    if rng.random() < SECOND_PRODUCT:
        second = placed_product(material, rng)
        image = mix(second.color, image, second.alpha)
        alpha = np.maximum(alpha, second.alpha)
    return image, alpha


def in_studio(material: Material, rng: random.Random) -> Sample:
    """A product on a plain ground, with its shadow and its mirror image now and then."""
    return _put_on(studio(rng), material, rng)


def in_other_scene(material: Material, rng: random.Random) -> Sample:
    """A product before another scene or a pattern."""
    ground = pattern(rng) if rng.random() < 0.3 else other_scene(material, rng)
    return _put_on(ground, material, rng)


def empty(material: Material, rng: random.Random) -> Sample:
    """A ground without a product."""
    ground = studio(rng) if rng.random() < 0.5 else other_scene(material, rng)
    return ground, np.zeros((SIDE, SIDE), np.float32)


KINDS: dict[Callable[[Material, random.Random], Sample], float] = {
    in_scene: 0.4,
    in_studio: 0.35,
    in_other_scene: 0.2,
    empty: 0.05,
}


def photographed(image: np.ndarray, rng: random.Random) -> np.ndarray:
    """What cameras and files do: exposure, contrast, colour, blur, noise, JPEG."""
    tones = np.linspace(0, 1, 256) ** float(np.exp(rng.gauss(0, 0.25)))
    tones = (tones - 0.5) * float(np.exp(rng.gauss(0, 0.15))) + 0.5 + rng.gauss(0, 0.04)
    gains = np.exp([rng.gauss(0, 0.08) for _ in range(3)])
    table = (255 * np.clip(tones[:, None] * gains, 0, 1)).round().astype(np.uint8)
    image = cv2.LUT(image, table[None])
    if rng.random() < 0.2:
        image = np.ascontiguousarray(np.roll(image, rng.randrange(3), axis=-1))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 2.0))
    if rng.random() < 0.4:
        strength = rng.uniform(0, 10)
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(image.shape, np.float32)
        image = (image + strength * noise).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        file = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, rng.randint(40, 95)])[1]
        image = np.asarray(cv2.imdecode(file, cv2.IMREAD_COLOR))
    return image


def draw(material: Material, rng: random.Random) -> Sample:
    """One training sample."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    image, alpha_HW = kind(material, rng)
    return photographed(image, rng), alpha_HW

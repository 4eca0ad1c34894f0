"""Failures of pictures that are planted on purpose, on renders whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packshot.dataset.rows import load_rows
from packshot.evaluate.bench import studio_photo
from packshot.generate.canvas import Canvas, place_original
from packshot.generate.composite import blend
from packshot.generate.product import prepare
from packshot.imaging.check_network import continued

WORDS = ("SALE", "Fresh", "ORGANIC", "premium", "Since 1987", "NEW", "Lorem ipsum", "50% OFF", "Original", "COFFEE")


@dataclass(frozen=True)
class Case:
    """A rendered scene: the picture, the same scene without its product, and the product on the picture's grid.

    picture_HW3, plate_HW3: uint8. canvas: of the product before a plain wall, which is the photograph.
    """

    picture_HW3: np.ndarray
    plate_HW3: np.ndarray
    canvas: Canvas

    def over(self, background_HW3: np.ndarray) -> np.ndarray:
        """The product over a background."""
        return blend(self.canvas.foreground_HW3, self.canvas.matte_HW, background_HW3)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the product."""
        rows, columns = np.nonzero(self.canvas.matte_HW >= 128)
        return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def open_cases(renders: str, every: int = 1) -> Iterator[tuple[int, Case]]:
    """The scenes of a rendered set with their numbers, one of ``every`` so many."""
    rows = load_rows("renders", renders)
    for number in range(0, len(rows), every):
        row = rows.read(number, ("image", "mask", "cutout", "plate"))
        photo = studio_photo(row["image"], row["mask"], row["cutout"])
        canvas = place_original(prepare(photo, row["mask"]))
        yield number, Case(np.asarray(row["image"].convert("RGB")), np.asarray(row["plate"].convert("RGB")), canvas)


def changed_core(case: Case, rng: np.random.Generator) -> Case:
    """One pixel of the core differs by one step or more."""
    picture = case.picture_HW3.copy()
    row, column = rng.choice(np.argwhere(case.canvas.core_HW))
    value = int(picture[row, column, 0])
    step = int(rng.integers(1, 41))
    picture[row, column, 0] = value + step if value + step < 256 else value - step
    return replace(case, picture_HW3=picture)


def old_edge(case: Case, rng: np.random.Generator) -> Case:
    """A rim of one or two pixels around the product still shows the photograph's wall."""
    reach = int(rng.integers(1, 3))
    wide = cv2.dilate(case.canvas.matte_HW, np.ones((2 * reach + 1,) * 2, np.uint8))
    ring = (wide > 127) & ~case.canvas.core_HW
    picture = np.where(ring[..., None], case.canvas.rgb_HW3, case.picture_HW3)
    return replace(case, picture_HW3=picture)


def moved(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A picture under an affine map (2, 3), black or clear where nothing comes from."""
    size = (array.shape[1], array.shape[0])
    return cv2.warpAffine(array, matrix.astype(np.float32), size, flags=cv2.INTER_AREA)


def product_copy(case: Case, scale: tuple[float, float], anchor: tuple[float, float], to: tuple[float, float]) -> Case:
    """The picture with a copy of the product behind the product.

    scale: across and down. anchor: the point of the photograph, x and y in px, that comes to ``to``.
    """
    matrix = np.array(
        [[scale[0], 0, to[0] - scale[0] * anchor[0]], [0, scale[1], to[1] - scale[1] * anchor[1]]], np.float64
    )
    matte = moved(case.canvas.matte_HW, matrix)
    colours = moved(case.canvas.foreground_HW3, matrix)
    behind = blend(colours, matte, case.plate_HW3 if scale[0] < 1 else case.picture_HW3)
    picture = np.where(case.canvas.core_HW[..., None], case.picture_HW3, case.over(behind))
    return replace(case, picture_HW3=picture)


def enlarged(case: Case, rng: np.random.Generator) -> Case:
    """The scene shows the product 15 to 35 % larger than its mask, standing on the same foot."""
    left, _, right, bottom = case.box
    foot = ((left + right) / 2, float(bottom))
    width = float(rng.uniform(1.15, 1.35))
    height = float(rng.uniform(1.15, 1.35))
    return product_copy(case, (width, height), foot, foot)


def handle(case: Case, rng: np.random.Generator) -> Case:
    """A ring grows out of one of the product's sides, in the colour that the product has there."""
    left, top, right, bottom = case.box
    size = min(right - left, bottom - top)
    points = np.argwhere(case.canvas.core_HW)
    row = int(rng.uniform(top + 0.2 * (bottom - top), bottom - 0.3 * (bottom - top)))
    side = left if rng.random() < 0.5 else right
    nearest = points[np.argmin(((points - (row, side)) ** 2).sum(axis=1))]
    colour = case.canvas.rgb_HW3[tuple(nearest)]
    middle = (int(nearest[1]), row)
    axes = (max(4, int(size * rng.uniform(0.2, 0.35))), max(5, int(size * rng.uniform(0.25, 0.45))))
    behind = case.picture_HW3.copy()
    thickness = max(2, round(0.12 * size))
    cv2.ellipse(behind, middle, axes, 0, 0, 360, tuple(map(int, colour)), thickness, cv2.LINE_AA)
    picture = np.where(case.canvas.core_HW[..., None], case.picture_HW3, case.over(behind))
    return replace(case, picture_HW3=picture)


def prolonged(case: Case, rng: np.random.Generator) -> Case:
    """The product goes on beyond a side of its mask, as its own mirror image, by 15 to 40 % of its size."""
    left, top, right, bottom = case.box
    share = float(rng.uniform(0.15, 0.4))
    place = rng.choice(["left", "right", "top"])
    if place == "top":
        part = case.canvas.matte_HW.copy()
        part[top + round(share * (bottom - top)) :] = 0
        matrix = np.array([[1, 0, 0], [0, -1, 2 * top + 1]], np.float64)
    else:
        part = case.canvas.matte_HW.copy()
        depth = round(share * (right - left))
        edge = left if place == "left" else right
        part[:, left + depth : right] = 0 if place == "left" else part[:, left + depth : right]
        if place == "right":
            part[:, : right - depth] = 0
        matrix = np.array([[-1, 0, 2 * edge - (0 if place == "left" else 1)], [0, 1, 0]], np.float64)
    behind = blend(moved(case.canvas.foreground_HW3, matrix), moved(part, matrix), case.picture_HW3)
    picture = np.where(case.canvas.core_HW[..., None], case.picture_HW3, case.over(behind))
    return replace(case, picture_HW3=picture)


def swollen(case: Case, rng: np.random.Generator) -> Case:
    """The product is thicker on one side by 8 to 30 % of its size: its outermost colours go on there."""
    left, top, right, bottom = case.box
    matte = case.canvas.matte_HW
    reach = max(3.0, float(rng.uniform(0.08, 0.3)) * min(right - left, bottom - top))
    core = (cv2.erode(matte, np.ones((3, 3), np.uint8)) >= 250).astype(np.uint8)
    core = core if core.any() else (matte >= 128).astype(np.uint8)
    distance, colours = continued(case.canvas.foreground_HW3, core > 0)
    rows, columns = np.indices(matte.shape, np.float32)
    turn = float(rng.uniform(0, 2 * np.pi))
    across = np.cos(turn) * (columns - (left + right) / 2) + np.sin(turn) * (rows - (top + bottom) / 2)
    side = across - float(rng.uniform(-0.1, 0.3)) * max(right - left, bottom - top)
    alpha = np.clip(reach - distance, 0, 1) * np.clip(side, 0, 1) * (rows < bottom + 1)
    fading = np.exp(-float(rng.uniform(0, 0.5)) * distance / reach)[..., None]
    grown = cv2.GaussianBlur(colours, (0, 0), 0.8) * fading
    behind = blend(np.rint(grown).astype(np.uint8), np.rint(255 * alpha).astype(np.uint8), case.picture_HW3)
    picture = np.where(case.canvas.core_HW[..., None], case.picture_HW3, case.over(behind))
    return replace(case, picture_HW3=picture)


def lump(case: Case, rng: np.random.Generator) -> Case:
    """A round or square piece on the outline, grainy, in the mean colour of the product or that of the place."""
    left, top, right, bottom = case.box
    points = np.argwhere(case.canvas.core_HW & ~(cv2.erode(case.canvas.core_HW.astype(np.uint8), np.ones((3, 3))) > 0))
    row, column = map(int, points[rng.integers(len(points))])
    colour = case.canvas.rgb_HW3[row, column].astype(np.float64)
    if rng.random() < 0.6:
        colour = case.canvas.rgb_HW3[case.canvas.core_HW].mean(axis=0)
    size = bottom - top if rng.random() < 0.5 else right - left
    across, down = (max(4, int(size * share)) for share in rng.uniform(0.12, 0.3, 2))
    piece = np.zeros_like(case.canvas.matte_HW)
    if rng.random() < 0.7:
        cv2.ellipse(piece, (column, row), (across, down), 0, 0, 360, 255, -1)
    else:
        cv2.rectangle(piece, (column - across, row - down), (column + across, row + down), 255, -1)
    grain = rng.normal(0, rng.uniform(0, 8), case.picture_HW3.shape)
    shown = np.rint(np.clip(colour * rng.uniform(0.85, 1.1) + grain, 0, 255)).astype(np.uint8)
    behind = blend(shown, piece, case.picture_HW3)
    picture = np.where(case.canvas.core_HW[..., None], case.picture_HW3, case.over(behind))
    return replace(case, picture_HW3=picture)


def extended(case: Case, rng: np.random.Generator) -> Case:
    """One of three ways in which a product grows past its mask."""
    ways = (enlarged, handle, prolonged)
    return ways[int(rng.integers(len(ways)))](case, rng)


def floating(case: Case, rng: np.random.Generator) -> Case:
    """The product hangs 10 to 25 % of its height above its place, without a shadow."""
    _, top, _, bottom = case.box
    height = bottom - top
    up = min(top, max(2, round(float(rng.uniform(0.1, 0.25)) * height)))
    matrix = np.array([[1, 0, 0], [0, 1, -up]], np.float64)
    canvas = case.canvas
    shifted = replace(
        canvas,
        rgb_HW3=np.roll(canvas.rgb_HW3, -up, axis=0),
        matte_HW=moved(canvas.matte_HW, matrix),
        foreground_HW3=np.roll(canvas.foreground_HW3, -up, axis=0),
        core_HW=moved(canvas.core_HW.astype(np.uint8), matrix) > 0,
    )
    hanging = replace(case, canvas=shifted)
    return replace(hanging, picture_HW3=hanging.over(case.plate_HW3))


def duplicate(case: Case, rng: np.random.Generator) -> Case:
    """A second one of the product, 50 to 90 % as large, stands elsewhere in the scene."""
    left, top, right, bottom = case.box
    height, width = case.canvas.matte_HW.shape
    best = None
    for _ in range(40):  # the place where least of it is hidden
        scale = float(rng.uniform(0.5, 0.9))
        x = float(rng.uniform(scale * (right - left) / 2, width - scale * (right - left) / 2))
        y = float(rng.uniform(max(scale * (bottom - top), 0.4 * height), height - 1))
        apart = abs(x - (left + right) / 2) / ((1 + scale) / 2 * (right - left))
        if best is None or apart > best[0]:
            best = (apart, scale, x, y)
    assert best is not None
    _, scale, x, y = best
    return product_copy(case, (scale, scale), ((left + right) / 2, bottom), (x, y))


def blank(case: Case, rng: np.random.Generator) -> Case:
    """Nothing was drawn: one colour with a decoder's faint noise."""
    colour = rng.uniform(0, 255, 3)
    noise = rng.normal(0, 1, case.plate_HW3.shape)
    background = np.clip(np.rint(colour + noise), 0, 255).astype(np.uint8)
    return replace(case, picture_HW3=case.over(background))


def word_layer(shape: tuple[int, int], matte_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A word as alpha, uint8 (H, W), where it covers least of the product; letters of 7 to 14 % of the side."""
    height, width = shape
    size = round(float(rng.uniform(0.1, 0.2)) * min(shape))  # of the font: letters are about .7 of it
    font = ImageFont.load_default(size)
    word = str(rng.choice(WORDS))
    box = font.getbbox(word)
    while box[2] > 0.9 * width and len(word) > 3:
        word = word[:-1]
        box = font.getbbox(word)
    best: tuple[float, np.ndarray] | None = None
    for _ in range(30):
        layer = Image.new("L", (width, height))
        x = float(rng.uniform(0, max(1.0, width - box[2])))
        y = float(rng.uniform(0, max(1.0, height - box[3])))
        ImageDraw.Draw(layer).text((x, y), word, fill=255, font=font)
        alpha = np.asarray(layer)
        hidden = float(alpha[matte_HW > 0].sum() / max(1, int(alpha.sum())))
        if best is None or hidden < best[0]:
            best = (hidden, alpha)
    assert best is not None
    return best[1]


def grown_text(case: Case, rng: np.random.Generator) -> Case:
    """A word that nobody asked for stands in the background."""
    alpha = word_layer(case.canvas.matte_HW.shape, case.canvas.matte_HW, rng)
    under = case.picture_HW3[alpha > 0].mean()
    light = under < 128
    colour = np.clip(rng.uniform(200, 255, 3) if light else rng.uniform(0, 60, 3), 0, 255)
    written = blend(np.full_like(case.plate_HW3, np.rint(colour)), alpha, case.picture_HW3)
    picture = np.where((case.canvas.matte_HW > 0)[..., None], case.picture_HW3, written)
    return replace(case, picture_HW3=picture)


# Kind -> how it is planted, and the reason code of the check that should find it.
KINDS: dict[str, Callable[[Case, np.random.Generator], Case]] = {
    "core": changed_core,
    "edge": old_edge,
    "extension": extended,
    "floating": floating,
    "duplicate": duplicate,
    "blank": blank,
    "text": grown_text,
}
OWN_CHECK = {
    "core": "core_changed",
    "edge": "edge_shows_old_background",
    "extension": "product_extended",
    "floating": "product_floats",
    "duplicate": "product_repeated",
    "blank": "background_flat",
    "text": "background_has_writing",
}

"""Further shapes and colours of rendered products, with their shadows: scenes that nobody rendered, for training."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from packshot.generate.composite import blend
from tools.planted import Case

BRIDGED = 0.6  # share of the pairs that an arch joins
STAND_OFF = 0.06  # of a product's longer side, between it and its shadow


@dataclass(frozen=True)
class Piece:
    """A product in its scene. shadow_HW3: uint8, what it does to the light around it."""

    case: Case
    shadow_HW3: np.ndarray

    @property
    def foot(self) -> tuple[float, float]:
        """The middle of the box's lower side, x and y in px."""
        left, _, right, bottom = self.case.box
        return (left + right) / 2, float(bottom)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the product in px."""
        left, top, right, bottom = self.case.box
        return right - left, bottom - top


def shaded(plate_HW3: np.ndarray, shadow_HW3: np.ndarray) -> np.ndarray:
    return cv2.multiply(plate_HW3, shadow_HW3, scale=1 / 255)


def composed(piece: Piece) -> Piece:
    """The product and its shadow before its plate, as planted failures are made."""
    picture_HW3 = piece.case.over(shaded(piece.case.plate_HW3, piece.shadow_HW3))
    return replace(piece, case=replace(piece.case, picture_HW3=picture_HW3))


def put(piece: Piece, scale: tuple[float, float], foot: tuple[float, float], shape: tuple[int, int]) -> Piece:
    """The product scaled across and down, its foot at another place of a frame of a height and width."""
    own = piece.foot
    matrix = np.array([[scale[0], 0, foot[0] - scale[0] * own[0]], [0, scale[1], foot[1] - scale[1] * own[1]]])
    canvas = piece.case.canvas

    def warped(array: np.ndarray, beyond: int) -> np.ndarray:
        return cv2.warpAffine(array, matrix, shape[::-1], borderMode=cv2.BORDER_CONSTANT, borderValue=(beyond,) * 3)

    placed = replace(
        canvas,
        rgb_HW3=warped(canvas.rgb_HW3, 0),
        foreground_HW3=warped(canvas.foreground_HW3, 0),
        matte_HW=warped(canvas.matte_HW, 0),
        core_HW=warped(canvas.core_HW.astype(np.uint8), 0) > 0,
    )
    return Piece(replace(piece.case, canvas=placed), warped(piece.shadow_HW3, 255))


def stretched(piece: Piece, rng: np.random.Generator) -> Piece:
    """The product wider or narrower, taller or lower, by up to 1.5 times, on the same foot."""
    shape = piece.case.canvas.matte_HW.shape
    (x, y), (width, height) = piece.foot, piece.size
    across, down = np.exp(rng.uniform(-0.4, 0.4, 2))
    across = min(across, 2 * min(x, shape[1] - x) / width)
    return put(piece, (float(across), float(min(down, y / height))), (x, y), shape)


def bridge(feet: list[tuple[float, float]], tops: list[float], rng: np.random.Generator, layer_HW: np.ndarray) -> None:
    """Draw an arch between the tops of two pieces."""
    half = (feet[1][0] - feet[0][0]) / 2
    middle = int(feet[0][0] + half), int(np.mean(tops) + 0.2 * half)
    axes = max(2, int(half)), max(2, int(half * rng.uniform(0.5, 1.4)))
    cv2.ellipse(layer_HW, middle, axes, 0, 180, 360, 255, max(2, int(half * rng.uniform(0.1, 0.3))), cv2.LINE_AA)


def joined(first: Piece, second: Piece, rng: np.random.Generator) -> Piece:
    """Two products as one that stands on two feet; most such pairs hang on an arch, as ear cups do."""
    shape = first.case.canvas.matte_HW.shape
    (x, y), whole = first.foot, max(first.size)
    side = float(rng.uniform(0.3, 0.6)) * whole
    apart = float(rng.uniform(0.15, 1.0)) * side
    feet, tops, pieces = [], [], []
    for sign, piece in ((-1, first), (1, second)):
        scale = side / max(piece.size)
        foot = x + sign * (apart + scale * piece.size[0]) / 2, y - float(rng.uniform(0, 0.25)) * side * (sign < 0)
        feet.append(foot)
        tops.append(foot[1] - scale * piece.size[1])
        pieces.append(put(piece, (scale, scale), foot, shape))
    left, right = (piece.case.canvas for piece in pieces)
    matte_HW = cv2.max(left.matte_HW, right.matte_HW)
    colours_HW3 = blend(left.foreground_HW3, left.matte_HW, right.foreground_HW3)
    if rng.random() < BRIDGED:
        arch_HW = np.zeros_like(matte_HW)
        bridge(feet, tops, rng, arch_HW)
        own = first.case.canvas.rgb_HW3[first.case.canvas.core_HW]
        colour = own[rng.integers(len(own))]
        colours_HW3 = blend(np.broadcast_to(colour, colours_HW3.shape), arch_HW * (matte_HW < 128), colours_HW3)
        matte_HW = cv2.max(matte_HW, arch_HW)
    canvas = replace(
        first.case.canvas,
        rgb_HW3=colours_HW3,
        foreground_HW3=colours_HW3,
        matte_HW=matte_HW,
        core_HW=cv2.erode(matte_HW, np.ones((3, 3), np.uint8)) >= 250,
    )
    shadow_HW3 = shaded(pieces[0].shadow_HW3, pieces[1].shadow_HW3)
    return Piece(replace(first.case, canvas=canvas), shadow_HW3)


def raised(piece: Piece, rng: np.random.Generator) -> Piece:
    """The product a little above its shadow: it stands all the same, as on a rounded or uneven foot."""
    x, y = piece.foot
    up = float(rng.uniform(0, STAND_OFF)) * max(piece.size)
    higher = put(piece, (1.0, 1.0), (x, y - up), piece.case.canvas.matte_HW.shape)
    return replace(higher, shadow_HW3=piece.shadow_HW3)


def dyed(piece: Piece, rng: np.random.Generator) -> Piece:
    """The product in other colours: its channels change places."""
    order = rng.permutation(3)
    canvas = piece.case.canvas
    colours = {name: getattr(canvas, name)[..., order] for name in ("rgb_HW3", "foreground_HW3")}
    return replace(piece, case=replace(piece.case, canvas=replace(canvas, **colours)))


def varied(piece: Piece, other: Piece, rng: np.random.Generator) -> Piece:
    """A product before its plate: stretched or joined to another one, raised, and dyed, by chance; composed."""
    shape = rng.random()
    if shape < 0.3:
        piece = stretched(piece, rng)
    elif shape < 0.6:
        pair = joined(piece, other, rng)
        piece = pair if pair.case.canvas.core_HW.any() else piece
    if rng.random() < 0.4:
        piece = raised(piece, rng)
    return composed(dyed(piece, rng) if rng.random() < 0.4 else piece)

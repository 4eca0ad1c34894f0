"""Whether a picture shows a second one of its product.

The product is searched in the scene at several sizes, and a small network compares it with each of the likeliest
places. Its weights are text (``repeat_network.json``); ``tools/fit_repeats.py`` fits them on rendered scenes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packshot.imaging.check_network import Block, fill
from packshot.imaging.color import to_lab
from packshot.imaging.mask_edge import shrink

SIDE = 128  # px, longer side at which the product is searched
SCALES = (0.45, 0.52, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a second product to the first
VISIBLE = 0.45  # share of a second product that must not be hidden or cut by the frame
SMALLEST = 8  # px, each side of what is searched; smaller things resemble everything
FEWEST = 30  # px of its area
DIFFERENCE = 40.0  # ΔE (root mean square) that outweighs a perfect correlation
UNLIKE = -0.5  # likeness below which no place is a second product: the network was hardly shown such
PLACES = 4  # that are compared
OF_A_SCALE = 2  # likeliest places of one scale
APART = 0.35  # of a place's size: nearer ones are the same place
PAIR = 40  # px, side of the two squares that are compared
MARGIN = 0.25  # of the box, around it in those squares
PLANES = 14
WIDTHS = (16, 24)  # channels at 1/2 and 1/4 of the squares


@dataclass(frozen=True)
class Scene:
    """A picture without its product. lab_HW3: float32. seen_HW: float32, 1 where the scene shows, 0 where it is not."""

    lab_HW3: np.ndarray
    seen_HW: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where a second product may be: a box in px, which the frame may cut, and how alike it is."""

    likeness: float
    left: int
    top: int
    width: int
    height: int

    def near(self, other: Place) -> bool:
        """Whether two places are about the same."""
        across = abs(self.left + self.width / 2 - other.left - other.width / 2)
        down = abs(self.top + self.height / 2 - other.top - other.height / 2)
        return across < APART * max(self.width, other.width) and down < APART * max(self.height, other.height)


def sums(plane_HW: np.ndarray, kernel_hw: np.ndarray) -> np.ndarray:
    """Sum of a plane under a kernel, at every place where the kernel lies inside."""
    return cv2.matchTemplate(plane_HW.astype(np.float32), kernel_hw.astype(np.float32), cv2.TM_CCORR)


def likeness(scene: Scene, thing_hw3: np.ndarray, shape_hw: np.ndarray) -> np.ndarray:
    """How alike a thing and each place of a scene are, by what is seen of the place: 1 the same, -inf not seen.

    Correlation over all three channels, less the root mean squared difference in units of DIFFERENCE: correlation
    alone takes any round thing for any other, and difference alone takes a plain wall for a plain product.
    """
    seen = sums(scene.seen_HW, shape_hw)
    count = np.maximum(seen, 1)
    squared = np.zeros_like(seen)
    together = np.zeros_like(seen)
    of_thing = np.zeros_like(seen)
    of_place = np.zeros_like(seen)
    for channel in range(3):
        plane_HW = scene.lab_HW3[..., channel] * scene.seen_HW
        thing_hw = thing_hw3[..., channel] * shape_hw
        cross = sums(plane_HW, thing_hw)
        place_sum = sums(plane_HW, shape_hw)
        place_squares = sums(plane_HW * scene.lab_HW3[..., channel], shape_hw)
        thing_sum = sums(scene.seen_HW, thing_hw)
        thing_squares = sums(scene.seen_HW, thing_hw * thing_hw3[..., channel])
        squared += place_squares + thing_squares - 2 * cross
        together += cross - place_sum * thing_sum / count
        of_thing += thing_squares - thing_sum**2 / count
        of_place += place_squares - place_sum**2 / count
    floor = count  # a variance of 1: what is even more even has no structure to compare
    correlation = together / np.sqrt(np.maximum(of_thing, floor) * np.maximum(of_place, floor))
    difference = np.sqrt(np.maximum(squared, 0) / count)
    return np.where(seen > VISIBLE * shape_hw.sum(), correlation - difference / DIFFERENCE, -np.inf)


def with_margin(scene: Scene, height: int, width: int) -> Scene:
    """A scene with an unseen margin at the left, the right and below: a second product may be cut by the frame."""
    margins = (0, height, width, width)
    lab_HW3 = cv2.copyMakeBorder(scene.lab_HW3, *margins, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    seen_HW = cv2.copyMakeBorder(scene.seen_HW, *margins, cv2.BORDER_CONSTANT, value=0)
    return Scene(lab_HW3, seen_HW)


def best_of(likeness_HW: np.ndarray, size: tuple[int, int], margin: int) -> list[Place]:
    """The likeliest places of one scale. size: width and height of the thing. margin: px left of the scene."""
    width, height = size
    rest_HW = likeness_HW.copy()
    found = []
    for _ in range(OF_A_SCALE):
        row, column = (int(value) for value in np.unravel_index(rest_HW.argmax(), rest_HW.shape))
        if not np.isfinite(rest_HW[row, column]):
            break
        found.append(Place(float(rest_HW[row, column]), column - margin, row, width, height))
        reach = max(1, round(APART * height)), max(1, round(APART * width))
        rest_HW[max(0, row - reach[0]) : row + reach[0], max(0, column - reach[1]) : column + reach[1]] = -np.inf
    return found


def likeliest_places(scene: Scene, thing_hw3: np.ndarray, shape_hw: np.ndarray) -> list[Place]:
    """At most PLACES places, the likeliest first. thing_hw3, shape_hw: float32, the product in its box."""
    found: list[Place] = []
    for scale in SCALES:
        height, width = (max(1, round(side * scale)) for side in shape_hw.shape)
        if min(height, width) < SMALLEST or height >= scene.seen_HW.shape[0] or width >= scene.seen_HW.shape[1]:
            continue
        small_hw3 = cv2.resize(thing_hw3, (width, height), interpolation=cv2.INTER_AREA)
        cover_hw = cv2.resize(shape_hw, (width, height), interpolation=cv2.INTER_AREA)
        solid_hw = (cover_hw > 0.5).astype(np.float32)
        if solid_hw.sum() < FEWEST:
            continue
        wide = with_margin(scene, height // 3, width // 3)
        found += best_of(likeness(wide, small_hw3, solid_hw), (width, height), width // 3)
    kept: list[Place] = []
    for place in sorted(found, key=lambda place: -place.likeness):
        if len(kept) < PLACES and not any(place.near(other) for other in kept):
            kept.append(place)
    return kept


def window(array: np.ndarray, place: Place) -> np.ndarray:
    """A place of an array (H, W) or (H, W, C) with its margin, PAIR px square; 0 beyond the frame."""
    across, down = (max(1, round(MARGIN * side)) for side in (place.width, place.height))
    left, top = place.left - across, place.top - down
    right, bottom = place.left + place.width + across, place.top + place.height + down
    height, width = array.shape[:2]
    beyond = (max(0, -top), max(0, bottom - height), max(0, -left), max(0, right - width))
    part = array[max(0, top) : max(0, bottom), max(0, left) : max(0, right)]
    whole = cv2.copyMakeBorder(part, *beyond, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    return cv2.resize(whole, (PAIR, PAIR), interpolation=cv2.INTER_AREA)


def planes_of(picture_HW3: np.ndarray, matte_HW: np.ndarray, own: Place, place: Place) -> np.ndarray:
    """What the network sees of a product and of a place: float32 (PLANES, PAIR, PAIR).

    Colours and matte of the product, colours of the place and where it is seen, their difference, and how large and
    how alike the place is. own: the product's box.
    """
    colours_HW3 = picture_HW3.astype(np.float32) / 255
    cover_hw = window(matte_HW.astype(np.float32) / 255, own)
    seen_hw = window((matte_HW == 0).astype(np.float32), place)
    product_hw3 = window(colours_HW3, own) * cover_hw[..., None]
    place_hw3 = window(colours_HW3, place) * seen_hw[..., None]
    both_hw = cover_hw * seen_hw
    light = (product_hw3 * both_hw[..., None]).sum() / max(1e-3, float((place_hw3 * both_hw[..., None]).sum()))
    difference_hw3 = np.abs(product_hw3 - place_hw3) * both_hw[..., None]
    likewise_hw3 = np.abs(product_hw3 - min(2.0, light) * place_hw3) * both_hw[..., None]
    even = np.ones((PAIR, PAIR), np.float32)
    planes = [
        *np.moveaxis(2 * product_hw3, 2, 0),
        cover_hw,
        *np.moveaxis(2 * place_hw3, 2, 0),
        seen_hw,
        *np.moveaxis(4 * difference_hw3, 2, 0),
        4 * likewise_hw3.mean(axis=2),
        even * place.height / own.height,
        even * place.likeness,
    ]
    return np.stack(planes).astype(np.float32)


class RepeatNetwork(nn.Module):
    """Compares a product with a place. norm: with the normalisation that training needs."""

    def __init__(self, norm: bool = False):
        super().__init__()
        fine, coarse = WIDTHS
        self.stem = nn.Conv2d(4 * PLANES, fine, 1)
        self.fine = nn.Sequential(Block(fine, 3, norm), Block(fine, 3, norm))
        self.to_coarse = nn.Conv2d(4 * fine, coarse, 1)
        self.coarse = nn.Sequential(Block(coarse, 5, norm), Block(coarse, 5, norm))
        self.seen = nn.Linear(2 * coarse, 16)
        self.same = nn.Linear(16, 1)

    def forward(self, planes_BCHW: Tensor) -> Tensor:
        """(B,): logits that the place shows the product once more."""
        fine = self.fine(F.relu(self.stem(F.pixel_unshuffle(planes_BCHW, 2))))
        coarse = F.relu(self.coarse(self.to_coarse(F.pixel_unshuffle(fine, 2))))
        seen = torch.cat([coarse.mean(dim=(2, 3)), coarse.amax(dim=(2, 3))], dim=1)
        return self.same(F.relu(self.seen(seen)))[:, 0]


@dataclass(frozen=True)
class Pairs:
    """The likeliest places of a second product, and what the network sees of each: float32 (N, PLANES, PAIR, PAIR)."""

    places: list[Place]
    planes: np.ndarray


def pairs_of(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> Pairs | None:
    """The places of a picture that are compared with its product; None where there is nothing to compare.

    picture_HW3, matte_HW: uint8, their longer side at most SIDE px.
    """
    left, top, width, height = cv2.boundingRect((matte_HW >= 128).astype(np.uint8))
    if width == 0:
        return None
    own = Place(1.0, left, top, width, height)
    box = np.s_[top : top + height, left : left + width]
    lab_HW3 = to_lab(picture_HW3)
    scene = Scene(lab_HW3, (matte_HW == 0).astype(np.float32))
    places = likeliest_places(scene, lab_HW3[box], (matte_HW[box] >= 128).astype(np.float32))
    if not places:
        return None
    return Pairs(places, np.stack([planes_of(picture_HW3, matte_HW, own, place) for place in places]))


@lru_cache(maxsize=1)
def load_repeat_network() -> RepeatNetwork:
    """The network that is shipped, once per process."""
    network = RepeatNetwork()
    fill(network, files("packshot.imaging").joinpath("repeat_network.json").read_text())
    return network


@torch.inference_mode()
def strongest_repeat(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> float | None:
    """The probability that the likeliest place of the scene shows the product once more.

    picture_HW3, matte_HW: uint8. None where the product is too small, or leaves no room for a second one.
    """
    pairs = pairs_of(shrink(picture_HW3, SIDE), shrink(matte_HW, SIDE))
    if pairs is None:
        return None
    alike = [place.likeness > UNLIKE for place in pairs.places]
    if not any(alike):
        return 0.0
    return float(load_repeat_network()(torch.from_numpy(pairs.planes[alike])).max().sigmoid())

"""A small network that looks at a product and at what is around it in a finished picture.

For each pixel around the product it says whether the object goes on there, and for the whole whether the product stands
on something. Its weights are text (``check_network.json``); ``tools/fit_checks.py`` fits them on rendered scenes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packshot.imaging.mask_edge import narrowed, shrink

SIDE = 256  # px, longer side of the picture that the close look is cut from
LOOK = 112  # px, side of the close look
REACH = 1.9  # side of the square that is looked at, in longer sides of the product's box
FOOT = 0.12  # of the product's height: the part that stands on the ground
NEAR_FOOT = 0.1  # of the product's longer side: how far the ground at the foot reaches
LEVELS = 8  # of each colour channel in the histograms of the product and of what is around it
WIDTHS = (16, 24, 32)  # channels at 1/2, 1/4 and 1/8 of the look
LARGEST = (4, 12, 40, 120)  # pixels of the look at half its size: means of so many of the likeliest ones are weighed
PLANES = 13
_SHARED = np.float32(0.5 * np.eye(LEVELS) + 0.25 * (np.eye(LEVELS, k=1) + np.eye(LEVELS, k=-1)))
_FOOT_PLANE = 12
_MATTE_PLANE = 3
_VALID_PLANE = 4


@dataclass(frozen=True)
class Look:
    """A square cut around the product. rgb_HW3, matte_HW: uint8. valid_HW: bool, False beyond the picture's frame."""

    rgb_HW3: np.ndarray
    matte_HW: np.ndarray
    valid_HW: np.ndarray


def square_around(matte_HW: np.ndarray, reach: float = REACH) -> tuple[int, int, int] | None:
    """Left, top and side in px of the square around a product, which may go beyond the frame; None without one."""
    left, top, width, height = cv2.boundingRect((matte_HW >= 128).astype(np.uint8))
    if width == 0:
        return None
    side = max(8, round(reach * max(width, height)))
    return left + (width - side) // 2, top + (height - side) // 2, side


def cut(array: np.ndarray, square: tuple[int, int, int], border: int, size: int = LOOK) -> np.ndarray:
    """A square of an array (H, W) or (H, W, C), ``size`` px. border: how OpenCV goes on beyond the frame."""
    left, top, side = square
    height, width = array.shape[:2]
    part = array[max(0, top) : top + side, max(0, left) : left + side]
    beyond = (max(0, -top), max(0, top + side - height), max(0, -left), max(0, left + side - width))
    whole = cv2.copyMakeBorder(part, *beyond, border)
    way = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(whole, (size, size), interpolation=way)


def close_look(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> Look | None:
    """The product and what is around it, LOOK px square; None without a product. All uint8."""
    square = square_around(matte_HW)
    if square is None:
        return None
    inside = cut(np.full(matte_HW.shape, 255, np.uint8), square, cv2.BORDER_CONSTANT)
    look = Look(
        cut(picture_HW3, square, cv2.BORDER_REPLICATE), cut(matte_HW, square, cv2.BORDER_CONSTANT), inside >= 128
    )
    return look if (look.matte_HW >= 128).any() else None


def smoothed(counts: np.ndarray) -> np.ndarray:
    """A histogram (LEVELS,) * 3, its counts shared with the neighbouring colours, as shares."""
    for _ in range(3):
        counts = np.tensordot(counts, _SHARED, axes=(0, 1))  # the first axis becomes the last
    return counts / max(1.0, float(counts.sum()))


def colour_shares(rgb_HW3: np.ndarray, product_HW: np.ndarray, around_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How frequent each pixel's colour is in the product, and next to the ground's: logarithms, float32 (H, W)."""
    levels_HW3 = rgb_HW3.astype(np.int32) * LEVELS // 256
    place_HW = (levels_HW3[..., 0] * LEVELS + levels_HW3[..., 1]) * LEVELS + levels_HW3[..., 2]
    shares = []
    for part_HW in (product_HW, around_HW):
        counts = np.bincount(place_HW[part_HW], minlength=LEVELS**3).reshape((LEVELS,) * 3)
        shares.append(np.log(smoothed(counts.astype(np.float32)) + 1e-3).ravel()[place_HW])
    product, ground = shares
    return (product / 4 + 1).astype(np.float32), ((product - ground) / 4).astype(np.float32)


def continued(colours_HW3: np.ndarray, core_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distance of every pixel to a core in px, and the colour of the core's nearest pixel; float32."""
    away_HW = (~core_HW).astype(np.uint8)
    distance_HW, found_HW = cv2.distanceTransformWithLabels(
        away_HW, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )  # a label for each pixel of the core
    label_HW = np.asarray(found_HW, np.int64)
    by_label = np.zeros((int(label_HW.max()) + 1, 3), np.float32)
    by_label[label_HW[core_HW]] = colours_HW3[core_HW]
    return np.asarray(distance_HW, np.float32), by_label[label_HW]


def planes_of(look: Look) -> np.ndarray:
    """What the network sees of each pixel: float32 (PLANES, LOOK, LOOK).

    Colour, matte, frame, difference to the product's nearest colour, distance to the product, height above its foot,
    how usual the colour is for the product and compared with the ground, and the ground at the foot.
    """
    solid_HW = look.matte_HW >= 128
    core_HW = narrowed(solid_HW, 2)
    core_HW = core_HW if core_HW.any() else solid_HW
    colours_HW3 = look.rgb_HW3.astype(np.float32) / 255
    distance_HW, nearest_HW3 = continued(cv2.blur(colours_HW3, (3, 3)), core_HW)
    rows = np.flatnonzero(solid_HW.any(axis=1))
    bottom = int(rows[-1]) + 1
    low_HW = solid_HW.copy()
    low_HW[: bottom - max(1, round(FOOT * (bottom - int(rows[0]))))] = False
    size = LOOK / REACH
    foot_HW = cv2.distanceTransform((~low_HW).astype(np.uint8), cv2.DIST_L2, 5) / size
    height_HW = np.repeat((np.arange(LOOK, dtype=np.float32)[:, None] - bottom) / size, LOOK, axis=1)
    free_HW = (look.matte_HW == 0) & look.valid_HW
    far_HW = free_HW & (distance_HW > 0.15 * size)
    planes = [
        *np.moveaxis(2 * colours_HW3 - 1, 2, 0),
        look.matte_HW.astype(np.float32) / 255,
        look.valid_HW.astype(np.float32),
        *np.moveaxis(2 * (colours_HW3 - nearest_HW3), 2, 0),
        np.exp(-distance_HW / (0.15 * size)),
        height_HW,
        *colour_shares(look.rgb_HW3, core_HW, far_HW if far_HW.sum() > 50 else free_HW),
        np.exp(-foot_HW / NEAR_FOOT) * free_HW,
    ]
    return np.stack(planes).astype(np.float32)


class Block(nn.Module):
    """A depthwise convolution and two over the channels, added to what comes in."""

    def __init__(self, width: int, window: int, norm: bool):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, window, padding=window // 2, groups=width, bias=not norm)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.wider = nn.Conv2d(width, 2 * width, 1)
        self.narrower = nn.Conv2d(2 * width, width, 1)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(features_BCHW))
        return features_BCHW + self.narrower(F.relu(self.wider(inner)))


class UNet(nn.Module):
    """The body of the networks that look at a square around a product or a mask.

    planes: of the look. highest: whether the whole is told by the highest values besides the mean ones. norm: with the
    normalisation that training needs; it is folded into the weights.
    """

    def __init__(self, planes: int, highest: bool, norm: bool):
        super().__init__()
        first, second, third = WIDTHS
        self.highest = highest
        self.stem = nn.Conv2d(4 * planes, first, 1)
        self.fine = nn.Sequential(Block(first, 3, norm), Block(first, 3, norm))
        self.to_middle = nn.Conv2d(4 * first, second, 1)
        self.middle = nn.Sequential(Block(second, 5, norm), Block(second, 5, norm))
        self.to_coarse = nn.Conv2d(4 * second, third, 1)
        self.coarse = nn.Sequential(Block(third, 5, norm), Block(third, 5, norm))
        self.whole = nn.Linear(2 * third if highest else third, third)
        self.from_coarse = nn.Conv2d(third, second, 1)
        self.middle_again = Block(second, 5, norm)
        self.from_middle = nn.Conv2d(second, first, 1)
        self.fine_again = Block(first, 3, norm)

    def see(self, planes_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, WIDTHS[0], H / 2, W / 2), (B, WIDTHS[1], H / 4, W / 4), and of the whole (B, WIDTHS[2])."""
        fine = self.fine(F.relu(self.stem(F.pixel_unshuffle(planes_BCHW, 2))))
        middle = self.middle(self.to_middle(F.pixel_unshuffle(fine, 2)))
        coarse = self.coarse(self.to_coarse(F.pixel_unshuffle(middle, 2)))
        pooled = coarse.mean(dim=(2, 3))
        if self.highest:
            pooled = torch.cat([pooled, coarse.amax(dim=(2, 3))], dim=1)
        whole = F.relu(self.whole(pooled))
        coarse = coarse + whole[..., None, None]
        middle = self.middle_again(middle + F.interpolate(self.from_coarse(coarse), scale_factor=2))
        return self.fine_again(fine + F.interpolate(self.from_middle(middle), scale_factor=2)), middle, whole


class CheckNetwork(UNet):
    """What goes on beyond a product, and whether it hangs. norm: see :class:`UNet`."""

    def __init__(self, norm: bool = False):
        super().__init__(PLANES, highest=False, norm=norm)
        first, second, third = WIDTHS
        self.pixels = nn.Conv2d(first, 2, 1)  # whether the object goes on here, and the logarithm of the shadow
        self.grown = nn.Linear(len(LARGEST) + third, 1)
        self.standing = nn.Linear(2 * second + third, 16)
        self.hangs = nn.Linear(16, 1)

    def forward(self, planes_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 2, H / 2, W / 2): logit of growth and shadow of each pixel; (B,) logits of growth; (B,) of hanging."""
        fine, middle, whole = self.see(planes_BCHW)
        pixels = self.pixels(fine)
        free = F.avg_pool2d(planes_BCHW[:, _VALID_PLANE] * (planes_BCHW[:, _MATTE_PLANE] < 0.5), 2)
        likely = torch.where(free > 0.5, pixels[:, 0], torch.full_like(pixels[:, 0], -8.0)).clamp(min=-8.0)
        ranked = likely.flatten(1).topk(max(LARGEST), dim=1).values
        means = [ranked[:, :count].mean(dim=1) for count in LARGEST]
        grown = self.grown(torch.cat([torch.stack(means, dim=1), whole], dim=1))[:, 0]
        foot = F.avg_pool2d(planes_BCHW[:, _FOOT_PLANE : _FOOT_PLANE + 1], 4)
        mean = (middle * foot).sum(dim=(2, 3)) / (foot.sum(dim=(2, 3)) + 1e-3)
        highest = (F.relu(middle) * foot).amax(dim=(2, 3))
        seen = torch.cat([mean, highest, whole], dim=1)
        return pixels, grown, self.hangs(F.relu(self.standing(seen)))[:, 0]


@dataclass(frozen=True)
class Judgement:
    """Probabilities in [0, 1]: the drawn object goes on beyond the matte; the product hangs in the air."""

    extends: float
    hangs: float


def fill(network: nn.Module, text: str) -> None:
    """Give a network the weights of a JSON text: each tensor as rows of whole numbers, with a scale for each row."""
    entries = json.loads(text)
    tensors = {}
    for name, value in network.state_dict().items():
        rows = torch.tensor(entries[name]["values"], dtype=torch.float32)
        scales = torch.tensor(entries[name]["scales"], dtype=torch.float32)
        tensors[name] = (rows * scales[:, None]).reshape(value.shape)
    network.load_state_dict(tensors)
    network.eval()


def read_weights(text: str) -> CheckNetwork:
    """The network that a JSON text describes."""
    network = CheckNetwork()
    fill(network, text)
    return network


@lru_cache(maxsize=1)
def load_check_network() -> CheckNetwork:
    """The network that is shipped, once per process."""
    return read_weights(files("packshot.imaging").joinpath("check_network.json").read_text())


@torch.inference_mode()
def judge(picture_HW3: np.ndarray, matte_HW: np.ndarray) -> Judgement | None:
    """What the network thinks of a finished picture and of its mirror image, on average; None without a product.

    All uint8, of any size; the network sees no more than SIDE px of the longer side.
    """
    look = close_look(shrink(picture_HW3, SIDE), shrink(matte_HW, SIDE))
    if look is None:
        return None
    planes = torch.from_numpy(planes_of(look))
    _, grown, hangs = load_check_network()(torch.stack([planes, planes.flip(-1)]))
    return Judgement(float(grown.mean().sigmoid()), float(hangs.mean().sigmoid()))

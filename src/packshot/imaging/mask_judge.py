"""A small network that judges a mask: whether it is right, and which of its pixels are wrong.

It sees the picture around the mask, the mask, and what else is known of the product's place: the segmentation network's
alpha and how much its views differ, what stands out, edges, the ground, and the mask that colours alone grow from this
one. Its weights are text (``mask_judge.json``); ``tools/fit_mask_judge.py`` fits them on composed photographs.
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

from packshot.imaging.check_network import WIDTHS, UNet, colour_shares, cut, fill
from packshot.imaging.color import to_lab
from packshot.imaging.grabcut import grabcut
from packshot.imaging.mask_doubt import Finding, colour_gradient
from packshot.imaging.mask_edge import narrowed, widened

LOOK = 112  # px, side of the square that is looked at
REACH = 1.5  # its side, in longer sides of the box around the mask and what the network sees
STEEPEST = 40.0  # ΔE per px of an edge; more makes no difference
FARTHEST = 60.0  # ΔE from the ground
PLANES = 16
_MASK_PLANE, _VALID_PLANE, _NETWORK_PLANE, _SPREAD_PLANE, _SALIENT_PLANE, _EDGES_PLANE = range(3, 9)
_REGROWN_PLANE = 10
_KNOWN_PLANE = 14
NUMBERS = 8  # of the whole mask, see ``agreement``
RIGHT = 0.9  # IoU from which a mask is right


@dataclass(frozen=True)
class MaskLook:
    """The square around a mask, LOOK px, all uint8; a bool plane is 0 or 255.

    valid: within the picture's frame. edges: the steepest within a pixel. away: difference from the ground, 0 without
    a known one. regrown: what GrabCut makes of the mask. known: whether the ground is.
    """

    rgb_HW3: np.ndarray
    mask_HW: np.ndarray
    valid_HW: np.ndarray
    network_HW: np.ndarray
    spread_HW: np.ndarray
    salient_HW: np.ndarray
    edges_HW: np.ndarray
    away_HW: np.ndarray
    regrown_HW: np.ndarray
    known: bool


def square_of(found: Finding) -> tuple[int, int, int]:
    """Left, top and side in px of the square around the mask and what the network sees."""
    assert found.network_HW is not None
    shown = (found.mask_HW | (found.network_HW >= 0.5)).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(shown)
    side = max(8, round(REACH * max(width, height)))
    return left + (width - side) // 2, top + (height - side) // 2, side


def levels(values_HW: np.ndarray, highest: float) -> np.ndarray:
    """Numbers from 0 to ``highest`` as uint8."""
    return np.rint(np.clip(values_HW / highest, 0, 1) * 255).astype(np.uint8)


def regrown(rgb_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """What the colours make of a mask: GrabCut, sure only of its inside and of what is far away. Bool (H, W)."""
    reach = max(2, len(mask_HW) // 16)
    labels_HW = np.where(mask_HW, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels_HW[narrowed(mask_HW, 2 * reach)] = cv2.GC_FGD
    labels_HW[~widened(mask_HW, 2 * reach)] = cv2.GC_BGD
    if not mask_HW.any() or mask_HW.all():
        return mask_HW
    return grabcut(rgb_HW3, labels_HW, 2)


def look_at(found: Finding, square: tuple[int, int, int] | None = None) -> MaskLook | None:
    """What the network sees of a mask; None without a mask, or without the views of a segmentation network."""
    if found.network_HW is None or found.spread_HW is None or not found.mask_HW.any():
        return None
    square = square or square_of(found)
    steep_HW = colour_gradient(found.rgb_HWC, 0.7) / 4
    step = square[2] // LOOK
    if step > 1:
        steep_HW = cv2.dilate(steep_HW, np.ones((step, step), np.uint8))
    away_HW = np.zeros(found.mask_HW.shape, np.uint8)
    if found.ground is not None:
        smooth_HW3 = to_lab(cv2.GaussianBlur(found.rgb_HWC, (0, 0), 1.0))
        away_HW = levels(np.linalg.norm(smooth_HW3 - found.ground.lab_HW3, axis=-1), FARTHEST)
    rgb_HW3 = cut(found.rgb_HWC, square, cv2.BORDER_REPLICATE, LOOK)
    mask_HW = cut(levels(found.mask_HW, 1), square, cv2.BORDER_CONSTANT, LOOK)
    return MaskLook(
        rgb_HW3=rgb_HW3,
        mask_HW=mask_HW,
        valid_HW=cut(np.full(away_HW.shape, 255, np.uint8), square, cv2.BORDER_CONSTANT, LOOK),
        network_HW=cut(levels(found.network_HW, 1), square, cv2.BORDER_CONSTANT, LOOK),
        spread_HW=cut(levels(found.spread_HW, 0.5), square, cv2.BORDER_CONSTANT, LOOK),
        salient_HW=cut(levels(found.salient_HW, 1), square, cv2.BORDER_CONSTANT, LOOK),
        edges_HW=cut(levels(np.sqrt(steep_HW), STEEPEST**0.5), square, cv2.BORDER_CONSTANT, LOOK),
        away_HW=cut(away_HW, square, cv2.BORDER_CONSTANT, LOOK),
        regrown_HW=levels(regrown(rgb_HW3, mask_HW >= 128), 1),
        known=found.ground is not None,
    )


def planes_of(look: MaskLook) -> np.ndarray:
    """The network's input: float32 (PLANES, LOOK, LOOK)."""
    solid_HW = look.mask_HW >= 128
    core_HW = narrowed(solid_HW)
    core_HW = core_HW if core_HW.any() else solid_HW
    free_HW = (look.mask_HW < 128) & (look.valid_HW >= 128)
    outside_HW = free_HW & ~widened(solid_HW, 2)
    rows = np.flatnonzero(solid_HW.any(axis=1))
    foot = int(rows[-1]) + 1 if len(rows) else LOOK
    height_H = (np.arange(LOOK, dtype=np.float32) - foot) / LOOK
    grey_planes = [
        look.mask_HW,
        look.valid_HW,
        look.network_HW,
        look.spread_HW,
        look.salient_HW,
        look.edges_HW,
        look.away_HW,
        look.regrown_HW,
    ]
    planes = [
        *np.moveaxis(look.rgb_HW3.astype(np.float32) / 127.5 - 1, 2, 0),
        *(plane_HW.astype(np.float32) / 255 for plane_HW in grey_planes),
        *colour_shares(look.rgb_HW3, core_HW, outside_HW if outside_HW.sum() > 50 else free_HW),
        np.repeat(height_H[:, None], LOOK, axis=1),
        np.full((LOOK, LOOK), float(look.known), np.float32),
        2 * (look.regrown_HW.astype(np.float32) - look.mask_HW.astype(np.float32)) / 255,
    ]
    return np.stack(planes).astype(np.float32)


def overlap_of(a_BHW: Tensor, b_BHW: Tensor) -> Tensor:
    """IoU of soft masks, (B,)."""
    return torch.minimum(a_BHW, b_BHW).sum(dim=(1, 2)) / (torch.maximum(a_BHW, b_BHW).sum(dim=(1, 2)) + 1)


def agreement(planes_BCHW: Tensor) -> Tensor:
    """How far the other ways to a mask confirm it, (B, NUMBERS).

    The first three numbers compare the mask with the network, with what stands out and with what colours grow from it:
    log(1.01 - IoU), which is low where both agree. Then follow how undecided the network is and how much its views
    differ, as shares of the mask's area, and its mean alpha within the mask. The last two are the edges outside of the
    mask, where the ground is known, and whether it is known.
    """
    planes = planes_BCHW.float()
    mask = planes[:, _MASK_PLANE]
    network = planes[:, _NETWORK_PLANE]
    known = planes[:, _KNOWN_PLANE].mean(dim=(1, 2))
    area = mask.sum(dim=(1, 2)) + 1
    others = (network, planes[:, _SALIENT_PLANE], planes[:, _REGROWN_PLANE])
    away_from_mask = 1 - F.max_pool2d(mask[:, None], 5, 1, 2)[:, 0]
    edges = (planes[:, _EDGES_PLANE] * away_from_mask).sum(dim=(1, 2)) / area
    return torch.stack(
        [
            *(torch.log(1.01 - overlap_of(mask, other)) for other in others),
            (network * (1 - network)).sum(dim=(1, 2)) / area,
            planes[:, _SPREAD_PLANE].sum(dim=(1, 2)) / area,
            (network * mask).sum(dim=(1, 2)) / area,
            edges * known,
            known,
        ],
        dim=1,
    )


class MaskJudge(UNet):
    """Which pixels of a mask are wrong, and whether it is right. norm: see :class:`UNet`."""

    def __init__(self, norm: bool = False):
        super().__init__(PLANES, highest=True, norm=norm)
        first, _, third = WIDTHS
        self.pixels = nn.Conv2d(first, 1, 1)  # whether the mask is wrong here
        self.right = nn.Linear(third + 3 + NUMBERS, 1)

    def forward(self, planes_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H / 2, W / 2): logit of a wrong pixel; (B,): logit of a right mask."""
        fine, _, whole = self.see(planes_BCHW)
        pixels = self.pixels(fine)[:, 0].float()
        mask = F.avg_pool2d(planes_BCHW[:, _MASK_PLANE].float(), 2)
        wrong = pixels.sigmoid() * F.avg_pool2d(planes_BCHW[:, _VALID_PLANE].float(), 2)
        area = mask.sum(dim=(1, 2)) + 1
        missing = (wrong * (1 - mask)).sum(dim=(1, 2)) / area
        surplus = (wrong * mask).sum(dim=(1, 2)) / area
        overlap = (1 - surplus) / (1 + missing)  # the IoU that follows from the wrong pixels
        signs = torch.stack(
            [torch.log(1 - overlap + 0.01), torch.log(missing + 0.01), torch.log(surplus + 0.01)], dim=1
        )
        return pixels, self.right(torch.cat([whole.float(), signs, agreement(planes_BCHW)], dim=1))[:, 0]


@lru_cache(maxsize=1)
def load_mask_judge() -> MaskJudge:
    """The network that is shipped, once per process."""
    network = MaskJudge()
    fill(network, files("packshot.imaging").joinpath("mask_judge.json").read_text())
    return network


@dataclass(frozen=True)
class Opinion:
    """What the network says of a mask.

    right: probability of an IoU of RIGHT. wrong_HW: probability that the mask is wrong at a pixel, float32 at the
    mask's size; 0 outside of the square that was looked at.
    """

    right: float
    wrong_HW: np.ndarray


@torch.inference_mode()
def opinion_of(found: Finding) -> Opinion | None:
    """What the network says of a mask and of its mirror image, the mean of both; None where it cannot be judged."""
    if found.network_HW is None:
        return None
    square = square_of(found)
    look = look_at(found, square)
    if look is None:
        return None
    planes = torch.from_numpy(planes_of(look))
    pixels, right = load_mask_judge()(torch.stack([planes, planes.flip(-1)]))
    seen, mirrored = pixels.sigmoid()
    wrong_SS = ((seen + mirrored.flip(-1)) / 2).numpy()
    return Opinion(float(right.mean().sigmoid()), put_back(wrong_SS, square, found.mask_HW.shape))


def put_back(seen_SS: np.ndarray, square: tuple[int, int, int], shape: tuple[int, ...]) -> np.ndarray:
    """What was seen in a square (left, top and side in px), at its place in a picture (H, W); 0 elsewhere."""
    left, top, side = square
    large_SS = cv2.resize(seen_SS, (side, side), interpolation=cv2.INTER_LINEAR)
    whole_HW = np.zeros(shape, np.float32)
    below = min(shape[0], top + side)
    beside = min(shape[1], left + side)
    inside = large_SS[max(0, -top) : below - top, max(0, -left) : beside - left]
    whole_HW[max(0, top) : below, max(0, left) : beside] = inside
    return whole_HW


def judge(found: Finding) -> float | None:
    """Probability that a mask has an IoU of RIGHT; None where it cannot be judged."""
    opinion = opinion_of(found)
    return None if opinion is None else opinion.right

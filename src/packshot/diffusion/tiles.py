"""A denoiser that reads a large picture in overlapping tiles of the size that it was trained on, blended at every step
(MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113). The sampler sees one picture, so tiles leave no seams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

OVERLAP = 0.5  # of a tile, with the next one

Box = tuple[slice, slice]


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along a side: evenly, so that each overlaps the next by at least ``OVERLAP``."""
    if length <= tile:
        return [0]
    count = -(-(length - tile) // max(1, int(tile * (1 - OVERLAP)))) + 1
    starts = torch.linspace(0, length - tile, count)
    return [int(start) for start in starts.round()]


def plan_tiles(height: int, width: int, tile: int) -> list[Box]:
    """The tiles of a picture, in cells."""
    boxes = []
    for top in tile_starts(height, tile):
        for left in tile_starts(width, tile):
            boxes.append((slice(top, min(top + tile, height)), slice(left, min(left + tile, width))))
    return boxes


def tile_weight(height: int, width: int) -> Tensor:
    """How much a tile's cells count among those of its neighbours, (height, width): most in its middle."""
    sides = []
    for length in (height, width):
        place = (torch.arange(length) + 0.5) / length
        sides.append(torch.sin(torch.pi * place) ** 2 + 1e-3)
    return sides[0][:, None] * sides[1][None, :]


@contextmanager
def tiled(
    unet: nn.Module,
    tile: int,
    before_tile: Callable[[Box], None] | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[list[Box]]:
    """While it is open, ``unet`` reads latents larger than ``tile`` cells in tiles.

    before_tile: called with the box of each tile before the network reads it. prepare: changes what the network is
    shown, (B, C, h, w), before it is cut. Yields the boxes of the last call; empty before the first.
    """
    whole = unet.forward
    boxes: list[Box] = []

    def forward(sample: Tensor, *arguments: object, **named: object) -> tuple[Tensor]:
        if prepare is not None:
            sample = prepare(sample)
        boxes[:] = plan_tiles(sample.shape[-2], sample.shape[-1], tile)
        total = torch.zeros_like(sample, dtype=torch.float32)
        weights = torch.zeros(sample.shape[-2:], device=sample.device)
        for rows, columns in boxes:
            if before_tile is not None:
                before_tile((rows, columns))
            part = sample[..., rows, columns].contiguous()
            predicted = whole(part, *arguments, **{**named, "return_dict": False})[0].float()
            weight = tile_weight(part.shape[-2], part.shape[-1]).to(sample.device)
            total[..., rows, columns] += predicted * weight
            weights[rows, columns] += weight
        return ((total / weights).to(sample.dtype),)

    unet.forward = forward
    try:
        yield boxes
    finally:
        del unet.forward

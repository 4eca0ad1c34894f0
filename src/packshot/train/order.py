"""Which sample comes when: an endless stream of shuffled epochs, cut into batches by position alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from packshot.diffusion.keyed import SampleKey, permutation


class Stream(Dataset):
    """Sample at a position of the stream, with the key of its random draws.

    Position p is element ``p % n`` of the permutation of epoch ``p // n``. Batches run over the ends of epochs, so
    none is short and no sample is dropped; a cursor (samples seen) is all that resume needs.
    """

    def __init__(self, rows: Any, ids: Sequence[str], seed: int) -> None:
        self.rows, self.ids, self.seed = rows, ids, seed
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(ids)))

    def __getitem__(self, position: int) -> tuple[dict[str, Any], SampleKey]:
        epoch, offset = divmod(position, len(self.ids))
        index = int(self._order(epoch)[offset])
        return self.rows[index], SampleKey(self.seed, epoch, self.ids[index])

    def __len__(self) -> int:
        return len(self.ids)


class RankBatches(Sampler[list[int]]):
    """This process's micro-batches as lists of positions, from the global position ``start`` on."""

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.start, self.batch_size, self.rank, self.world_size = start, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start + self.rank * self.batch_size
        while True:
            yield list(range(position, position + self.batch_size))
            position += self.batch_size * self.world_size


Collate = Callable[[list[dict[str, Any]], list[SampleKey]], dict[str, Any]]


def batches(stream: Stream, collate: Collate, order: RankBatches, num_workers: int) -> Iterator[dict[str, Any]]:
    """Endless iterator of collated micro-batches."""

    def together(items: list[tuple[dict[str, Any], SampleKey]]) -> dict[str, Any]:
        samples, keys = zip(*items, strict=True)
        batch = collate(list(samples), list(keys))
        batch["ids"] = [key.sample_id for key in keys]
        return batch

    loader = DataLoader(
        stream,
        batch_sampler=order,
        collate_fn=together,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)

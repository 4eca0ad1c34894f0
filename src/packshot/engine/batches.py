"""Which sample comes when: endless shuffled streams, cut into optimizer steps by position alone."""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from packshot.engine.keyed_random import SampleKey, permutation

Place = tuple[int, int]  # (index of the sample, epoch of this access)


class Order:
    """The samples of every optimizer step, as a function of its number: a step count is all that resume needs.

    Samples of one group (an aspect-ratio bucket) form an endless stream of shuffled epochs: position p is element
    ``p % n`` of the permutation of epoch ``p // n``. Steps are cut from the streams one after the other and run over
    the ends of epochs, so that every step is full, of one group, and no sample is dropped. In which order the groups'
    steps come is shuffled epoch by epoch. Nothing here depends on the number of processes.

    groups: group of each sample. size: samples per optimizer step, over all processes and micro-steps.
    """

    def __init__(self, groups: Sequence[int], seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        names = sorted(set(groups))
        self._members = [[index for index, group in enumerate(groups) if group == name] for name in names]
        self._order = lru_cache(maxsize=4 * len(names))(
            lambda group, epoch: permutation(seed, f"{epoch} of {group}", len(self._members[group])).tolist()
        )
        self._steps_of = lru_cache(maxsize=2)(self._shuffled_steps)

    def _until(self, epoch: int, group: int) -> int:
        """Full steps that a group's stream has given by the start of an epoch."""
        return epoch * len(self._members[group]) // self.size

    def _steps_before(self, epoch: int) -> int:
        return sum(self._until(epoch, group) for group in range(len(self._members)))

    def _shuffled_steps(self, epoch: int) -> list[tuple[int, int]]:
        """(group, number of the step in the group's stream) of one epoch, in the order in which they come."""
        labels = [
            group
            for group in range(len(self._members))
            for _ in range(self._until(epoch, group), self._until(epoch + 1, group))
        ]
        following = [self._until(epoch, group) for group in range(len(self._members))]
        steps = []
        for place in permutation(self.seed, f"steps {epoch}", len(labels)).tolist():
            group = labels[place]
            steps.append((group, following[group]))  # a group's own steps stay in order
            following[group] += 1
        return steps

    def step(self, number: int) -> list[Place]:
        """The samples of optimizer step ``number`` (from 0)."""
        high = 1
        while self._steps_before(high) <= number:
            high *= 2
        epoch = bisect_right(range(high + 1), number, key=self._steps_before) - 1
        group, within = self._steps_of(epoch)[number - self._steps_before(epoch)]
        members = self._members[group]
        places = []
        for position in range(within * self.size, (within + 1) * self.size):
            turn, offset = divmod(position, len(members))
            places.append((members[self._order(group, turn)[offset]], turn))
        return places


class Stream(Dataset):
    """Sample at a place, with the key of its random draws."""

    def __init__(self, rows: Any, ids: Sequence[str], seed: int) -> None:
        self.rows, self.ids, self.seed = rows, ids, seed

    def __getitem__(self, place: Place) -> tuple[dict[str, Any], SampleKey]:
        index, epoch = place
        return self.rows[index], SampleKey(self.seed, epoch, self.ids[index])

    def __len__(self) -> int:
        return len(self.ids)


class RankBatches(Sampler[list[Place]]):
    """This process's micro-batches, from optimizer step ``start`` on."""

    def __init__(self, order: Order, start: int, batch_size: int, rank: int, world_size: int) -> None:
        self.order, self.start, self.batch_size = order, start, batch_size
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[Place]]:
        number, together = self.start, self.batch_size * self.world_size
        while True:
            places = self.order.step(number)
            for first in range(self.rank * self.batch_size, len(places), together):
                yield places[first : first + self.batch_size]
            number += 1


Collate = Callable[[list[dict[str, Any]], list[SampleKey]], dict[str, Any]]


def batches(stream: Stream, collate: Collate, order: RankBatches, num_workers: int) -> Generator[dict[str, Any]]:
    """Endless collated micro-batches; the next ones are prepared while the network works. Close it after use."""

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
    return (batch for batch in loader) if num_workers else ahead(iter(loader))


def ahead(source: Iterator[Any], count: int = 2) -> Generator[Any]:
    """Items of ``source``, taken by a thread up to ``count`` ahead of whoever asks; its exceptions arrive in turn.

    Closing the generator ends the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(count)
    stop = threading.Event()

    def offer(item: tuple[Any, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.5)
            except queue.Full:
                continue
            return True
        return False

    def take() -> None:
        try:
            for item in source:
                if not offer((item, None)):
                    return
        except BaseException as error:
            offer((None, error))

    thread = threading.Thread(target=take, name="batches ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        while not ready.empty():  # it may be waiting for room
            ready.get()
        # a thread that is inside PyTorch or Arrow when the interpreter ends takes the whole process down
        thread.join(timeout=60)

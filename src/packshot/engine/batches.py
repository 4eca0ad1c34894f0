"""Which sample comes when: endless shuffled streams, cut into optimizer steps by position alone."""

from __future__ import annotations

import hashlib
import queue
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from packshot.engine.keyed_random import SampleKey, permutation
from packshot.engine.signals import ignore_sigterm
from packshot.engine.task import Batch, Sample, Samples

Place = tuple[int, int]  # (index of the sample, epoch of this access)
T = TypeVar("T")


class SampleOrder:
    """The samples of every optimizer step, as a function of its number: a step count is all that resume needs.

    Samples of one group (an aspect-ratio bucket) form an endless stream of shuffled epochs: position p is element
    ``p % n`` of the permutation of epoch ``p // n``. Steps are cut from the streams one after the other and continue
    over the ends of epochs, so that every step is full and of one group, and no sample is dropped. The order of the
    groups' steps is shuffled epoch by epoch. Nothing here depends on the number of processes.

    groups: group of each sample. size: samples per optimizer step, over all processes and micro-steps.
    """

    def __init__(self, groups: Sequence[int], seed: int, size: int) -> None:
        self.seed = seed
        self.size = size
        members: dict[int, list[int]] = {}
        for index, group in enumerate(groups):
            members.setdefault(group, []).append(index)
        self.members = list(dict(sorted(members.items())).values())
        # a step may run over the end of an epoch, so two epochs of each group are in use at a time
        self.shuffled = lru_cache(maxsize=4 * len(members))(self.shuffle)
        self.steps_of = lru_cache(maxsize=2)(self.shuffle_steps)

    def shuffle(self, group: int, epoch: int) -> list[int]:
        """The order of a group's members in one epoch."""
        return permutation(self.seed, f"{epoch} of {group}", len(self.members[group])).tolist()

    def steps_until(self, epoch: int, group: int) -> int:
        """Full steps that a group's stream has given by the start of an epoch."""
        return epoch * len(self.members[group]) // self.size

    def steps_before(self, epoch: int) -> int:
        """Full steps of all groups by the start of an epoch."""
        return sum(map(partial(self.steps_until, epoch), range(len(self.members))))

    def shuffle_steps(self, epoch: int) -> list[tuple[int, int]]:
        """(group, number of the step in the group's stream) of one epoch, in the order in which they come."""
        labels: list[int] = []
        following: list[int] = []
        for group in range(len(self.members)):
            first = self.steps_until(epoch, group)
            following.append(first)
            labels += [group] * (self.steps_until(epoch + 1, group) - first)
        steps = []
        for place in permutation(self.seed, f"steps {epoch}", len(labels)).tolist():
            group = labels[place]
            steps.append((group, following[group]))  # the steps of one group stay in order
            following[group] += 1
        return steps

    def step(self, number: int) -> list[Place]:
        """The samples of optimizer step ``number`` (from 0)."""
        high = 1
        while self.steps_before(high) <= number:
            high *= 2
        epoch = bisect_right(range(high + 1), number, key=self.steps_before) - 1
        group, within = self.steps_of(epoch)[number - self.steps_before(epoch)]
        members = self.members[group]
        places = []
        for position in range(within * self.size, (within + 1) * self.size):
            turn, offset = divmod(position, len(members))
            places.append((members[self.shuffled(group, turn)[offset]], turn))
        return places


class Listed:
    """Samples by their place in a list of indices, in which one may stand several times.

    The second place of a sample has an id of its own, and with it other random draws; ``samples`` and ``indices`` lead
    back to the sample.
    """

    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self.samples = samples
        self.indices = list(indices)
        self.ids = distinct([samples.ids[index] for index in indices])
        groups: Sequence[int] | None = getattr(samples, "groups", None)
        self.groups = [groups[index] for index in indices] if groups else None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Sample:
        return self.samples[self.indices[place]]

    def fingerprint(self) -> str:
        """Identity of the samples, of their order and of how often each is listed."""
        return hashlib.sha256(f"{self.samples.fingerprint()}\n{self.indices}".encode()).hexdigest()


def distinct(ids: Sequence[str]) -> list[str]:
    """The ids, where the second and later places of one have their number behind it."""
    counts: Counter[str] = Counter()
    found = []
    for sample_id in ids:
        counts[sample_id] += 1
        number = counts[sample_id]
        found.append(sample_id if number == 1 else f"{sample_id}#{number}")
    return found


def listed(samples: Samples, order: Sequence[int] | None) -> Samples:
    """The samples in this order; as they are where there is none."""
    return samples if order is None else Listed(samples, order)


class Stream(Dataset):
    """The sample at a place, with the key of its random draws."""

    def __init__(self, rows: Samples, seed: int) -> None:
        self.rows = rows
        self.seed = seed

    def __getitem__(self, place: Place) -> tuple[Sample, SampleKey]:
        index, epoch = place
        return self.rows[index], SampleKey(self.seed, epoch, self.rows.ids[index])

    def __len__(self) -> int:
        return len(self.rows)


class RankBatches(Sampler[list[Place]]):
    """This process's micro-batches, from optimizer step ``start`` on.

    The micro-batches of all processes are consecutive parts of a step, so their union is the same for any number.
    """

    def __init__(self, order: SampleOrder, start: int, batch_size: int, accelerator: Accelerator) -> None:
        self.order = order
        self.start = start
        self.batch_size = batch_size
        self.first = accelerator.process_index * batch_size
        self.stride = accelerator.num_processes * batch_size

    def __iter__(self) -> Iterator[list[Place]]:
        number = self.start
        while True:
            places = self.order.step(number)
            for first in range(self.first, len(places), self.stride):
                yield places[first : first + self.batch_size]
            number += 1


Collate = Callable[[list[Sample], list[SampleKey]], Batch]


def batches(stream: Stream, collate: Collate, order: RankBatches, num_workers: int) -> Generator[Batch]:
    """Endless collated micro-batches; the next ones are prepared while the network works. Close it after use."""

    def collate_with_ids(items: list[tuple[Sample, SampleKey]]) -> Batch:
        samples, keys = map(list, zip(*items, strict=True))
        batch = collate(samples, keys)
        batch["ids"] = list(map(attrgetter("sample_id"), keys))
        return batch

    loader = DataLoader(
        stream,
        batch_sampler=order,
        collate_fn=collate_with_ids,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_sigterm,
        pin_memory=torch.cuda.is_available(),
    )
    return (batch for batch in loader) if num_workers else ahead(iter(loader))


@dataclass(frozen=True)
class Failure:
    """What ended a loading thread."""

    error: BaseException


def ahead(source: Iterator[T], count: int = 2) -> Generator[T]:
    """Items of ``source``, which a thread takes up to ``count`` ahead of the caller. Its exceptions arrive in turn.

    Closing the generator ends the thread.
    """
    ready: queue.Queue[T | Failure] = queue.Queue(count)
    stop = threading.Event()

    def offer(item: T | Failure) -> bool:
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
                if not offer(item):
                    return
        except BaseException as error:
            offer(Failure(error))

    thread = threading.Thread(target=take, name="batches ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        while not ready.empty():  # the thread may be waiting for room
            ready.get()
        # A thread that is inside PyTorch or Arrow when the interpreter ends takes the whole process down.
        thread.join(timeout=60)

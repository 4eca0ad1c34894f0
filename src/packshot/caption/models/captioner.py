"""A captioner: something that writes captions for batches of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from packshot.config.schema import Constraint
from packshot.lists import column, pick, select

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

    from packshot.caption.models.adapter import Caption
    from packshot.dataset.rows import Rows

WriteBatch = Callable[[Sequence["Image"], Sequence["Image | None"], Constraint], list["Caption"]]


@dataclass(frozen=True)
class Captioner:
    """A model on this machine, or a server.

    write_batch: captions up to ``batch_size`` images under the constraint that it is given.
    at_once: how many batches it may be given at the same time, from as many threads.
    longest_side: px; larger pictures may be scaled down to it, because it sees no more. None: it wants them whole.
    """

    write_batch: WriteBatch
    batch_size: int
    constraint: Constraint = Constraint.none
    at_once: int = 1
    longest_side: int | None = None

    def write(self, images: Sequence[Image], masks: Sequence[Image | None]) -> list[Caption]:
        """One :class:`Caption` per image; RGB images of any sizes, masks white = product or None."""

        def write_part(start: int) -> list[Caption]:
            part = slice(start, start + self.batch_size)
            return self.write_batch(images[part], masks[part], self.constraint)

        starts = range(0, len(images), self.batch_size)
        if self.at_once == 1:
            return list(chain.from_iterable(map(write_part, starts)))
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(chain.from_iterable(pool.map(write_part, starts)))

    def caption(self, images: Sequence[Image], masks: Sequence[Image | None]) -> list[str]:
        """The texts of :meth:`write`."""
        return [caption.text for caption in self.write(images, masks)]

    def unconstrained(self) -> Captioner:
        """The same captioner, without a constraint."""
        return replace(self, constraint=Constraint.none)


def caption_rows(captioner: Captioner, rows: Rows, indices: Sequence[int], accelerator: Accelerator) -> list[Caption]:
    """Captions of some rows of a dataset, in the order of ``indices``. The processes share the work."""
    from accelerate.utils import gather_object

    mine = indices[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, Caption]] = []
    together = captioner.batch_size * captioner.at_once
    for start in range(0, len(mine), together):
        part = mine[start : start + together]
        samples = pick(rows, part)
        captions = captioner.write(column(samples, "image"), column(samples, "mask"))
        found += zip(part, captions, strict=True)
    by_index = dict(gather_object(found))
    return list(select(by_index, indices).values())

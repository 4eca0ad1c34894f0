"""A captioner: something that writes captions for batches of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """

    write_batch: WriteBatch
    batch_size: int
    constraint: Constraint = Constraint.none

    def write(self, images: Sequence[Image], masks: Sequence[Image | None]) -> list[Caption]:
        """One :class:`Caption` per image; RGB images of any sizes, masks white = product or None."""
        captions: list[Caption] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            captions += self.write_batch(images[part], masks[part], self.constraint)
        return captions

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
    for start in range(0, len(mine), captioner.batch_size):
        part = mine[start : start + captioner.batch_size]
        samples = pick(rows, part)
        captions = captioner.write(column(samples, "image"), column(samples, "mask"))
        found += zip(part, captions, strict=True)
    by_index = dict(gather_object(found))
    return list(select(by_index, indices).values())

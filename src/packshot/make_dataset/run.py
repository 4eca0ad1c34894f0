"""``build_data.py``: the data steps, and captions for the images that came without one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import pyarrow as pa

from packshot.caption.models.captioner import Captioner, identity, load_captioner
from packshot.config.schema import BuildData, CaptionerKind, DatasetKind
from packshot.imaging.decode import flatten
from packshot.make_dataset import steps as data
from packshot.pipeline import Outcome, Step
from packshot.pipeline.step import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

    from packshot.caption.data import CaptionedRow


def build(config: BuildData) -> None:
    """Build the dataset that ``config`` describes; see :func:`packshot.make_dataset.steps.build`."""
    wanted = config.captioner.kind is not CaptionerKind.none and config.dataset is not DatasetKind.rendered
    data.build(config, [caption_step(config)] if wanted else [])


def caption_step(config: BuildData) -> Step:
    """Writes ``text`` where the source had none. A changed prompt or model redoes it, and no step before it."""
    reads = ["image", "text", *(["mask"] if config.dataset is DatasetKind.product else [])]

    @cache
    def captioner() -> Captioner:  # loaded when the first image needs it: never, on finished work
        return load_captioner(config.model, config.captioner)

    named = identity(config.model, config.captioner)
    function = partial(_caption, captioner=captioner)
    schema = pa.schema([("text", pa.string())])
    return Step("caption", 1, named, schema, function, reads=tuple(reads), exclusive=True)


def _caption(samples: list[Sample], captioner: Callable[[], Captioner]) -> list[Outcome]:
    from packshot.caption.write import write_rows

    bare = {index: sample for index, sample in enumerate(samples) if not sample["text"]}
    pictures = {index: _pictures(sample) for index, sample in bare.items()}
    written = write_rows(pictures, captioner()) if bare else {}
    return [
        _outcome(written[index]) if index in written else Outcome({"text": sample["text"]})
        for index, sample in enumerate(samples)
    ]


def _pictures(sample: Sample) -> tuple[Image, Image | None]:
    mask = data.open_png(sample["mask"]).convert("L") if sample.get("mask") else None
    return flatten(data.open_png(sample["image"])), mask


def _outcome(row: CaptionedRow) -> Outcome:
    """An image without a usable caption stays, with the reason on record; training refuses empty captions."""
    if row.text is not None:
        return Outcome({"text": row.text})
    reason = "caption_names_product" if (row.error or "").startswith("names the product") else "no_caption"
    return Outcome({"text": ""}, reason, row.error)

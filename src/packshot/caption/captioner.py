"""Captioning images with whichever family the config names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packshot.config.schema import CaptionerConfig, CaptionerKind, ModelConfig
from packshot.core.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

    from packshot.caption.adapter import Adapter, Caption


def _florence2(model: ModelConfig, captioner: CaptionerConfig, trainable: bool) -> Adapter:
    from packshot.caption import florence2

    return florence2.load(model, captioner, trainable)


FAMILIES: dict[CaptionerKind, Callable[[ModelConfig, CaptionerConfig, bool], Adapter]] = {
    CaptionerKind.florence2: _florence2,
}


def load_adapter(model: ModelConfig, captioner: CaptionerConfig, trainable: bool = False) -> Adapter:
    """The family of ``captioner.kind`` with its weights.

    Raises:
        ConfigError: captioner=none, or weights that cannot be used.
    """
    if captioner.kind not in FAMILIES:
        raise ConfigError(f"captioner={captioner.kind} writes no captions.", f"Use {' | '.join(map(str, FAMILIES))}.")
    return FAMILIES[captioner.kind](model, captioner, trainable)


@dataclass(frozen=True)
class Captioner:
    """A loaded captioner on its device."""

    adapter: Adapter
    batch_size: int

    def write(self, images: Sequence[Image], masks: Sequence[Image | None]) -> list[Caption]:
        """One :class:`Caption` per image; RGB images of any sizes, masks white = product or None."""
        from packshot.caption.adapter import write

        captions: list[Caption] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            captions += write(self.adapter, images[part], masks[part])
        return captions

    def caption(self, images: Sequence[Image], masks: Sequence[Image | None]) -> list[str]:
        """The texts of :meth:`write`."""
        return [caption.text for caption in self.write(images, masks)]


def load_captioner(model: ModelConfig, captioner: CaptionerConfig) -> Captioner:
    """A captioner ready to write, on the GPU if there is one.

    Raises:
        ConfigError: as :func:`load_adapter`.
    """
    import torch

    adapter = load_adapter(model, captioner)
    adapter.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Captioner(adapter, captioner.batch_size)


def caption_rows(
    captioner: Captioner, rows: Sequence[dict[str, Any]], indices: Sequence[int], accelerator: Accelerator
) -> list[Caption]:
    """Captions of some rows of a dataset, in the order of ``indices``. The processes share the work."""
    from accelerate.utils import gather_object

    mine = indices[accelerator.process_index :: accelerator.num_processes]
    found: list[tuple[int, Caption]] = []
    for start in range(0, len(mine), captioner.batch_size):
        part = mine[start : start + captioner.batch_size]
        samples = [rows[index] for index in part]
        captions = captioner.write([s["image"] for s in samples], [s["mask"] for s in samples])
        found += zip(part, captions, strict=True)
    everything = dict(gather_object(found))
    return [everything[index] for index in indices]

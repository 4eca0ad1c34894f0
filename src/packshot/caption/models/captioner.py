"""Captioning images with whichever family the config names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from packshot.config.schema import CaptionerConfig, CaptionerKind, Constraint, ModelConfig
from packshot.errors import ConfigError
from packshot.runs.files import folder_hash, resolve

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

    from packshot.caption.models.adapter import Adapter, Caption


def _florence2(model: ModelConfig, captioner: CaptionerConfig, trainable: bool) -> Adapter:
    from packshot.caption.models import florence2

    return florence2.load(model, captioner, trainable)


def _llama32_vision(model: ModelConfig, captioner: CaptionerConfig, trainable: bool) -> Adapter:
    from packshot.caption.models import mllama

    return mllama.load(model, captioner, trainable)


FAMILIES: dict[CaptionerKind, Callable[[ModelConfig, CaptionerConfig, bool], Adapter]] = {
    CaptionerKind.florence2: _florence2,
    CaptionerKind.llama32_vision: _llama32_vision,
}


def load_adapter(model: ModelConfig, captioner: CaptionerConfig, trainable: bool = False) -> Adapter:
    """The family of ``captioner.kind`` with its weights.

    Raises:
        ConfigError: captioner is none or endpoint, or weights that cannot be used.
    """
    if captioner.kind not in FAMILIES:
        raise ConfigError(
            f"captioner={captioner.kind} has no weights here.", f"Use captioner={' | '.join(map(str, FAMILIES))}."
        )
    return FAMILIES[captioner.kind](model, captioner, trainable)


def base_of(model: ModelConfig, captioner: CaptionerConfig) -> str | None:
    """What the config names as the base of its captioner: folder or hub id, an endpoint's model, None for none."""
    return {
        CaptionerKind.none: None,
        CaptionerKind.florence2: model.florence2,
        CaptionerKind.llama32_vision: model.llama32_vision,
        CaptionerKind.endpoint: f"{captioner.endpoint} {captioner.endpoint_model}",
    }[captioner.kind]


def identity(model: ModelConfig, captioner: CaptionerConfig) -> dict[str, Any]:
    """Everything that a caption depends on besides its image: weights by content, and the settings that write it."""
    base = base_of(model, captioner)
    weights = resolve(captioner.adapter or base or "")
    keys = ("prompt", "product", "quantization", "dtype", "constraint", "max_new_tokens")
    return {
        "kind": str(captioner.kind),
        "base": base,
        "weights": folder_hash(weights) if weights.is_dir() else str(weights),
        **{key: str(getattr(captioner, key)) for key in keys},
    }


WriteBatch = Callable[[Sequence["Image"], Sequence["Image | None"], Constraint], list["Caption"]]


@dataclass(frozen=True)
class Captioner:
    """Something that captions batches: a model on this machine, or a server.

    write_batch: captions up to ``batch_size`` images, held to the constraint it is given.
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


def writing(adapter: Adapter, captioner: CaptionerConfig) -> Captioner:
    """The captioner that writes with ``adapter``, with its weights as they are at the time."""
    from packshot.caption.decoding import write

    return Captioner(partial(write, adapter), captioner.batch_size, captioner.constraint)


def unconstrained(captioner: Captioner) -> Captioner:
    """The same captioner, free to write what it likes."""
    return replace(captioner, constraint=Constraint.none)


def load_captioner(model: ModelConfig, captioner: CaptionerConfig) -> Captioner:
    """A captioner ready to write, on the GPU if there is one, or at ``captioner.endpoint``.

    Raises:
        ConfigError: as :func:`load_adapter`.
    """
    if captioner.kind is CaptionerKind.endpoint:
        from packshot.caption.models.endpoint import connect

        return connect(captioner)
    return writing(ready_adapter(model, captioner), captioner)


def ready_adapter(model: ModelConfig, captioner: CaptionerConfig) -> Adapter:
    """:func:`load_adapter` to write with: in eval mode, on the GPU of this process if there is one."""
    adapter = load_adapter(model, captioner)
    adapter.model.to(own_device()).eval()
    return adapter


def own_device() -> str:
    """The GPU that launchers mean for this process, or the CPU.

    Captioners are loaded before the processes of a run know each other, so nobody has set the current device yet: a
    bare "cuda" would put all of them on the first.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


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

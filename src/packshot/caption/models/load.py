"""Loading the captioner that the config names, by the row of its family."""

from __future__ import annotations

import pkgutil
from functools import partial
from typing import TYPE_CHECKING

from packshot.base.device import own_device
from packshot.caption.models.captioner import Captioner
from packshot.config.captioners import CAPTIONERS
from packshot.config.schema import CaptionerConfig, ModelConfig
from packshot.errors import ConfigError
from packshot.lists import attributes, map_values
from packshot.runs.files import folder_hash, resolve

if TYPE_CHECKING:
    from packshot.caption.models.adapter import Adapter

WRITTEN_BY = ("prompt", "product", "quantization", "dtype", "constraint", "max_new_tokens")  # keys a caption depends on


def load_adapter(model: ModelConfig, captioner: CaptionerConfig, trainable: bool = False) -> Adapter:
    """The model of ``captioner.kind`` with its weights, on the CPU.

    Raises:
        ConfigError: the family has no weights here, or they cannot be used.
    """
    family = CAPTIONERS[captioner.kind.name]
    if not family.adapter:
        local = [row.name for row in CAPTIONERS.values() if row.adapter]
        raise ConfigError(f"captioner={family.name} has no weights here.", f"Use captioner={' | '.join(local)}.")
    return pkgutil.resolve_name(family.adapter)(model, captioner, trainable)


def load_captioner(model: ModelConfig, captioner: CaptionerConfig) -> Captioner:
    """A captioner ready to write, on the GPU if there is one, or at ``captioner.endpoint``.

    Raises:
        ConfigError: as :func:`load_adapter`.
    """
    family = CAPTIONERS[captioner.kind.name]
    if family.connect:
        return pkgutil.resolve_name(family.connect)(captioner)
    return writing(ready_adapter(model, captioner), captioner)


def ready_adapter(model: ModelConfig, captioner: CaptionerConfig) -> Adapter:
    """:func:`load_adapter` for writing: in eval mode, on the GPU of this process if there is one."""
    adapter = load_adapter(model, captioner)
    adapter.model.to(own_device()).eval()
    return adapter


def writing(adapter: Adapter, captioner: CaptionerConfig) -> Captioner:
    """The captioner that writes with ``adapter``, with its weights as they are at the time."""
    from packshot.caption.decoding import write

    return Captioner(partial(write, adapter), captioner.batch_size, captioner.constraint)


def base_of(model: ModelConfig, captioner: CaptionerConfig) -> str:
    """What the config names as the captioner's base: a folder or hub id, or a server and its model; "" for none."""
    family = CAPTIONERS[captioner.kind.name]
    if family.weights:
        return getattr(model, family.name)
    return " ".join(map(str, attributes(captioner, family.needs).values()))


def identity(model: ModelConfig, captioner: CaptionerConfig) -> dict[str, str]:
    """All that a caption depends on, apart from its image: weights by content, and the settings that write it."""
    base = base_of(model, captioner)
    weights = resolve(captioner.adapter or base)
    content = folder_hash(weights) if weights.is_dir() else str(weights)
    settings = map_values(str, attributes(captioner, WRITTEN_BY))
    return {"kind": captioner.kind.name, "base": base, "weights": content, **settings}

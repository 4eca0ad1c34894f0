"""SDXL's parts: which there are, and where a model config says that each lies.

The families ``mini`` and ``sdxl`` differ in these places and in nothing else.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packshot.config.schema import ModelConfig
from packshot.errors import ConfigError
from packshot.runs.files import resolve


@dataclass(frozen=True)
class PartKind:
    """A kind of part.

    library, cls: the class that loads it. needs: a file that its folder must have. network: whether it has weights.
    reference: whether it reads reference images; SDXL's own repository has no such part.
    """

    library: str
    cls: str
    needs: str = "config.json"
    network: bool = True
    reference: bool = False


PARTS: dict[str, PartKind] = {
    "vae": PartKind("diffusers", "AutoencoderKL"),
    "text_encoder": PartKind("transformers", "CLIPTextModel"),
    "text_encoder_2": PartKind("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": PartKind("transformers", "CLIPTokenizer", "*.json", network=False),
    "tokenizer_2": PartKind("transformers", "CLIPTokenizer", "*.json", network=False),
    "unet": PartKind("diffusers", "UNet2DConditionModel"),
    "scheduler": PartKind("diffusers", "EulerDiscreteScheduler", "scheduler_config.json", network=False),
    "image_encoder": PartKind("transformers", "CLIPVisionModelWithProjection", reference=True),
    "feature_extractor": PartKind(
        "transformers", "CLIPImageProcessor", "preprocessor_config.json", network=False, reference=True
    ),
}
NETWORKS = {name for name, kind in PARTS.items() if kind.network}
AT_ONCE = ("unet", "scheduler")  # every stage begins with these two
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Source:
    """Where one part comes from.

    key: the config key that names ``place``, a local folder or a hub id. subfolder: of the part inside ``place``.
    """

    key: str
    place: str
    subfolder: str | None
    kind: PartKind

    @property
    def folder(self) -> Path | None:
        """The part's own folder when it is local."""
        place = Path(self.place)
        return place / (self.subfolder or "") if place.is_dir() else None

    @property
    def found(self) -> bool:
        """False if the part is known to be missing. A part on the hub is assumed to exist."""
        return self.folder is None or any(self.folder.glob(self.kind.needs))

    def config(self) -> Mapping[str, Any]:
        """The part's configuration file; empty if the part is not local."""
        return json.loads((self.folder / self.kind.needs).read_text()) if self.folder else {}

    def files(self) -> list[Path]:
        """The configuration and the weights that the libraries choose, without variants; [] if not local."""
        if self.folder is None:
            return []
        inside = sorted(file for file in self.folder.iterdir() if file.is_file())
        weights = [file for file in inside if _WEIGHTS.fullmatch(file.name)]
        if not weights:
            return inside
        return [self.folder / self.kind.needs, *weights]

    def refused(self, reason: str) -> ConfigError:
        """The error for a part that cannot be loaded."""
        place = f"{self.place}/{self.subfolder}" if self.subfolder else self.place
        return ConfigError(
            f"{self.key}: {place} holds no {self.kind.cls} that can be loaded ({reason}).",
            "Give a complete local folder, or a hub id on a machine that reaches the hub.",
        )

    def load(self) -> object:
        """The part on the CPU; a network is in fp32, frozen and in eval mode.

        Raises:
            ConfigError: it cannot be loaded; names the key.
        """
        arguments: dict[str, Any] = {"subfolder": self.subfolder} if self.subfolder else {}
        if self.kind.network:
            dtype_name = "torch_dtype" if self.kind.library == "diffusers" else "dtype"
            arguments[dtype_name] = torch.float32
        try:
            part = pkgutil.resolve_name(f"{self.kind.library}:{self.kind.cls}").from_pretrained(self.place, **arguments)
        except (OSError, ValueError) as error:
            raise self.refused(str(error).strip().splitlines()[0]) from error
        return part.requires_grad_(False).eval() if self.kind.network else part


def find_place(key: str, value: str) -> str:
    """A local folder as an absolute path, or a hub id as it is.

    Raises:
        ConfigError: the value names neither.
    """
    path = resolve(value)
    if path.exists():
        return str(path)
    if value.startswith((".", "/", "data/", "outputs/")) or value.count("/") != 1:
        raise ConfigError(f"{key}={value}: no such folder.", "Give a model folder or a hub id (owner/name).")
    return value


def find_sources(model: ModelConfig) -> dict[str, Source]:
    """The source of every part of a model config, by the part's name.

    Raises:
        ConfigError: a key names neither a folder nor a hub id, or a local folder lacks a part.
    """
    base = find_place("model.base", model.base)
    encoder = find_place("model.image_encoder", model.image_encoder) if model.image_encoder else None
    sources: dict[str, Source] = {}
    for name, kind in PARTS.items():
        if name == "vae" and model.vae:
            source = Source("model.vae", find_place("model.vae", model.vae), None, kind)
        elif kind.reference and encoder:
            source = Source("model.image_encoder", encoder, None, kind)
        else:
            source = Source("model.image_encoder" if kind.reference else "model.base", base, name, kind)
        if not source.found and (encoder or not kind.reference):
            raise source.refused(f"no {kind.needs}")
        sources[name] = source
    return sources

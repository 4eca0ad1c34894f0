"""SDXL's parts: which there are, and where each lies by the model config.

The families ``mini`` and ``sdxl`` differ in these places and in nothing else.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from packshot.base import single_file
from packshot.base.places import Place, choose_weights, find_place
from packshot.config.schema import ModelConfig
from packshot.errors import ConfigError, first_line
from packshot.lists import ending
from packshot.runs.files import file_sha256
from packshot.runs.networks import CLIP_REST, load_whole

Loader: TypeAlias = Any  # a class of diffusers or transformers, by its name
Part: TypeAlias = Any  # what it loads


@dataclass(frozen=True)
class PartKind:
    """A kind of part.

    library, cls: the class that loads it. config: the file that describes it. network: whether it has weights.
    reference: whether it reads reference images; SDXL's own repository has no such part. rest: see ``load_whole``.
    """

    library: str
    cls: str
    config: str = "config.json"
    network: bool = True
    reference: bool = False
    rest: tuple[str, ...] = ()

    def loader(self, name: str | None = None) -> Loader:
        """The class, or another one of the same library."""
        return pkgutil.resolve_name(f"{self.library}:{name or self.cls}")


PARTS: dict[str, PartKind] = {
    "vae": PartKind("diffusers", "AutoencoderKL"),
    "text_encoder": PartKind("transformers", "CLIPTextModel", rest=CLIP_REST),
    "text_encoder_2": PartKind("transformers", "CLIPTextModelWithProjection", rest=CLIP_REST),
    "tokenizer": PartKind("transformers", "CLIPTokenizer", "tokenizer_config.json", network=False),
    "tokenizer_2": PartKind("transformers", "CLIPTokenizer", "tokenizer_config.json", network=False),
    "unet": PartKind("diffusers", "UNet2DConditionModel"),
    "scheduler": PartKind("diffusers", "EulerDiscreteScheduler", "scheduler_config.json", network=False),
    "image_encoder": PartKind("transformers", "CLIPVisionModelWithProjection", reference=True, rest=CLIP_REST),
    "feature_extractor": PartKind(
        "transformers", "CLIPImageProcessor", "preprocessor_config.json", network=False, reference=True
    ),
}
NETWORKS = {name for name, kind in PARTS.items() if kind.network}
AT_ONCE = ("unet", "scheduler")  # every stage begins with these two


@dataclass(frozen=True)
class Source:
    """Where one part comes from.

    name: of the part. place: its own folder or file, or the file of the whole base. variant: ``model.variant``.
    configs: the pipeline folder that describes parts which lie in a file; None: they have SDXL's shapes.
    """

    name: str
    place: Place
    kind: PartKind
    variant: str | None = None
    configs: Place | None = None

    @property
    def key(self) -> str:
        """The config key that names the place."""
        return self.place.key

    @property
    def folder(self) -> Path | None:
        """The part's own folder when it is local."""
        path = self.place.path
        return path if path is not None and path.is_dir() else None

    @property
    def found(self) -> bool:
        """False if the part is known to be missing. A part on the hub is assumed to exist."""
        if self.place.is_file or self.place.path is None:
            return True
        wanted = [self.kind.config]
        if self.name == "feature_extractor":  # published encoders come without one: it follows from the encoder
            wanted.append("config.json")
        return any(map(Path.is_file, map(self.place.path.joinpath, wanted)))

    def config(self) -> Mapping[str, Any]:
        """The part's configuration file; empty if the part is on the hub or lies in a file."""
        return json.loads((self.folder / self.kind.config).read_text()) if self.folder else {}

    def digest(self) -> str | None:
        """Digest of the configuration and the weights, which are not loaded for it.

        None for what a file does not hold: tokenizers, the scheduler, the feature extractor.
        """
        if not self.place.is_file:
            return "".join(map(file_sha256, self.files()))
        return single_file.digest(self.name, self.place, self.configs) if self.kind.network else None

    def files(self) -> list[Path]:
        """The configuration and the weights that are loaded from a folder."""
        names = self.place.names()
        _, weights = choose_weights(names, self.variant)
        wanted = [self.kind.config, *weights] if weights else names
        folder = self.place.fetch(wanted)
        return list(map(folder.joinpath, wanted))

    def refused(self, reason: str) -> ConfigError:
        """The error for a part that cannot be loaded."""
        place = self.place.path or self.place.value
        return ConfigError(
            f"{self.key}: {place} holds no {self.kind.cls} that can be loaded ({reason}).",
            "Give a pipeline folder, an SDXL checkpoint in one file, or a hub id: owner/name[/folder][@revision].",
        )

    def load(self, dtype: torch.dtype = torch.float32) -> object:
        """The part on the CPU; a network is in ``dtype``, frozen and in eval mode.

        Raises:
            ConfigError: it cannot be loaded; names the key.
        """
        try:
            part = self._from_file(dtype) if self.place.is_file else self._from_folder(dtype)
        except (OSError, TypeError, ValueError) as error:  # TypeError: a config is JSON of another kind
            raise self.refused(first_line(error)) from error
        return part.requires_grad_(False).eval() if self.kind.network else part

    def _from_folder(self, dtype: torch.dtype) -> Part:
        names = self.place.names()
        if self.name == "feature_extractor" and self.kind.config not in names:
            return self._plain_feature_extractor()
        variant, weights = choose_weights(names, self.variant)
        folder = self.place.fetch([*ending(names, ".json", ".txt"), *weights])
        arguments: dict[str, object] = {"local_files_only": True}
        cls = self.kind.loader()
        if self.kind.network:
            arguments["torch_dtype" if self.kind.library == "diffusers" else "dtype"] = dtype
            arguments["variant"] = variant
            if weights and not ending(weights, ".safetensors"):  # else diffusers reports an error before it reads them
                arguments["use_safetensors"] = False
            return load_whole(cls, folder, self.kind.rest, **arguments)
        if self.name == "scheduler":
            cls = self._scheduler_class(json.loads((folder / self.kind.config).read_text()))
        return cls.from_pretrained(folder, **arguments)

    def _scheduler_class(self, config: Mapping[str, object]) -> Loader:
        """The class that the base's own config names."""
        name = str(config.get("_class_name", self.kind.cls))
        try:
            return self.kind.loader(name)
        except (AttributeError, ImportError) as error:
            raise self.refused(f"diffusers has no scheduler {name}") from error

    def _from_file(self, dtype: torch.dtype) -> Part:
        if self.name in single_file.TOKENIZERS:
            return single_file.load_tokenizer(self.name)
        if self.name == "scheduler":
            folder = single_file.config_folder(self.place, self.configs) / self.name
            return self._scheduler_class(json.loads((folder / self.kind.config).read_text())).from_pretrained(folder)
        if self.name == "feature_extractor":
            return self._plain_feature_extractor()
        if self.key == "model.base":
            return single_file.load_network(self.kind.loader(), self.name, self.place, self.configs, dtype)
        return single_file.load_part(self.kind.loader(), self.name, self.place, self.configs, dtype)

    def _plain_feature_extractor(self) -> Part:
        """CLIP's own preparation of pictures, for encoders that come without a file about it, as published ones do."""
        side = single_file.vision_side(self.place, self.configs)
        return self.kind.loader()(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def find_sources(model: ModelConfig) -> dict[str, Source]:
    """The source of every part of a model config, by the part's name.

    Raises:
        ConfigError: a key names neither a file, a folder nor a hub id, or a local folder lacks a part.
    """
    base = find_place("model.base", model.base)
    encoder = find_place("model.image_encoder", model.image_encoder) if model.image_encoder else None
    vae = find_place("model.vae", model.vae) if model.vae else None
    configs = find_place("model.config", model.config) if model.config else None
    if configs is None and not base.is_file:
        configs = base  # a VAE or image encoder in a file has the shapes of the one that it replaces
    sources: dict[str, Source] = {}
    for name, kind in PARTS.items():
        if name == "vae" and vae:
            place = vae if vae.is_file else own_folder(vae, "vae", kind)
        elif kind.reference:
            place = encoder or base.below(name)
            place = Place(
                "model.image_encoder", place.value, place.path, place.repository, place.inside, place.revision
            )
        else:
            place = base if base.is_file else base.below(name)
        source = Source(name, place, kind, model.variant, configs)
        if not source.found and (encoder or not kind.reference):
            raise source.refused(f"no {kind.config}")
        sources[name] = source
    return sources


def own_folder(place: Place, part: str, kind: PartKind) -> Place:
    """The folder of a part, also where a whole pipeline is named for it."""
    if place.path is not None and not (place.path / kind.config).is_file() and (place.path / part).is_dir():
        return place.below(part)
    return place

"""Loading SDXL's parts, each when it is first needed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch

from packshot.base.lora_files import merge_loras
from packshot.base.quantize import move_quantized, quantize
from packshot.base.sdxl import AT_ONCE, NETWORKS, PARTS, Source, find_sources
from packshot.base.single_file import tensor_shapes
from packshot.config.schema import ModelConfig, Quantization
from packshot.diffusion.latents import LatentScale
from packshot.runs.files import folder_hash, resolve

if TYPE_CHECKING:  # a run imports only the classes of the parts that it loads
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

_LOADING = threading.RLock()  # validation and the thread that prepares batches may ask for the same part


@dataclass(repr=False)
class Parts:
    """Everything that SDXL consists of, named as in its pipeline. Networks are frozen and in eval mode.

    Parts of :meth:`lazily` are loaded when they are first used: a LoRA needs no image encoder, and no encoder at all
    if what it reads has been encoded. A part that is set to None is freed.
    """

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: EulerDiscreteScheduler
    image_encoder: CLIPVisionModelWithProjection
    feature_extractor: CLIPImageProcessor

    def __post_init__(self) -> None:
        self._sources: dict[str, Source] = {}
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._loading_dtype = torch.float32

    @classmethod
    def lazily(cls, sources: dict[str, Source], dtype: torch.dtype = torch.float32) -> Parts:
        """Parts of which none is loaded yet. dtype: that networks are loaded in until :meth:`to` is called."""
        parts = cls.__new__(cls)
        parts.__post_init__()
        parts._sources = sources
        parts._loading_dtype = dtype
        return parts

    def __getattr__(self, name: str) -> object:
        """Load a part at its first use. Raises ConfigError if it cannot be loaded."""
        source = vars(self).get("_sources", {}).get(name)
        if source is None:
            raise AttributeError(f"Parts has no {name!r}")
        with _LOADING:
            if name not in vars(self):
                setattr(self, name, self._placed(name, source.load(self._dtype(name))))
            return vars(self)[name]

    def load(self, *names: str) -> None:
        """Load these parts now. Raises ConfigError if one cannot be loaded."""
        for name in names:
            getattr(self, name)

    def loaded(self) -> set[str]:
        """Names of the parts that are in memory."""
        return {field.name for field in fields(self) if vars(self).get(field.name) is not None}

    def pipeline_components(self, references: bool = True) -> dict[str, Any]:
        """Keyword arguments for the stock SDXL pipelines, without optional parts that the base does not have.

        references: include the parts that read reference images.
        """
        components: dict[str, Any] = {}
        for name, kind in PARTS.items():
            wanted = references or not kind.reference
            if wanted and (name in vars(self) or self._sources[name].found):
                components[name] = getattr(self, name)
        return components

    def vae_config(self, key: str) -> Any:
        """An entry of the VAE's configuration, from its file as long as the VAE is not loaded."""
        written = self._vae_file()
        return written[key] if key in written else getattr(self.vae.config, key)

    def latent_scale(self) -> LatentScale:
        """The VAE's, from its file as long as the VAE is not loaded."""
        written = self._vae_file()
        return LatentScale.of(written if "scaling_factor" in written else self.vae.config)

    def _vae_file(self) -> Mapping[str, Any]:
        source = self._sources.get("vae")
        return source.config() if source and "vae" not in vars(self) else {}

    def identity(self, *names: str) -> str:
        """Digest of these parts: their files, or their contents where there are none, and the dtype of networks."""
        digest = hashlib.sha256()
        for name in names:
            source = self._sources.get(name)
            content = source.digest() if source else None
            digest.update((content or part_hash(getattr(self, name))).encode())
            if name in NETWORKS:
                digest.update(str(self._dtype(name)).encode())
        return digest.hexdigest()

    def changed(self, *names: str) -> None:
        """These parts are no longer what their files hold: from now on their identity is that of their contents."""
        for name in names:
            getattr(self, name)
            self._sources.pop(name, None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Move all networks, those not yet loaded when they are. All but the VAE, which stays fp32, take ``dtype``."""
        self._place = (device, dtype)
        for name in NETWORKS & self.loaded():
            self._placed(name, getattr(self, name))
        return self

    def _dtype(self, name: str) -> torch.dtype:
        if name == "vae":  # SDXL's overflows in fp16
            return torch.float32
        return self._place[1] if self._place else self._loading_dtype

    def _placed(self, name: str, part: object) -> object:
        if self._place is not None and isinstance(part, torch.nn.Module):
            part.to(device=self._place[0], dtype=self._dtype(name))
            if name == "unet":
                move_quantized(part, *self._place)
        return part


def load_parts(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Parts:
    """The parts that a model config names, on the CPU: UNet and scheduler at once, the others at first use.

    ``model.loras`` are merged into them. The UNet is quantised if the config asks for it. A local folder is checked for
    completeness at once.

    dtype: of the networks but the VAE. Loading them in that of the forward pass halves the memory of every process.

    Raises:
        ConfigError: a folder or hub id cannot be loaded, or the UNet not quantised; names the key.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Their progress bars and remarks on loading would bury our own lines.
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    parts = Parts.lazily(find_sources(model), dtype)
    parts.load(*AT_ONCE)
    merge_loras(parts, model.loras, model.merged_loras())
    if model.quantization is not Quantization.none:
        # The linear layers of the transformers; convolutions stay as they are.
        quantize(parts.unet, model.quantization, "model.quantization", lambda name: "attentions." in name)
        parts.unet.eval()
    return parts


def trained_scheduler(
    scheduler: EulerDiscreteScheduler, prediction_type: str | None, zero_terminal_snr: bool
) -> EulerDiscreteScheduler:
    """The base's scheduler, changed for a network that was trained to predict something else or on another schedule.

    prediction_type: None for the base's own. zero_terminal_snr: betas rescaled, and the last step taken (Lin et al.
    2023, arXiv 2305.08891, sections 3.1 and 3.3); False leaves the base's schedule.
    """
    changes: dict[str, Any] = {}
    if prediction_type:
        changes["prediction_type"] = prediction_type
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return cast("EulerDiscreteScheduler", scheduler.from_config(scheduler.config, **changes))


def model_folder(model: ModelConfig) -> Path | None:
    """The base's folder or file when it is local (for hashes in certificates and cards), else None."""
    path = resolve(model.base)
    return path if path.exists() else None


def hint_of_failure(place: Path) -> str:
    """What to do about weights that do not load: a damaged file is named, otherwise they may be of another model."""
    files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
    for file in files:
        if file.suffix != ".safetensors" or not file.is_file():
            continue
        try:
            tensor_shapes(file)
        except (OSError, ValueError) as error:
            return f"{file}: {error}. Copy or export it again."
    return "Was it trained on another model?"


def weights_hash(*modules: torch.nn.Module) -> str:
    """Digest of parameters and buffers: the identity of a model in cache keys, independent of the file it came from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(str(tensor.dtype).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def part_hash(part: Any) -> str:
    """Digest of a part's content; tokenizers and feature extractors are hashed as their library writes them."""
    if isinstance(part, torch.nn.Module):
        return weights_hash(part)
    with TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        return folder_hash(Path(folder))

"""Loading SDXL's parts. ``mini`` and ``sdxl`` differ in the paths of the config and in nothing else."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from packshot.config.schema import ModelConfig, Quantization
from packshot.diffusion.latents import LatentScale
from packshot.errors import ConfigError
from packshot.runs.files import file_sha256, folder_hash, resolve


def _class(library: str, name: str) -> Any:
    return getattr(import_module(library), name)


_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Source:
    """Where a part comes from, and what it is.

    key: the config key that names ``place``, a local folder or a hub id. needs: a file that the part's folder must
    have. network: whether it has weights.
    """

    key: str
    place: str
    subfolder: str | None
    library: str
    cls: str
    needs: str
    network: bool

    @property
    def folder(self) -> Path | None:
        """The part's own folder when it is local."""
        place = Path(self.place)
        return place / (self.subfolder or "") if place.is_dir() else None

    @property
    def found(self) -> bool:
        """False if it is known to be missing. What lies on the hub is taken to be there."""
        return self.folder is None or any(self.folder.glob(self.needs))

    def config(self) -> Mapping[str, Any]:
        """What the part's file says of its shape; empty if it is not local."""
        return json.loads((self.folder / self.needs).read_text()) if self.folder else {}

    def files(self) -> list[Path]:
        """Configuration and weights as the libraries choose them, without variants of other dtypes; [] if not local."""
        inside = sorted(file for file in self.folder.iterdir() if file.is_file()) if self.folder else []
        weights = [file for file in inside if _WEIGHTS.fullmatch(file.name)]
        return [file for file in inside if file.name == self.needs] + weights if weights else inside

    def refused(self, reason: str) -> ConfigError:
        """The error of a part that cannot be had."""
        where = f"{self.place}/{self.subfolder}" if self.subfolder else self.place
        return ConfigError(
            f"{self.key}: {where} holds no {self.cls} that can be loaded ({reason}).",
            "Give a complete local folder, or a hub id on a machine that reaches the hub.",
        )

    def load(self) -> Any:
        """The part on the CPU; networks in fp32, frozen, in eval mode.

        Raises:
            ConfigError: it cannot be loaded; names the key.
        """
        arguments: dict[str, Any] = {"subfolder": self.subfolder} if self.subfolder else {}
        if self.network:
            arguments["torch_dtype" if self.library == "diffusers" else "dtype"] = torch.float32
        try:
            part = _class(self.library, self.cls).from_pretrained(self.place, **arguments)
        except (OSError, ValueError) as error:
            raise self.refused(str(error).strip().splitlines()[0]) from error
        return part.requires_grad_(False).eval() if self.network else part


_LOADING = threading.RLock()  # validation and the thread that prepares batches may ask for the same part


@dataclass(repr=False)
class Parts:
    """Everything SDXL consists of, named as in its pipeline. All frozen and in eval mode.

    Parts of :meth:`lazily` are loaded when they are first asked for: a LoRA needs no image encoder, and no encoder at
    all if what it reads has been encoded. A part that is set to None is given up.

    Typed Any because the libraries' annotations call every model config a dict and every output a tuple.
    """

    vae: Any  # AutoencoderKL
    text_encoder: Any  # CLIPTextModel
    text_encoder_2: Any  # CLIPTextModelWithProjection
    tokenizer: Any  # CLIPTokenizer
    tokenizer_2: Any  # CLIPTokenizer
    unet: Any  # UNet2DConditionModel
    scheduler: Any  # EulerDiscreteScheduler
    image_encoder: Any  # CLIPVisionModelWithProjection
    feature_extractor: Any  # CLIPImageProcessor

    def __post_init__(self) -> None:
        self._sources: dict[str, Source] = {}
        self._place: tuple[torch.device, torch.dtype] | None = None

    @classmethod
    def lazily(cls, sources: dict[str, Source]) -> Parts:
        """Parts of which none is loaded yet."""
        parts = cls.__new__(cls)
        parts.__post_init__()
        parts._sources = sources
        return parts

    def __getattr__(self, name: str) -> Any:
        """Load a part at its first use. Raises ConfigError if it cannot be."""
        source = vars(self).get("_sources", {}).get(name)
        if source is None:
            raise AttributeError(f"Parts has no {name!r}")
        with _LOADING:
            if name not in vars(self):
                setattr(self, name, self._placed(name, source.load()))
            return vars(self)[name]

    def load(self, *names: str) -> None:
        """Load these parts now. Raises ConfigError if one cannot be."""
        for name in names:
            getattr(self, name)

    def loaded(self) -> set[str]:
        """Names of the parts that are in memory."""
        return {field.name for field in fields(self) if vars(self).get(field.name) is not None}

    def pipeline_components(self, references: bool = True) -> dict[str, Any]:
        """Keyword arguments for the stock SDXL pipelines; without parts they can do without and the base has not.

        references: with what reads reference images, if there is such a part.
        """
        names = [field.name for field in fields(self) if references or field.name not in _REFERENCE]
        return {name: getattr(self, name) for name in names if name in vars(self) or self._sources[name].found}

    def vae_config(self, key: str) -> Any:
        """An entry of the VAE's configuration, from its file as long as it is not loaded."""
        written = self._vae_file()
        return written[key] if key in written else getattr(self.vae.config, key)

    def latent_scale(self) -> LatentScale:
        """The VAE's, from its file as long as it is not loaded."""
        written = self._vae_file()
        return LatentScale.of(written if "scaling_factor" in written else self.vae.config)

    def _vae_file(self) -> Mapping[str, Any]:
        source = self._sources.get("vae")
        return source.config() if source and "vae" not in vars(self) else {}

    def identity(self, *names: str) -> str:
        """Digest of parts, by their files or, where there are none, contents; and of the dtype networks compute in."""
        digest = hashlib.sha256()
        for name in names:
            source = self._sources.get(name)
            files = source.files() if source else []
            content = weights_hash if name in NETWORKS else _written_hash
            digest.update(("".join(map(file_sha256, files)) or content(getattr(self, name))).encode())
            if name in NETWORKS:
                digest.update(str(self._dtype(name)).encode())
        return digest.hexdigest()

    def to(self, device: torch.device, dtype: torch.dtype) -> Parts:
        """Move all models, those not yet loaded when they are; UNet and encoders take ``dtype``, the VAE stays fp32."""
        self._place = (device, dtype)
        for name in NETWORKS & self.loaded():
            self._placed(name, getattr(self, name))
        return self

    def _dtype(self, name: str) -> torch.dtype:
        # SDXL's VAE overflows in fp16
        return self._place[1] if self._place and name != "vae" else torch.float32

    def _placed(self, name: str, part: Any) -> Any:
        if self._place is None or name not in NETWORKS:
            return part
        part.to(device=self._place[0], dtype=self._dtype(name))
        if name == "unet":
            _settle(part, *self._place)
        return part


def _source(key: str, value: str) -> str:
    """A local folder as an absolute path, or a hub id as it is."""
    path = resolve(value)
    if path.exists():
        return str(path)
    if value.startswith((".", "/", "data/", "outputs/")) or value.count("/") != 1:
        raise ConfigError(f"{key}={value}: no such folder.", "Give a model folder or a hub id (owner/name).")
    return value


def trained_scheduler(scheduler: Any, prediction_type: str | None, zero_terminal_snr: bool) -> Any:
    """A base's scheduler as a network samples that was trained to predict something else, or on another schedule.

    prediction_type: None for the base's own. zero_terminal_snr: betas rescaled, and the last step taken (Lin et al.
    2023, arXiv 2305.08891, sections 3.1 and 3.3); False leaves the base's schedule.
    """
    changes: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type else {}
    if zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return type(scheduler).from_config(scheduler.config, **changes)


def _nf4(linear: torch.nn.Linear) -> torch.nn.Module:
    """Four-bit normal floats in blocks of 64 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    make: Any = Params4bit  # checkers take its signature for a tensor's
    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, quant_type="nf4")
    weight = make(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = weight.to(linear.weight.device)
    # On CPUs with AVX-512 BF16 it would repack its weights at the first evaluation, for a kernel without a gradient,
    # and fail where a row is no whole number of blocks.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _int8(linear: torch.nn.Linear) -> torch.nn.Module:
    """A byte per weight, activations beyond 6 kept whole (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339)."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    make: Any = Int8Params  # checkers take its signature for a tensor's
    with torch.device("meta"):
        layer = Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
    weight = make(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to(linear.weight.device)
    return layer


QUANTIZERS: dict[Quantization, Callable[[torch.nn.Linear], torch.nn.Module]] = {
    Quantization.nf4: _nf4,
    Quantization.int8: _int8,
}


def quantize(network: torch.nn.Module, quantization: Quantization, key: str, chosen: Callable[[str], bool]) -> None:
    """Replace those linear layers of a frozen network whose names are ``chosen``, where they stand.

    diffusers' ``BitsAndBytesConfig`` would do it while loading, but refuses machines without a GPU.

    Raises:
        ConfigError: bitsandbytes cannot do it on this machine.
    """
    # it says at every layer and step that inputs are cast
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    linears = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear) and chosen(name)}
    try:
        for name, linear in linears.items():
            layer: Any = QUANTIZERS[quantization](linear)
            layer.bias = linear.bias
            network.set_submodule(name, layer)
    except (ImportError, RuntimeError, NotImplementedError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{key}={quantization} does not work on this machine ({reason}).",
            f"Set {key}=none.",
        ) from error


def _settle(unet: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """What bitsandbytes' layers keep besides their parameters follows a move to ``device`` and ``dtype``."""
    layers: list[Any] = list(unet.modules())
    for layer in layers:
        if hasattr(layer, "compute_dtype"):  # a four-bit layer would keep the dtype of its first input for good
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
        elif hasattr(layer, "state") and hasattr(layer.weight, "SCB"):  # eight bits: codes and scales of rows
            for holder in (layer.weight, layer.state):
                for name in ("CB", "SCB"):
                    tensor = getattr(holder, name)
                    setattr(holder, name, None if tensor is None else tensor.to(device))


# part: its library and class, a file that its folder must have, whether it is a network
_KINDS: dict[str, tuple[str, str, str, bool]] = {
    "vae": ("diffusers", "AutoencoderKL", "config.json", True),
    "text_encoder": ("transformers", "CLIPTextModel", "config.json", True),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "config.json", True),
    "tokenizer": ("transformers", "CLIPTokenizer", "*.json", False),
    "tokenizer_2": ("transformers", "CLIPTokenizer", "*.json", False),
    "unet": ("diffusers", "UNet2DConditionModel", "config.json", True),
    "scheduler": ("diffusers", "EulerDiscreteScheduler", "scheduler_config.json", False),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection", "config.json", True),
    "feature_extractor": ("transformers", "CLIPImageProcessor", "preprocessor_config.json", False),
}
NETWORKS = {name for name, (*_, network) in _KINDS.items() if network}
AT_ONCE = ("unet", "scheduler")  # nothing begins without them
_REFERENCE = ("image_encoder", "feature_extractor")  # SDXL's own repository has neither


def _sources(model: ModelConfig) -> dict[str, Source]:
    """Where every part of a model config comes from."""
    base = ("model.base", _source("model.base", model.base))
    places: dict[str, tuple[str, str, str | None]] = {name: (*base, name) for name in _KINDS}
    if model.vae:
        places["vae"] = ("model.vae", _source("model.vae", model.vae), None)
    if model.image_encoder:
        encoder = _source("model.image_encoder", model.image_encoder)
        places |= dict.fromkeys(_REFERENCE, ("model.image_encoder", encoder, None))
    else:
        places |= {name: ("model.image_encoder", base[1], name) for name in _REFERENCE}
    return {name: Source(*places[name], *kind) for name, kind in _KINDS.items()}


def load_parts(model: ModelConfig) -> Parts:
    """The parts that a model config names, in fp32 on the CPU: UNet and scheduler at once, the others when asked for.

    The UNet is quantised if the config says so. Of a local folder it is seen at once whether it is complete.

    Raises:
        ConfigError: a folder or hub id cannot be loaded, or the UNet not quantised; names the key.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Their bars and remarks on loading say nothing about the run at hand and bury our own lines.
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    sources = _sources(model)
    for name, source in sources.items():
        if not source.found and (name not in _REFERENCE or model.image_encoder):
            raise source.refused(f"no {source.needs}")
    parts = Parts.lazily(sources)
    parts.load(*AT_ONCE)
    if model.quantization is not Quantization.none:
        # the transformers' linear layers; convolutions stay as they are
        quantize(parts.unet, model.quantization, "model.quantization", lambda name: "attentions." in name)
        parts.unet.eval()
    return parts


def model_folder(model: ModelConfig) -> Path | None:
    """The base's folder when it is local (for hashes in certificates and cards), else None."""
    path = resolve(model.base)
    return path if path.is_dir() else None


def hint_of_failure(place: Path) -> str:
    """What to do about weights that do not load: a damaged file is named, otherwise they may be of another model."""
    files = sorted(place.rglob("*.safetensors")) if place.is_dir() else []
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return f"{file} is damaged or empty: copy or export it again."
    return "Was it trained on another model?"


def weights_hash(*modules: torch.nn.Module) -> str:
    """Digest of parameters and buffers: the identity of a model inside cache keys, whatever file it came from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(str(tensor.dtype).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _written_hash(part: Any) -> str:
    """Digest of a tokenizer or feature extractor as its library writes it."""
    with TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        return folder_hash(Path(folder))

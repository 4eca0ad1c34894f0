"""Weights of the captioner families: where they come from, which of them are trained, how they are saved."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from packshot.base.places import fetch_model
from packshot.base.quantize import quantize
from packshot.config.captioners import CAPTIONERS, CaptionerFamily
from packshot.config.schema import CaptionerConfig, ModelConfig, ProductTarget, Quantization
from packshot.engine.checkpoints import trainable
from packshot.errors import ConfigError, first_line
from packshot.runs.files import readable, resolve
from packshot.runs.folder import log
from packshot.runs.networks import Network, load_peft, load_whole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, ProcessorMixin

RECORD = "packshot.json"


@dataclass(frozen=True)
class Source:
    """Where a captioner is loaded from.

    base: its name in the config. weights: folder or hub id of the whole model. adapter: the ``export/`` of
    caption_vlm.py that the config names, or None. is_lora: the export holds a LoRA over ``weights``. record: the
    settings with which the export was trained.
    """

    family: CaptionerFamily
    base: str
    weights: str
    adapter: Path | None = None
    is_lora: bool = False
    record: dict[str, str] = field(default_factory=dict)

    @property
    def processor(self) -> str:
        """Folder or hub id of tokenizer and image processor."""
        return str(self.adapter or self.weights)

    @property
    def key(self) -> str:
        """The config key that names ``base``."""
        return f"model.{self.family.name}"


@dataclass(frozen=True)
class Asked:
    """How a captioner is asked: with the settings of its training, if it was trained here."""

    prompt: str
    product: ProductTarget


def find(kind: str, model: ModelConfig, captioner: CaptionerConfig) -> Source:
    """The source of a captioner of the family ``kind``.

    Raises:
        ConfigError: a folder is missing, or the adapter is not an export or one of another family.
    """
    family = CAPTIONERS[kind]
    base = str(getattr(model, kind))
    if base.startswith("microsoft/Florence-2"):  # these need code of their own, which transformers no longer runs
        raise ConfigError(
            f"model.{kind}={base} is in a format that transformers no longer reads.",
            f"The same weights are in florence-community/{base.partition('/')[2]}.",
        )
    if not captioner.adapter:
        return Source(family, base, str(fetch_model(f"model.{kind}", base)))
    adapter = readable("captioner.adapter", captioner.adapter)
    record = read_record(kind, adapter)
    if not (adapter / "adapter_config.json").exists():
        return Source(family, base, str(adapter), adapter, record=record)
    refuse_other_base(adapter, f"model.{kind}", base)
    return Source(family, base, str(fetch_model(f"model.{kind}", base)), adapter, is_lora=True, record=record)


def refuse_other_base(adapter: Path, key: str, base: str) -> None:
    """Refuse a LoRA over weights that it was not trained on: it would load without an error and write nonsense."""
    trained = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    same = trained == base or resolve(str(trained)).resolve() == resolve(base).resolve()
    if same or not trained:
        return
    if resolve(trained).exists() or not resolve(base).exists():
        raise ConfigError(f"captioner.adapter={adapter} is a LoRA over {trained}, not {base}.", f"Set {key}={trained}.")
    log.warning("captioner.adapter was trained over %s, which is not here; %s=%s is used instead", trained, key, base)


def read_record(kind: str, adapter: Path) -> dict[str, str]:
    """The settings of an export. Raises ConfigError if it has none, or is of another family."""
    path = adapter / RECORD
    if not path.is_file():
        raise ConfigError(f"captioner.adapter={adapter} has no {RECORD}.", "Name the export/ of caption_vlm.py.")
    record = json.loads(path.read_text())
    if record.get("captioner") != kind:
        raise ConfigError(
            f"captioner.adapter={adapter} is a {record.get('captioner')} captioner, not {kind}.",
            f"Set captioner={record.get('captioner')}, or name another export.",
        )
    return record


def asked(source: Source, captioner: CaptionerConfig) -> Asked:
    """Prompt and targeting; those of an export win over the config's, and the difference is logged."""
    wanted = Asked(captioner.prompt, captioner.product)
    product = source.record.get("product", captioner.product.name)
    own = Asked(source.record.get("prompt", captioner.prompt), ProductTarget[product])
    if own != wanted:
        log.info("captioner.adapter was trained with %s; this is used instead of the config's", own)
    return own


def loading_error(source: Source, error: Exception) -> ConfigError:
    """The error of transformers or the hub about ``source``, in one sentence."""
    text = str(error)
    if "gated repo" in text or "401 Client Error" in text:
        return ConfigError(
            f"{source.key}={source.base} is behind a licence that this machine has not been given access to.",
            "Accept it on the model's page of the hub and log in (hf auth login). Llama 3.2's vision licence is not "
            "granted to people and companies in the European Union; Florence-2 (MIT) has no such limit.",
        )
    return ConfigError(f"{source.weights} cannot be loaded ({first_line(error)}).", format_hint(source))


def format_hint(source: Source) -> str:
    """The way out where a folder or hub id holds no usable weights."""
    return f"{source.key} takes a folder or the id of a {source.family.title} checkpoint in transformers' own format."


def read_config(source: Source, model_type: str) -> PreTrainedConfig:
    """The model's configuration. Raises ConfigError if it is of another type of model."""
    config = AutoConfig.from_pretrained(source.weights)
    if config.model_type != model_type:
        raise ConfigError(
            f"{source.weights} holds a model of type {config.model_type!r}, not {model_type}.", format_hint(source)
        )
    return config


def load_network(
    source: Source, network_class: type[PreTrainedModel], config: PreTrainedConfig, captioner: CaptionerConfig
) -> Network:
    """The network with frozen weights: in ``captioner.dtype``, linear layers of the language model quantised if asked.

    A LoRA is merged, except over quantised weights, which cannot hold it.
    """
    dtype = getattr(torch, captioner.dtype.name)
    network = load_whole(network_class, source.weights, config=config, dtype=dtype)
    if captioner.quantization is not Quantization.none:
        quantize(network, captioner.quantization, "captioner.quantization", lambda name: ".language_model." in name)
    if source.is_lora:
        lora = load_peft(network, str(source.adapter))
        network = lora if captioner.quantization is not Quantization.none else lora.merge_and_unload()
    return network.requires_grad_(False)


def apply_tuning(network: Network, source: Source, captioner: CaptionerConfig, cross_layers: str = "") -> Network:
    """The network with ``requires_grad`` on what ``captioner.tuning`` trains.

    cross_layers: the numbers of the cross-attention layers, joined by "|".

    Raises:
        ConfigError: the preset does not fit the weights, or would train nothing.
    """
    preset = source.family.presets[captioner.tuning.name]
    if preset.modules:
        if source.is_lora:
            raise ConfigError(
                f"captioner.adapter={source.adapter} is a LoRA, and captioner.tuning={captioner.tuning} would put a "
                "second one over it, so the base of the second would not exist as a folder.",
                "Leave captioner.adapter out, or continue that run (run.resume=true with more steps).",
            )
        # The LoRA's config names this as its base: the name that the user wrote.
        network.name_or_path = str(source.adapter or source.base)
        rank = captioner.lora_rank
        modules = preset.modules.replace("CROSS_LAYERS", cross_layers)
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, lora_dropout=0.0)
        # A LoRA is trained in fp32, also over a base of another dtype.
        return get_peft_model(network, settings, autocast_adapter_dtype=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(re.fullmatch(preset.parameters, name) is not None)
    if not trainable(network):
        raise ConfigError(f"captioner.tuning={captioner.tuning} finds nothing to train.", "Use another preset.")
    return network


def save(network: Network, processor: ProcessorMixin, kind: str, how: Asked, folder: Path) -> None:
    """``save_pretrained`` of the model (or its LoRA) and processor, and the settings to ask it the same way."""
    if isinstance(network, PeftModel):
        # "auto" would ask the hub whether the base's embeddings were resized; they never are.
        network.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        network.save_pretrained(folder)
    processor.save_pretrained(str(folder))
    record = {"captioner": kind, "prompt": how.prompt, "product": str(how.product)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")

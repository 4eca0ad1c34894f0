"""What the captioner families share about weights: where they come from, what of them is trained, how they are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from packshot.base.quantize import quantize
from packshot.config.schema import CaptionerConfig, ProductTarget, Quantization, Tuning
from packshot.errors import ConfigError
from packshot.runs.files import readable, resolve
from packshot.runs.folder import log

RECORD = "packshot.json"


@dataclass(frozen=True)
class Source:
    """Where a captioner is loaded from.

    base: what the config calls it. weights: folder or hub id of the whole model. adapter: the ``export/`` of
    caption_vlm.py that was named, or None. is_lora: the export holds a LoRA over ``weights``. record: its settings.
    """

    base: str
    weights: str
    adapter: Path | None = None
    is_lora: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def processor(self) -> str:
        """Folder or hub id of tokenizer and image processor."""
        return str(self.adapter or self.weights)


@dataclass(frozen=True)
class Asked:
    """How a captioner is asked: with the settings it was trained with, if it was."""

    prompt: str
    product: ProductTarget


def find(kind: str, key: str, base: str, captioner: CaptionerConfig) -> Source:
    """The source of a captioner of this kind; ``key`` is the config key that names its ``base``.

    Raises:
        ConfigError: no such folder, an adapter that is no export, or one of another kind.
    """
    adapter = readable("captioner.adapter", captioner.adapter) if captioner.adapter else None
    record = _record(kind, adapter) if adapter else {}
    is_lora = adapter is not None and (adapter / "adapter_config.json").exists()
    if adapter is not None and is_lora:
        _refuse_other_base(adapter, key, base)
    weights = _base(key, base) if adapter is None or is_lora else str(adapter)
    return Source(base, weights, adapter, is_lora, record)


def _base(key: str, source: str) -> str:
    path = resolve(source)
    if not path.exists() and source.count("/") != 1:
        raise ConfigError(f"{key}={source}: no such folder.", "Give a model folder or a hub id (owner/name).")
    return str(path) if path.exists() else source


def _refuse_other_base(adapter: Path, key: str, base: str) -> None:
    """A LoRA over weights that it was not trained on loads without an error and writes nonsense."""
    trained = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    same = trained == base or resolve(str(trained)).resolve() == resolve(base).resolve()
    if same or not trained:
        return
    if resolve(trained).exists() or not resolve(base).exists():
        raise ConfigError(f"captioner.adapter={adapter} is a LoRA over {trained}, not {base}.", f"Set {key}={trained}.")
    log.warning("captioner.adapter was trained over %s, which is not here; %s=%s is taken for it", trained, key, base)


def _record(kind: str, adapter: Path) -> dict[str, Any]:
    path = adapter / RECORD
    if not path.is_file():
        raise ConfigError(f"captioner.adapter={adapter} has no {RECORD}.", "Name the export/ of caption_vlm.py.")
    record = json.loads(path.read_text())
    if record.get("captioner") != kind:
        raise ConfigError(
            f"captioner.adapter={adapter} is no {kind} captioner but {record.get('captioner')}.",
            f"Set captioner={record.get('captioner')}, or name another export.",
        )
    return record


def asked(source: Source, captioner: CaptionerConfig) -> Asked:
    """Prompt and targeting: an export's own come before the config's, and the difference is said."""
    wanted = Asked(captioner.prompt, captioner.product)
    own = Asked(
        source.record.get("prompt", wanted.prompt), ProductTarget[source.record.get("product", str(wanted.product))]
    )
    if own != wanted:
        log.info("captioner.adapter was trained with %s; it is asked that way", own)
    return own


def loading_error(source: Source, key: str, error: Exception, hint: str) -> ConfigError:
    """What transformers or the hub said about ``source``, as a sentence."""
    text = str(error).strip()
    if "gated repo" in text or "401 Client Error" in text:
        return ConfigError(
            f"{key}={source.base} is behind a licence that this machine has not been given access to.",
            "Accept it on the model's page of the hub and log in (hf auth login). Llama 3.2's vision licence is not "
            "granted to people and companies in the European Union; Florence-2 (MIT) has no such limit.",
        )
    return ConfigError(f"{source.weights} cannot be loaded ({text.splitlines()[0] if text else error!r}).", hint)


def load_network(source: Source, make: Callable[..., Any], config: Any, captioner: CaptionerConfig) -> Any:
    """The network with frozen weights: in ``captioner.dtype``, linear layers of the language model quantised if asked.

    A LoRA is merged, except over quantised weights, which have no room for it.
    """
    network = make(source.weights, config=config, dtype=getattr(torch, str(captioner.dtype)))
    if captioner.quantization is not Quantization.none:
        quantize(network, captioner.quantization, "captioner.quantization", lambda name: ".language_model." in name)
    if source.is_lora:
        lora = PeftModel.from_pretrained(network, str(source.adapter))
        network = lora if captioner.quantization is not Quantization.none else lora.merge_and_unload()
    return network.requires_grad_(False)


def apply_tuning(
    network: Any, source: Source, captioner: CaptionerConfig, presets: Mapping[Tuning, Callable[[str], bool] | str]
) -> Any:
    """The network with what ``captioner.tuning`` trains switched on.

    presets: what a family knows. A function says of every parameter's name whether it is trained itself; a regular
        expression names the linear layers that get a LoRA.

    Raises:
        ConfigError: the family has no such preset, it does not fit the weights, or it would train nothing.
    """
    if captioner.tuning not in presets:
        raise ConfigError(
            f"captioner.tuning={captioner.tuning} is not for captioner={captioner.kind}.",
            f"It takes {', '.join(map(str, presets))}.",
        )
    preset = presets[captioner.tuning]
    if isinstance(preset, str):
        if source.is_lora:
            raise ConfigError(
                f"captioner.adapter={source.adapter} is a LoRA, and captioner.tuning={captioner.tuning} would lay a "
                "second one over it, whose base exists nowhere.",
                "Leave captioner.adapter out, or go on in that run (run.resume=true with more steps).",
            )
        # what the LoRA's config names as its base: as the user wrote it
        network.name_or_path = str(source.adapter or source.base)
        rank = captioner.lora_rank
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=preset, lora_dropout=0.0)
        # a LoRA is trained in fp32 whatever its base is kept in
        return get_peft_model(network, settings, autocast_adapter_dtype=True)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(preset(name))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"captioner.tuning={captioner.tuning} finds nothing to train.", "Use another preset.")
    return network


def save(network: Any, processor: Any, kind: str, how: Asked, folder: Path) -> None:
    """``save_pretrained`` of the model (or its LoRA) and processor, and what is needed to ask it the same way."""
    # "auto" would ask the hub whether the base's embeddings were resized; they never are
    is_lora = isinstance(network, PeftModel)
    network.save_pretrained(folder, **({"save_embedding_layers": False} if is_lora else {}))
    processor.save_pretrained(folder)
    record = {"captioner": kind, "prompt": how.prompt, "product": str(how.product)}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")

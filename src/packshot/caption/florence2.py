"""Florence-2 as a captioner: the native transformers classes, our batches, our generation settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL.Image import Image
from torch import Tensor
from transformers import AutoConfig, Florence2ForConditionalGeneration, Florence2Processor, GenerationConfig

from packshot.caption.adapter import IGNORED, Caption
from packshot.config.schema import CaptionerConfig, ModelConfig, Tuning
from packshot.core.errors import ConfigError
from packshot.core.run import log
from packshot.core.storage import readable, resolve

RECORD = "packshot.json"
# The projections of both BART stacks. Names alone would also reach the vision tower (fc1, fc2), and the output head is
# tied to the embedding: a LoRA on it changes both when it is merged.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
# Stochastic depth and dropout draw from the process's generator, so results would depend on the number of processes.
_NO_DROPOUT = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0) | dict.fromkeys(
    ("encoder_layerdrop", "decoder_layerdrop", "classifier_dropout"), 0.0
)


@dataclass
class Florence2:
    """A Florence-2 model with its processor; see :class:`packshot.caption.adapter.Adapter`.

    prompt: the instruction before every caption, a task token (``<CAPTION>``) or plain words.
    product_box: append the product's box to the prompt as four ``<loc_…>`` tokens where a mask is known.
    """

    model: Any
    processor: Any  # Florence2Processor; its keyword arguments are not in its signature
    prompt: str
    product_box: bool
    max_new_tokens: int

    def train_batch(
        self, images: Sequence[Image], masks: Sequence[Image | None], captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask, pixel_values, decoder_input_ids (B, T) and labels (B, T).

        The tokenizer, not the processor, writes the labels: the processor adds neither start nor end token to text
        without an image. The decoder's inputs are the labels one place to the right; they are made here because
        several transformers releases shifted twice or not at all.
        """
        batch = self.generate_batch(images, masks)
        written = self.processor.tokenizer(list(captions), padding=True, padding_side="right", return_tensors="pt")
        start = torch.full((len(captions), 1), self.model.config.text_config.decoder_start_token_id)
        batch["decoder_input_ids"] = torch.cat([start, written.input_ids[:, :-1]], dim=1)
        batch["labels"] = written.input_ids.masked_fill(written.attention_mask == 0, IGNORED)
        return batch

    def generate_batch(self, images: Sequence[Image], masks: Sequence[Image | None]) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, S), pixel_values (B, 3, H, W)."""
        prompts = [self._prompt(mask) for mask in masks]
        return dict(self.processor(images=list(images), text=prompts, padding=True, return_tensors="pt"))

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """logits_BTV for ``batch["labels"]``."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self.model(**inputs, use_cache=False).logits

    def decode(self, batch: dict[str, Tensor], ids_BT: Tensor) -> list[Caption]:
        """Captions of generated ids, which begin with the decoder's start token (the same id as the end token)."""
        tokenizer = self.processor.tokenizer
        ended = (ids_BT[:, 1:] == tokenizer.eos_token_id).any(dim=1).tolist()
        texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [Caption(text.strip(), truncated=not end) for text, end in zip(texts, ended, strict=True)]

    def caption_length(self, caption: str) -> int:
        """Tokens of a caption with its start and end token."""
        return len(self.processor.tokenizer(caption).input_ids)

    def save(self, folder: Path) -> None:
        """``save_pretrained`` of model (or LoRA) and processor, and what is needed to prompt it the same way."""
        # "auto" would ask the hub whether the base's embeddings were resized; they never are
        is_lora = isinstance(self.model, PeftModel)
        self.model.save_pretrained(folder, **({"save_embedding_layers": False} if is_lora else {}))
        self.processor.save_pretrained(folder)
        record = {"captioner": "florence2", "prompt": self.prompt, "product_box": self.product_box}
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def _prompt(self, mask: Image | None) -> str:
        if not self.product_box or mask is None:
            return self.prompt
        # The processor refuses words after a task token; the sentence that it stands for takes them.
        instruction = self.processor.task_prompts_without_inputs.get(self.prompt, self.prompt)
        return instruction + location_tokens(mask)


def location_tokens(mask: Image) -> str:
    """The bounding box of a mask's white as Florence-2 writes regions: x1, y1, x2, y2 in 1000 bins; "" if black."""
    ys, xs = np.nonzero(np.asarray(mask.convert("L")) > 127)
    if len(xs) == 0:
        return ""
    box = np.array([xs.min() / mask.width, ys.min() / mask.height, xs.max() / mask.width, ys.max() / mask.height])
    return "".join(f"<loc_{bin}>" for bin in (box * 1000).astype(int))


def load(model: ModelConfig, captioner: CaptionerConfig, trainable: bool = False) -> Florence2:
    """Florence-2 from ``captioner.adapter`` if set, else ``model.florence2``; weights in fp32, on the CPU.

    trainable: apply ``captioner.tuning``; otherwise all weights are frozen and a LoRA is merged.

    Raises:
        ConfigError: a folder is missing or holds no Florence-2, the settings do not fit the tokenizer, or the
            captioner of ``captioner.adapter`` is of another kind.
    """
    adapter = readable("captioner.adapter", captioner.adapter) if captioner.adapter else None
    record = _record(adapter) if adapter else {}
    is_lora = adapter is not None and (adapter / "adapter_config.json").exists()
    weights = _base(model.florence2) if adapter is None or is_lora else str(adapter)
    network, processor = _pretrained(weights, str(adapter or weights))
    if is_lora:
        network = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    prompt = record.get("prompt", captioner.prompt)
    if prompt != captioner.prompt:
        log.info("captioner.adapter was trained with the prompt %r; it is asked with that one", prompt)
    product_box = record.get("product_box", captioner.product_box)
    result = Florence2(network, processor, prompt, product_box, captioner.max_new_tokens)
    _check(result, weights)
    network.requires_grad_(False)
    network.generation_config = _generation_config(result)
    if trainable:
        result.model = _trainable(network, model, captioner)
    return result


def _base(source: str) -> str:
    path = resolve(source)
    if not path.exists() and source.count("/") != 1:
        raise ConfigError(f"model.florence2={source}: no such folder.", "Give a model folder or a hub id (owner/name).")
    return str(path) if path.exists() else source


def _record(adapter: Path) -> dict[str, Any]:
    path = adapter / RECORD
    if not path.is_file():
        raise ConfigError(f"captioner.adapter={adapter} has no {RECORD}.", "Name the export/ of caption_vlm.py.")
    record = json.loads(path.read_text())
    if record.get("captioner") != "florence2":
        raise ConfigError(f"captioner.adapter={adapter} is no Florence-2 captioner.", f"See its {RECORD}.")
    return record


def _pretrained(weights: str, processor: str) -> tuple[Florence2ForConditionalGeneration, Florence2Processor]:
    hint = "model.florence2 takes a folder or the id of a checkpoint in transformers' own Florence-2 format."
    try:
        config = AutoConfig.from_pretrained(weights)
        if config.model_type != "florence2":
            raise ConfigError(f"{weights} holds a model of type {config.model_type!r}, not florence2.", hint)
        config.vision_config.drop_path_rate = 0.0
        for name, value in _NO_DROPOUT.items():
            setattr(config.text_config, name, value)
        network = Florence2ForConditionalGeneration.from_pretrained(weights, config=config, dtype=torch.float32)
        return network, Florence2Processor.from_pretrained(processor)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{weights} holds no Florence-2 that can be loaded ({reason}).", hint) from error


def _trainable(network: Any, model: ModelConfig, captioner: CaptionerConfig) -> Any:
    if captioner.tuning is Tuning.full:
        return network.requires_grad_(True)
    network.name_or_path = model.florence2  # what the adapter's config names as its base: as the user wrote it
    rank = captioner.lora_rank
    return get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, lora_dropout=0.0))


def _check(captioner: Florence2, weights: str) -> None:
    """Refuse what would train or generate wrongly without an error: ids that disagree, captions that cannot fit."""
    config, tokenizer = captioner.model.config, captioner.processor.tokenizer
    text = config.text_config
    ids = {
        name: (getattr(text, name), getattr(tokenizer, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    ids["image_token_id"] = (config.image_token_id, captioner.processor.image_token_id)
    for name, (models, tokenizers) in ids.items():
        if models is None or models != tokenizers:
            raise ConfigError(
                f"{weights}: {name} is {models} in the model but {tokenizers} in the tokenizer.",
                "One of config.json and tokenizer_config.json is wrong.",
            )
    if captioner.max_new_tokens >= text.max_position_embeddings:
        raise ConfigError(
            f"captioner.max_new_tokens={captioner.max_new_tokens} is more than the model can write.",
            f"{weights} has {text.max_position_embeddings} positions, one of them for the start token.",
        )
    if captioner.product_box and "<loc_999>" not in tokenizer.get_vocab():
        raise ConfigError("captioner.product_box=true needs <loc_…> tokens.", f"The tokenizer of {weights} has none.")


def _generation_config(captioner: Florence2) -> GenerationConfig:
    """Greedy decoding to the end token.

    It *replaces* the model's own: generate() fills what a passed config leaves open from the checkpoint's, and
    Florence-2's three beams, n-gram ban and forced tokens break structured captions and hide truncation.
    """
    tokenizer = captioner.processor.tokenizer
    return GenerationConfig(
        max_new_tokens=captioner.max_new_tokens,
        do_sample=False,
        num_beams=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=captioner.model.config.text_config.decoder_start_token_id,
    )

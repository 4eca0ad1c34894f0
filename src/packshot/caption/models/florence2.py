"""Florence-2 as a captioner: the native transformers classes, our batches, our generation settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from packshot.caption.models import weights
from packshot.caption.models.adapter import IGNORED, token_id
from packshot.caption.models.local import LocalModel
from packshot.caption.target import mark
from packshot.config.schema import CaptionerConfig, ModelConfig, ProductTarget
from packshot.errors import ConfigError
from packshot.imaging.framing import location_tokens
from packshot.lists import without

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KIND = "florence2"  # the row in config/captioners.py
# Stochastic depth and dropout draw from the process's generator, so results would depend on the number of processes.
DROPOUTS = (
    "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop",
    "classifier_dropout",
)  # fmt: skip


class Florence2(LocalModel):
    """A Florence-2 model with its processor; the prompt is a task token (``<CAPTION>``) or plain words."""

    kind = KIND

    def train_batch(
        self, images: Sequence[Image], masks: Sequence[Image | None], captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask, pixel_values, decoder_input_ids (B, T) and labels (B, T).

        The tokenizer writes the labels, because the processor adds neither start nor end token to text without an
        image. The decoder's inputs are the labels shifted by one to the right; they are made here because several
        transformers releases shifted twice or not at all.
        """
        batch = self.generate_batch(images, masks)
        written = self.processor.tokenizer(list(captions), padding=True, padding_side="right", return_tensors="pt")
        start = torch.full((len(captions), 1), self.model.config.text_config.decoder_start_token_id)
        batch["decoder_input_ids"] = torch.cat([start, written.input_ids[:, :-1]], dim=1)
        batch["labels"] = written.input_ids.masked_fill(written.attention_mask == 0, IGNORED)
        return batch

    def generate_batch(self, images: Sequence[Image], masks: Sequence[Image | None]) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, S), pixel_values (B, 3, H, W)."""
        prompts = list(map(self.prompt, masks))
        shown = mark(images, masks, self.asked.product)
        return dict(self.processor(images=shown, text=prompts, padding=True, return_tensors="pt"))

    def lead(self, batch: dict[str, Tensor]) -> tuple[int, list[int]]:
        """The decoder's start token is given; ``<s>`` is written before the caption, as in the labels."""
        return 1, [token_id(self.tokenizer, "bos_token_id")]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """logits_BTV for ``batch["labels"]``."""
        return self.model(**without(batch, "labels"), use_cache=False).logits

    def caption_length(self, caption: str) -> int:
        """Tokens of a caption with its start and end token."""
        return len(self.processor.tokenizer(caption).input_ids)

    def prompt(self, mask: Image | None) -> str:
        """The instruction, with the product's box if asked."""
        if self.asked.product is not ProductTarget.box or mask is None:
            return self.asked.prompt
        # The processor refuses words after a task token, so its sentence is used instead.
        instruction = self.processor.task_prompts_without_inputs.get(self.asked.prompt, self.asked.prompt)
        return instruction + location_tokens(mask)


def load(model: ModelConfig, captioner: CaptionerConfig, trainable: bool = False) -> Florence2:
    """Florence-2 from ``captioner.adapter`` if set, else ``model.florence2``, on the CPU.

    trainable: apply ``captioner.tuning``; otherwise all weights are frozen and a LoRA is merged.

    Raises:
        ConfigError: a folder is missing or holds no Florence-2, the settings do not fit the tokenizer, or the
            captioner of ``captioner.adapter`` is of another kind.
    """
    source = weights.find(KIND, model, captioner)
    try:
        config = without_dropout(weights.read_config(source, "florence2"))
        network = weights.load_network(source, Florence2ForConditionalGeneration, config, captioner)
        processor = Florence2Processor.from_pretrained(source.processor)
    except (OSError, ValueError) as error:
        raise weights.loading_error(source, error) from error
    result = Florence2(network, processor, weights.asked(source, captioner), captioner.max_new_tokens)
    check(result, source.weights)
    start = config.text_config.decoder_start_token_id
    network.generation_config = result.greedy(decoder_start_token_id=start)
    if trainable:
        result.model = weights.apply_tuning(network, source, captioner)
    return result


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with every dropout set to zero."""
    config.vision_config.drop_path_rate = 0.0
    for name in DROPOUTS:
        setattr(config.text_config, name, 0.0)
    return config


def check(captioner: Florence2, name: str) -> None:
    """Refuse settings that would train or generate wrongly without an error.

    Raises:
        ConfigError: token ids of model and tokenizer differ, or captions or places do not fit the model.
    """
    config = captioner.model.config
    tokenizer = captioner.tokenizer
    text = config.text_config
    for token in ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id"):
        own = getattr(config if token == "image_token_id" else text, token)
        written = getattr(captioner.processor if token == "image_token_id" else tokenizer, token)
        if own is None or own != written:
            raise ConfigError(
                f"{name}: {token} is {own} in the model but {written} in the tokenizer.",
                "One of config.json and tokenizer_config.json is wrong.",
            )
    if captioner.max_new_tokens >= text.max_position_embeddings:
        raise ConfigError(
            f"captioner.max_new_tokens={captioner.max_new_tokens} is more than the model can write.",
            f"{name} has {text.max_position_embeddings} positions, one of them for the start token.",
        )
    if captioner.asked.product is ProductTarget.box and "<loc_999>" not in tokenizer.get_vocab():
        raise ConfigError("captioner.product=box needs <loc_…> tokens.", f"The tokenizer of {name} has none.")

"""Llama 3.2 Vision (Mllama) as a captioner: the native transformers classes, our batches, our generation settings."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import MllamaForConditionalGeneration, MllamaProcessor

from packshot.caption.models import weights
from packshot.caption.models.adapter import IGNORED, token_id
from packshot.caption.models.local import LocalModel
from packshot.caption.target import mark
from packshot.config.schema import CaptionerConfig, ModelConfig
from packshot.errors import ConfigError
from packshot.lists import select, without
from packshot.runs.networks import Network

KIND = "llama32_vision"  # the row in config/captioners.py
TURN_END = "<|eot_id|>"  # ends an answer of the instruct checkpoints; the base ones know only their end of text


class Mllama(LocalModel):
    """A Llama 3.2 Vision model with its processor.

    Every sample has one image, at the start of the user's turn: text before the image would see it as well, and a batch
    without an image would leave parameters of other processes without a gradient.
    """

    kind = KIND

    def train_batch(
        self, images: Sequence[Image], masks: Sequence[Image | None], captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, S), padded on the right; the picture's tensors; labels (B, S - 1).

        Prompt and caption are tokenised separately and joined, as they meet when the model writes. The labels are
        shifted by one, so that they are aligned with the logits that predict them.
        """
        prompt = self.prompt_ids()
        written = [[*self.ids(caption), self.tokenizer.eos_token_id] for caption in captions]
        rows = list(map(prompt.__add__, written))
        batch = self._batch(images, masks, rows, pad_left=False)
        batch["labels"] = torch.full((len(rows), batch["input_ids"].shape[1] - 1), IGNORED)
        for labels, ids in zip(batch["labels"], written, strict=True):
            labels[len(prompt) - 1 : len(prompt) - 1 + len(ids)] = torch.tensor(ids)
        return batch

    def generate_batch(self, images: Sequence[Image], masks: Sequence[Image | None]) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, S), padded on the left, and the picture's tensors."""
        return self._batch(images, masks, [self.prompt_ids()] * len(images), pad_left=True)

    def lead(self, batch: dict[str, Tensor]) -> tuple[int, list[int]]:
        """The prompt is given, and the caption follows at once."""
        return batch["input_ids"].shape[1], []

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """logits_BTV for ``batch["labels"]``."""
        return self.model(**without(batch, "labels"), use_cache=False).logits[:, :-1]

    def caption_length(self, caption: str) -> int:
        """Tokens of a caption with its end token."""
        return len(self.ids(caption)) + 1

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it is. The chat template writes the start token; the tokenizer would add a second one."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt_ids(self) -> list[int]:
        """Ids of the user's turn: picture, instruction, and the opening of the answer where there is a template."""
        if self.processor.chat_template:
            content = [{"type": "image"}, {"type": "text", "text": self.asked.prompt}]
            turn = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        else:
            text = f"{self.processor.image_token}{self.tokenizer.bos_token}{self.asked.prompt}\n"
        return self.ids(text)

    def _batch(
        self, images: Sequence[Image], masks: Sequence[Image | None], rows: list[list[int]], pad_left: bool
    ) -> dict[str, Tensor]:
        """Padded ids with their masks, and pictures cut into tiles.

        pixel_values (B, 1, tiles, 3, H, W), aspect_ratio_ids (B, 1), aspect_ratio_mask (B, 1, tiles),
        cross_attention_mask (B, S, 1, tiles): text sees the tiles from the image token on, padding sees none.
        """
        longest = max(map(len, rows))
        ids_BS = torch.full((len(rows), longest), token_id(self.tokenizer, "pad_token_id"))
        attention_BS = torch.zeros_like(ids_BS)
        for i, row in enumerate(rows):
            place = slice(longest - len(row), None) if pad_left else slice(0, len(row))
            ids_BS[i, place] = torch.tensor(row)
            attention_BS[i, place] = 1
        shown = [[image] for image in mark(images, masks, self.asked.product)]
        pictures = self.processor.image_processor(images=shown, return_tensors="pt")
        tiles_B1T = pictures["aspect_ratio_mask"].long()
        seeing_BS = attention_BS * (ids_BS == self.processor.image_token_id).cumsum(dim=1)
        return {
            "input_ids": ids_BS,
            "attention_mask": attention_BS,
            "cross_attention_mask": seeing_BS[:, :, None, None] * tiles_B1T[:, None],
            **select(pictures, ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")),
        }


def load(model: ModelConfig, captioner: CaptionerConfig, trainable: bool = False) -> Mllama:
    """Llama 3.2 Vision from ``captioner.adapter`` if set, else ``model.llama32_vision``, on the CPU.

    trainable: apply ``captioner.tuning``; otherwise all weights are frozen and a LoRA is merged.

    Raises:
        ConfigError: a folder is missing or holds no Mllama, its licence was not accepted, the parts do not fit each
            other, the model would ignore its image, or ``captioner.adapter`` is of another kind.
    """
    source = weights.find(KIND, model, captioner)
    try:
        config = weights.read_config(source, "mllama")
        network = weights.load_network(source, MllamaForConditionalGeneration, config, captioner)
        processor = MllamaProcessor.from_pretrained(source.processor)
    except (OSError, ValueError) as error:
        raise weights.loading_error(source, error) from error
    if processor.chat_template and TURN_END in processor.tokenizer.get_vocab():
        processor.tokenizer.eos_token = TURN_END
    result = Mllama(network, processor, weights.asked(source, captioner), captioner.max_new_tokens)
    check(result, source.weights)
    network.generation_config = result.greedy()
    if trainable:
        result.model = weights.apply_tuning(network, source, captioner, "|".join(map(str, cross_layers(network))))
    return result


def check(captioner: Mllama, name: str) -> None:
    """Refuse a checkpoint that would train or generate wrongly without an error.

    Raises:
        ConfigError: the model would ignore its picture, or model, tokenizer and image processor do not fit.
    """
    config = captioner.model.config
    images = captioner.processor.image_processor
    crossing = cross_layers(captioner.model)
    parameters = dict(captioner.model.named_parameters())
    gates = select(parameters, fnmatch.filter(parameters, "*cross_attn_attn_gate")).values()
    if not crossing or not any(map(Tensor.any, gates)):
        raise ConfigError(
            f"{name}: the text never sees the picture (cross-attention layers {crossing}, their gates closed).",
            "A trained model has open gates; in a new model they have to be opened.",
        )
    if captioner.processor.image_token_id != config.image_token_index:
        raise ConfigError(
            f"{name}: the image token is {config.image_token_index} in the model but "
            f"{captioner.processor.image_token_id} in the tokenizer.",
            "One of config.json and tokenizer_config.json is wrong.",
        )
    if images.max_image_tiles != config.vision_config.max_num_tiles:
        raise ConfigError(
            f"{name}: the image processor cuts up to {images.max_image_tiles} tiles, the model takes "
            f"{config.vision_config.max_num_tiles}.",
            "The numbers of the tile layouts depend on it; restore preprocessor_config.json.",
        )
    if captioner.tokenizer.pad_token_id is None:
        raise ConfigError(f"{name}: the tokenizer has no padding token.", "Set pad_token in tokenizer_config.json.")


def cross_layers(network: Network) -> list[int]:
    """The numbers of the layers that carry into the text what is seen."""
    text = network.config.text_config
    return [layer for layer in text.cross_attention_layers if layer < text.num_hidden_layers]

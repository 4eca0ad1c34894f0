"""What a captioner family provides, and the loss with which every family is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from packshot.runs.networks import Network

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # label of every position that must not be learned: prompt, image, padding


@dataclass(frozen=True)
class Caption:
    """The text that a model wrote.

    truncated: it reached the longest length without an end token. confidence: per slot of a caption in the grammar, the
    probability that the model gave to those words, given the words before them, in [0, 1]; empty if unknown.
    error: why there is no caption (the answer of a server, for example).
    """

    text: str
    truncated: bool
    confidence: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class Adapter(Protocol):
    """A vision-language model with its processor.

    ``model`` has the stock ``generate``; its ``generation_config`` is ours, never the checkpoint's. Images are RGB.
    Masks are "L" with white = product, or None. Batches are dicts of tensors whose first dimension is the sample.
    """

    model: Network

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the captions; its ``eos_token_id`` ends a caption."""
        ...

    def train_batch(
        self, images: Sequence[Image], masks: Sequence[Image | None], captions: Sequence[str]
    ) -> dict[str, Tensor]:
        """Inputs and ``labels`` (B, T), aligned with :meth:`logits`: caption and end token, ``IGNORED`` elsewhere."""
        ...

    def generate_batch(self, images: Sequence[Image], masks: Sequence[Image | None]) -> dict[str, Tensor]:
        """Inputs of ``model.generate``."""
        ...

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """logits_BTV; position t is the prediction of ``labels[:, t]``."""
        ...

    def lead(self, batch: dict[str, Tensor]) -> tuple[int, list[int]]:
        """How many of the ids from ``generate`` were its input, and the ids that are written before the caption."""
        ...

    def caption_length(self, caption: str) -> int:
        """Tokens the model has to write for a caption, end token included."""
        ...

    def save(self, folder: Path) -> None:
        """Weights and processor, so that the stock classes load them."""
        ...


def token_id(tokenizer: PreTrainedTokenizerFast, name: str) -> int:
    """The id of a special token that the tokenizer has, by the name of its attribute (``eos_token_id``)."""
    found = getattr(tokenizer, name)
    assert isinstance(found, int), name
    return found


def loss_per_sample(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean token cross-entropy of every sample, (B,) fp32.

    The mean is taken per sample, not over the batch, so the weight of a sample does not depend on its batch. For one
    sample it is the loss that transformers computes.
    """
    losses_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
    return losses_BT.sum(1) / (labels_BT != IGNORED).sum(1)

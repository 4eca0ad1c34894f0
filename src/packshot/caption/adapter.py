"""What a captioner family has to provide, and the one loss all of them are trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

IGNORED = -100  # label of every position that must not be learned: prompt, image, padding


@dataclass(frozen=True)
class Caption:
    """What a model wrote. truncated: it was cut at the longest length, no end token came."""

    text: str
    truncated: bool


class Adapter(Protocol):
    """A vision-language model with its processor, as the rest of the package sees it.

    ``model`` has stock ``generate``; its ``generation_config`` is ours, never the checkpoint's. Images are RGB, masks
    are "L" with white = product, or None. Batches are dicts of tensors whose first dimension is the sample.
    """

    model: Any

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

    def decode(self, batch: dict[str, Tensor], ids_BT: Tensor) -> list[Caption]:
        """Texts of what ``generate`` returned for ``batch``, without special tokens."""
        ...

    def caption_length(self, caption: str) -> int:
        """Tokens the model has to write for a caption, end token included."""
        ...

    def save(self, folder: Path) -> None:
        """Weights and processor, so that the stock classes load them."""
        ...


def loss_per_sample(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean token cross-entropy of every sample, (B,) fp32.

    The mean is taken per sample, not over the batch, so a sample weighs the same whatever it is batched with. For one
    sample it is the loss that transformers computes.
    """
    losses_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
    return losses_BT.sum(1) / (labels_BT != IGNORED).sum(1)


@torch.inference_mode()
def write(adapter: Adapter, images: Sequence[Image], masks: Sequence[Image | None]) -> list[Caption]:
    """Caption one batch, with the weights as they are (a model in training is put back into training)."""
    model = adapter.model
    training = model.training
    model.eval()
    try:
        batch = {name: tensor.to(model.device) for name, tensor in adapter.generate_batch(images, masks).items()}
        return adapter.decode(batch, model.generate(**batch))
    finally:
        model.train(training)

"""Captioning as a Task of the shared training loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from packshot.caption.evaluate import with_baselines
from packshot.caption.models.adapter import Adapter, Caption, loss_per_sample
from packshot.caption.models.captioner import Captioner, caption_rows
from packshot.dataset.rows import Rows
from packshot.engine.task import Task, Validated

VALIDATION_SCORE_SAMPLES = 32


class CaptioningTask(Task):
    """Token cross-entropy of an adapter on a dataset. Nothing is drawn at random: dropout is off, nothing is augmented.

    captioner: writes with ``adapter``. constant: the caption that the validation's first baseline gives to every image.
    pictures: how many validation pictures are written.
    """

    def __init__(
        self, adapter: Adapter, captioner: Captioner, validation: Rows, constant: str, pictures: int, seed: int
    ) -> None:
        super().__init__()
        self._captioner, self._validation = captioner, validation
        self._constant, self._pictures, self._seed = constant, pictures, seed
        self.adapter = adapter
        self.model: nn.Module = adapter.model

    def collate(self, samples: list[dict[str, Any]], keys: Sequence[object]) -> dict[str, Any]:
        """The adapter's training batch; the keys go unused, nothing is drawn."""
        return self.adapter.train_batch(
            [sample["image"] for sample in samples],
            [sample["mask"] for sample in samples],
            [sample["text"] for sample in samples],
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean token cross-entropy per sample, (B,) fp32."""
        return loss_per_sample(self.adapter.logits(batch), batch["labels"])

    def validate(self, folder: Path, accelerator: Accelerator) -> Validated:
        """Loss and slot scores on held-out samples, beside both baselines; pictures with caption and truth."""
        indices = list(range(min(VALIDATION_SCORE_SAMPLES, len(self._validation))))
        captions = caption_rows(self._captioner, self._validation, indices, accelerator)
        truths = [self._validation[index]["scene"] for index in indices]
        scores = with_baselines(captions, truths, self._constant, self._seed)
        figures = {
            "validation_loss": self._loss(indices, accelerator),
            "soft_f1": scores["captioner"]["mean"]["soft"],
            "exact": scores["captioner"]["mean"]["exact"],
            "soft_f1_constant_caption": scores["baselines"]["constant_caption"]["mean"]["soft"],
            "soft_f1_shuffled_images": scores["baselines"]["shuffled_images"]["mean"]["soft"],
            **{name: scores["captioner"][name] for name in ("parse_rate", "leakage_rate", "truncated_rate")},
        }
        return Validated(figures, *self._write_pictures(folder, captions, accelerator))

    def _loss(self, indices: list[int], accelerator: Accelerator) -> float:
        total = torch.zeros((), device=accelerator.device)
        for index in indices[accelerator.process_index :: accelerator.num_processes]:
            batch = self.collate([self._validation[index]], [])
            with accelerator.autocast():
                total += self({name: tensor.to(accelerator.device) for name, tensor in batch.items()}).sum()
        summed: Any = accelerator.reduce(total, "sum")
        return summed.item() / len(indices)

    def _write_pictures(
        self, folder: Path, captions: list[Caption], accelerator: Accelerator
    ) -> tuple[list[Path], list[str]]:
        count = min(self._pictures, len(captions))
        files = [folder / f"{index:03d}.png" for index in range(count)]
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for index, file in enumerate(files):
                self._validation[index]["image"].save(file)
        lines = [f"{captions[i].text}  (truth: {self._validation.texts[i]})" for i in range(count)]
        return files, lines

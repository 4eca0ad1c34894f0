"""Captioning as a Task of the shared training loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from packshot.caption.models.adapter import Adapter, Caption, loss_per_sample
from packshot.caption.models.captioner import Captioner, caption_rows
from packshot.caption.scores import with_baselines
from packshot.dataset.rows import Rows
from packshot.engine.keyed_random import SampleKey
from packshot.engine.task import Batch, Sample, Task, Validated
from packshot.lists import column, map_values

VALIDATION_SCORE_SAMPLES = 32


class CaptioningTask(Task):
    """Token cross-entropy of an adapter on a dataset. Nothing is drawn at random: dropout is off, nothing is augmented.

    captioner: writes with ``adapter``. constant: the caption of the validation's first baseline.
    pictures: how many validation pictures are written to disk.
    """

    def __init__(
        self, adapter: Adapter, captioner: Captioner, validation: Rows, constant: str, pictures: int, seed: int
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.model: nn.Module = adapter.model
        self._captioner = captioner
        self._validation = validation
        self._constant = constant
        self._pictures = pictures
        self._seed = seed

    def collate(self, samples: list[Sample], keys: Sequence[SampleKey]) -> Batch:
        """The adapter's training batch. The keys draw one of several captions; without keys the first is taken."""
        texts = [sample["text"] for sample in samples]
        for index, key in enumerate(keys):
            captions = samples[index].get("captions") or ()
            if len(captions) > 1:
                texts[index] = captions[int(key.uniform("caption") * len(captions))]
        return self.adapter.train_batch(column(samples, "image"), column(samples, "mask"), texts)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean token cross-entropy per sample, (B,) fp32."""
        return loss_per_sample(self.adapter.logits(batch), batch["labels"])

    def validate(self, folder: Path, accelerator: Accelerator) -> Validated:
        """Loss and slot scores on held-out samples, next to both baselines; pictures with caption and truth."""
        indices = list(range(min(VALIDATION_SCORE_SAMPLES, len(self._validation))))
        captions = caption_rows(self._captioner, self._validation, indices, accelerator)
        truths = [self._validation[index]["scene"] for index in indices]
        scores = with_baselines(captions, truths, self._constant, self._seed)
        own = scores["captioner"]
        figures = {
            "validation_loss": self._loss(indices, accelerator),
            "soft_f1": own["mean"]["soft"],
            "exact": own["mean"]["exact"],
            "soft_f1_constant_caption": scores["baselines"]["constant_caption"]["mean"]["soft"],
            "soft_f1_shuffled_images": scores["baselines"]["shuffled_images"]["mean"]["soft"],
            "parse_rate": own["parse_rate"],
            "leakage_rate": own["leakage_rate"],
            "truncated_rate": own["truncated_rate"],
        }
        shown = captions[: self._pictures]
        return Validated(figures, self._write_pictures(folder, len(shown), accelerator), self._lines(shown))

    def _loss(self, indices: list[int], accelerator: Accelerator) -> float:
        """Mean loss of these validation samples; the processes share the work."""
        total = torch.zeros((), device=accelerator.device)
        for index in indices[accelerator.process_index :: accelerator.num_processes]:
            batch = self.collate([self._validation[index]], [])
            with accelerator.autocast():
                total += self(map_values(lambda tensor: tensor.to(accelerator.device), batch)).sum()
        summed = accelerator.reduce(total, "sum")
        assert isinstance(summed, Tensor)
        return summed.item() / len(indices)

    def _write_pictures(self, folder: Path, count: int, accelerator: Accelerator) -> list[Path]:
        """The first validation pictures as files, written by the main process."""
        files = [folder / f"{index:03d}.png" for index in range(count)]
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for index, file in enumerate(files):
                self._validation[index]["image"].save(file)
        return files

    def _lines(self, captions: Sequence[Caption]) -> list[str]:
        """A line for each picture: what was written, and the truth."""
        pairs = zip(captions, self._validation.texts, strict=False)  # the first pictures only
        return [f"{caption.text}  (truth: {truth})" for caption, truth in pairs]

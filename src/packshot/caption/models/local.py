"""What the captioner families that run on this machine have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import GenerationConfig

from packshot.caption.models import weights
from packshot.runs.networks import Network

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class LocalModel:
    """A vision-language model with its processor; see :class:`packshot.caption.models.adapter.Adapter`.

    kind: the family's row in config/captioners.py.
    asked: the prompt and how the product is pointed out.
    """

    kind: ClassVar[str]
    model: Network
    processor: Any  # the family's processor, whose signature lacks its keyword arguments
    asked: weights.Asked
    max_new_tokens: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer of the captions."""
        return self.processor.tokenizer

    def save(self, folder: Path) -> None:
        """See :func:`packshot.caption.models.weights.save`."""
        weights.save(self.model, self.processor, self.kind, self.asked, folder)

    def greedy(self, **more: int) -> GenerationConfig:
        """Greedy decoding to the end token. more: further settings of the family.

        It *replaces* the checkpoint's own, because generate() takes settings that are missing in a passed config from
        the checkpoint: Florence-2's three beams, n-gram ban and forced tokens break structured captions and hide
        cuts, and Llama 3.2 Vision samples.
        """
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **more,
        )

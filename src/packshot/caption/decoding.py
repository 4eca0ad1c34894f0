"""Writing captions with a model: held to the scene grammar if asked, with the probability of every slot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import llguidance.torch
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from packshot.caption.models.adapter import Adapter, Caption
from packshot.config.schema import Constraint
from packshot.scene.decoding_grammar import scene_grammar
from packshot.scene.grammar import slot_spans


class SceneConstraint(LogitsProcessor):
    """Leaves every row only those tokens with which its text can still become a caption in the scene grammar.

    given: ids that stand before what is written. lead: ids that are written before the caption itself. One use per
    call of ``generate``, and one beam: a row's state follows the row.
    """

    def __init__(self, tokenizer: Any, rows: int, given: int, lead: Sequence[int]) -> None:
        self._given, self._lead = given, list(lead)
        known = _known(tokenizer)
        self._matchers = [llguidance.LLMatcher(known, _grammar()) for _ in range(rows)]
        self._mask = llguidance.torch.allocate_token_bitmask(rows, known.vocab_size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores_BV with -inf for what may not follow."""
        written = input_ids.shape[1] - self._given
        if written < len(self._lead):
            only = torch.full_like(scores, -math.inf)
            only[:, self._lead[written]] = 0.0
            return only
        latest = input_ids[:, -1].tolist() if written > len(self._lead) else None
        for row, matcher in enumerate(self._matchers):
            if latest is not None and not matcher.is_stopped():
                matcher.consume_token(latest[row])
            if matcher.is_stopped():  # generate() pads finished rows whatever the scores are
                self._mask[row] = -1
            else:
                llguidance.torch.fill_next_token_bitmask(matcher, self._mask, row)
        bits = np.unpackbits(self._mask.numpy().view(np.uint8), axis=1, bitorder="little")[:, : scores.shape[1]]
        return scores.masked_fill(torch.from_numpy(bits == 0).to(scores.device), -math.inf)


class Probabilities(LogitsProcessor):
    """Notes what the model itself thought of every token that was chosen; changes nothing."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []  # log-probabilities, (B,) per written token but the last
        self._latest: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores_BV as they are."""
        if self._latest is not None:
            self.chosen.append(self._latest.gather(1, input_ids[:, -1:]).squeeze(1).cpu())
        self._latest = torch.log_softmax(scores.float(), dim=-1)
        return scores


@lru_cache(maxsize=1)
def _grammar() -> str:
    grammar = llguidance.LLMatcher.grammar_from_lark(scene_grammar())
    wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, None)
    assert not wrong, messages
    return grammar


@lru_cache(maxsize=4)
def _known(tokenizer: Any) -> llguidance.LLTokenizer:
    return llguidance.hf.from_tokenizer(tokenizer, eos_token=tokenizer.eos_token_id)


@torch.inference_mode()
def write(
    adapter: Adapter,
    images: Sequence[Image],
    masks: Sequence[Image | None],
    constraint: Constraint = Constraint.none,
) -> list[Caption]:
    """Caption one batch, with the weights as they are (a model in training is put back into training)."""
    model = adapter.model
    training = model.training
    model.eval()
    try:
        batch = {name: tensor.to(model.device) for name, tensor in adapter.generate_batch(images, masks).items()}
        given, lead = adapter.lead(batch)
        likely, processors = Probabilities(), LogitsProcessorList()
        processors.append(likely)  # first: it is to see the model's own opinion
        if constraint is Constraint.scene:
            processors.append(SceneConstraint(adapter.tokenizer, len(images), given, lead))
        ids_BT = model.generate(**batch, logits_processor=processors)
    finally:
        model.train(training)
    written_BT = ids_BT[:, given:].cpu()
    return [_caption(adapter.tokenizer, row, likely, i) for i, row in enumerate(written_BT)]


def _caption(tokenizer: Any, ids_T: Tensor, likely: Probabilities, row: int) -> Caption:
    """The words of one row up to its end token, with the confidence of every slot."""
    ids = ids_T.tolist()
    ended = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    text = _text(tokenizer, ids)
    spans = slot_spans(text.strip())
    if not spans:
        return Caption(text.strip(), truncated=not ended)
    skipped = len(text) - len(text.lstrip())
    ends = [len(_text(tokenizer, ids[: count + 1])) - skipped for count in range(len(ids))]
    log_probabilities = [step[row].item() for step in likely.chosen[: len(ids)]]
    confidence: dict[str, float] = {}
    for slot, begin, end in spans:
        starts = [0, *ends[:-1]]
        inside = [lp for a, b, lp in zip(starts, ends, log_probabilities, strict=False) if a < end and b > begin]
        confidence[slot] = confidence.get(slot, 1.0) * math.exp(sum(inside))
    return Caption(text.strip(), truncated=not ended, confidence=confidence)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

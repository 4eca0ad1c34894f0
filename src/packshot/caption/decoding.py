"""Writing captions with a model: in the scene grammar if asked, with the probability of every slot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import lru_cache
from typing import TYPE_CHECKING

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from packshot.caption.models.adapter import Adapter, Caption, token_id
from packshot.config.schema import Constraint
from packshot.lists import map_values
from packshot.runs.cores import cores
from packshot.scene.decoding_grammar import scene_grammar
from packshot.scene.grammar import slot_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SceneConstraint(LogitsProcessor):
    """Leaves every row only the tokens with which its text can still become a caption in the scene grammar.

    What may follow is worked out in a thread of its own as soon as a token is written (:meth:`follow`), while the
    network already reads that token.

    given: number of ids before the written ones. lead: ids that are written before the caption itself. Use a new one
    for every call of ``generate``, with one beam, because the state of a row belongs to its place in the batch.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: int, given: int, lead: Sequence[int]) -> None:
        self._given = given
        self._lead = list(lead)
        known = known_tokenizer(tokenizer)
        self._matchers = [llguidance.LLMatcher(known, compiled_grammar()) for _ in range(rows)]
        self._mask = llguidance.numpy.allocate_token_bitmask(rows, known.vocab_size)
        self._workers = llguidance.LLExecutor(cores())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._following = self._thread.submit(self._fill)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def follow(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """For ``stopping_criteria``, which are asked after each token and before the network runs again: (B,), False.

        scores: not read.
        """
        if input_ids.shape[1] - self._given > len(self._lead):
            latest_B = input_ids[:, -1].to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event() if input_ids.is_cuda else None
            self._following = self._thread.submit(self._consume, latest_B, copied)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _consume(self, latest_B: Tensor, copied: torch.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for matcher, token in zip(self._matchers, latest_B.tolist(), strict=True):
            if not matcher.is_stopped():
                matcher.consume_token(token)
        self._fill()

    def _fill(self) -> None:
        going = []
        for row, matcher in enumerate(self._matchers):
            if matcher.is_stopped():  # generate() pads a finished row and ignores its scores
                self._mask[row] = -1
            else:
                going.append((matcher, row))
        if going:  # none: generate() may ask once more before it stops
            llguidance.numpy.fill_next_token_bitmask_par(self._workers, going, self._mask)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores_BV with -inf for tokens that may not follow."""
        written = input_ids.shape[1] - self._given
        if written < len(self._lead):
            only = torch.full_like(scores, -math.inf)
            only[:, self._lead[written]] = 0.0
            return only
        self._following.result()
        bits = np.unpackbits(self._mask.view(np.uint8), axis=1, bitorder="little")[:, : scores.shape[1]]
        return scores.masked_fill(torch.from_numpy(bits == 0).to(scores.device), -math.inf)


class Probabilities(LogitsProcessor):
    """Records the probability that the model itself gave to every chosen token; changes no score."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []  # log-probabilities, (B,) per written token but the last, where the model is
        self._latest: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores_BV, unchanged."""
        if self._latest is not None:
            self.chosen.append(self._latest.gather(1, input_ids[:, -1:]).squeeze(1))
        self._latest = torch.log_softmax(scores.float(), dim=-1)
        return scores


@lru_cache(maxsize=1)
def compiled_grammar() -> str:
    """The scene grammar as llguidance reads it."""
    grammar = llguidance.LLMatcher.grammar_from_lark(scene_grammar())
    wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, None)
    assert not wrong, messages
    return grammar


@lru_cache(maxsize=4)
def known_tokenizer(tokenizer: PreTrainedTokenizerFast) -> llguidance.LLTokenizer:
    """A tokenizer as llguidance reads it."""
    return llguidance.hf.from_tokenizer(tokenizer, eos_token=token_id(tokenizer, "eos_token_id"))


@torch.inference_mode()
def write(
    adapter: Adapter,
    images: Sequence[Image],
    masks: Sequence[Image | None],
    constraint: Constraint = Constraint.none,
) -> list[Caption]:
    """Caption one batch in eval mode; a model in training is put back into training mode."""
    model = adapter.model
    training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.callback(model.train, training)
        batch = map_values(lambda tensor: tensor.to(model.device), adapter.generate_batch(images, masks))
        given, lead = adapter.lead(batch)
        probabilities = Probabilities()
        processors = LogitsProcessorList([probabilities])  # first, so that it sees the scores before the constraint
        criteria = StoppingCriteriaList()
        if constraint is Constraint.scene:
            held = stack.enter_context(closing(SceneConstraint(adapter.tokenizer, len(images), given, lead)))
            processors.append(held)
            criteria.append(held.follow)
        ids_BT = model.generate(**batch, logits_processor=processors, stopping_criteria=criteria)
    chosen_BT = torch.stack(probabilities.chosen, dim=1).tolist() if probabilities.chosen else [[] for _ in images]
    captions: list[Caption] = []
    for ids_T, chosen_T in zip(ids_BT[:, given:].tolist(), chosen_BT, strict=True):
        captions.append(to_caption(adapter.tokenizer, ids_T, chosen_T))
    return captions


def to_caption(tokenizer: PreTrainedTokenizerFast, ids: list[int], log_probabilities: list[float]) -> Caption:
    """The words of one row up to its end token, with the confidence of every slot.

    log_probabilities: of the ids, in order.
    """
    end = token_id(tokenizer, "eos_token_id")
    ended = end in ids
    if ended:
        ids = ids[: ids.index(end)]
    text = decode(tokenizer, ids)
    spans = slot_spans(text.strip())
    if not spans:
        return Caption(text.strip(), truncated=not ended)
    # Where each token's letters begin and end in the stripped text.
    skipped = len(text) - len(text.lstrip())
    ends = [len(decode(tokenizer, ids[: count + 1])) - skipped for count in range(len(ids))]
    starts = [0, *ends[:-1]]
    confidence: dict[str, float] = {}
    for slot, begin, end in spans:
        total = 0.0
        for first, last, log_probability in zip(starts, ends, log_probabilities, strict=False):
            if first < end and last > begin:
                total += log_probability
        confidence[slot] = confidence.get(slot, 1.0) * math.exp(total)
    return Caption(text.strip(), truncated=not ended, confidence=confidence)


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of some ids, without special tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list only for a list of rows
    return text

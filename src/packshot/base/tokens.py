"""The part of a text that the text encoders read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lost_words(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The end of a text that lies beyond a CLIP tokenizer's 77 tokens, in its spelling; "" if all of it is read."""
    ids = tokenizer(text, verbose=False).input_ids
    limit = tokenizer.model_max_length
    return tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else ""

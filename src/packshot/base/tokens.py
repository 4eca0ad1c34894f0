"""The part of a text that the text encoders read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def lost_words(tokenizer: PreTrainedTokenizerBase, text: str, chunks: int = 1) -> str:
    """The end of a text that is not read, in the tokenizer's spelling; "" if all of it is.

    chunks: how many chunks of 77 tokens, begin and end counted, are read.
    """
    ids = tokenizer(text, verbose=False).input_ids[1:-1]
    read = chunks * (tokenizer.model_max_length - 2)
    return tokenizer.decode(ids[read:]).strip()

"""What the text encoders read of a text."""

from __future__ import annotations

from typing import Any


def lost_words(tokenizer: Any, text: str) -> str:
    """The tail of a text that lies beyond a CLIP tokenizer's 77 tokens, as it spells it; "" when all is read."""
    ids = tokenizer(text, verbose=False).input_ids
    limit = tokenizer.model_max_length
    return tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else ""

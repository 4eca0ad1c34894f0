"""Prompts of more than 77 tokens, and words with weights: encoded in chunks whose embeddings follow each other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "(word:1.3)", as other tools write it; brackets without a number, and those behind a backslash, are text
WEIGHTED = re.compile(r"(?<!\\)\(([^()]+):(\d+(?:\.\d+)?)(?<!\\)\)")


@dataclass(frozen=True)
class Piece:
    """A part of a prompt, and how much it counts; 1 is as usual."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Embedded:
    """prompt_embeds_1LD: of all chunks. pooled_1D: of the first."""

    prompt_embeds_1LD: Tensor
    pooled_1D: Tensor


def split_weights(prompt: str) -> list[Piece]:
    """A prompt as its pieces; without ``(word:1.3)`` it is one piece."""
    pieces = []
    end = 0
    for found in WEIGHTED.finditer(prompt):
        pieces.append(Piece(prompt[end : found.start()]))
        pieces.append(Piece(found[1], float(found[2])))
        end = found.end()
    pieces.append(Piece(prompt[end:]))
    return [piece for piece in pieces if piece.text.strip()] or [Piece(prompt)]


def read_tokens(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> tuple[list[int], list[float]]:
    """The tokens of a prompt without those of begin and end, and the weight of each."""
    ids: list[int] = []
    weights: list[float] = []
    for piece in pieces:
        text = piece.text.replace("\\(", "(").replace("\\)", ")")
        found = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += found
        weights += [piece.weight] * len(found)
    return ids, weights


def count_chunks(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece]) -> int:
    """How many chunks a prompt needs; an empty one needs one."""
    room = tokenizer.model_max_length - 2
    return max(1, -(-len(read_tokens(tokenizer, pieces)[0]) // room))


def chunk_rows(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece], chunks: int) -> tuple[Tensor, Tensor]:
    """Token ids and weights, each (chunks, 77); what does not fit into the chunks is left out."""
    length = tokenizer.model_max_length
    room = length - 2
    ids, weights = read_tokens(tokenizer, pieces)
    rows = []
    scales = []
    for number in range(chunks):
        part = ids[number * room : (number + 1) * room]
        scale = weights[number * room : (number + 1) * room]
        padding = length - 1 - len(part)
        rows.append([tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * (padding - 1)])
        scales.append([1.0, *scale, *[1.0] * padding])
    return torch.tensor(rows), torch.tensor(scales)


def encode_rows(encoder: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What SDXL takes from a text encoder: the last hidden state but one, (n, 77, D), and its first output."""
    out = encoder(ids.to(encoder.device), output_hidden_states=True)
    return out.hidden_states[-2], out[0]


@torch.no_grad()
def embed(pipe: Any, pieces: list[Piece], chunks: int) -> Embedded:
    """Embeddings of a prompt in a number of chunks.

    A token of weight w lies w times as far from the embedding of an empty prompt at its place.
    """
    states = []
    pooled = torch.empty(0)
    parts = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for tokenizer, encoder in parts:
        ids, weights = chunk_rows(tokenizer, pieces, chunks)
        hidden, first = encode_rows(encoder, ids)
        if bool((weights != 1).any()):
            empty, _ = encode_rows(encoder, chunk_rows(tokenizer, [Piece("")], 1)[0])
            hidden = empty + weights.to(hidden)[..., None] * (hidden - empty)
        states.append(hidden.reshape(1, -1, hidden.shape[-1]))
        pooled = first[:1]
    return Embedded(torch.cat(states, dim=-1), pooled)

"""Tokenizers of the mini family: CLIP's own byte-pair encoding, and a small byte-level BPE for Florence-2."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from packshot.errors import PackshotError
from packshot.lists import ending

BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SIZE = 49408
# The rest of the vocabulary is the 256 bytes twice (inside a word, at its end) and two special tokens.
MERGE_COUNT = VOCABULARY_SIZE - 2 * 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"


def read_clip_merges(source: Path) -> list[str]:
    """The 48,894 merges of CLIP's BPE as "left right" lines, most frequent first.

    source: ``bpe_simple_vocab_16e6.txt.gz`` itself, or a wheel that contains it (open-clip-torch, MIT).

    Raises:
        PackshotError: the file is missing, holds no such table, or the table has the wrong length.
    """
    hint = f"pass the wheel of open-clip-torch or its {BPE_FILE} (python -m pip download --no-deps open-clip-torch)"
    if not source.is_file():
        raise PackshotError(f"CLIP's merge table {source} does not exist", hint=hint)
    packed = source.read_bytes()
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as wheel:
            members = ending(wheel.namelist(), BPE_FILE)
            if not members:
                raise PackshotError(f"{source} contains no {BPE_FILE}", hint=hint)
            packed = wheel.read(members[0])
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = lines[1 : MERGE_COUNT + 1]
    if len(merges) != MERGE_COUNT or any(len(line.split()) != 2 for line in merges):
        raise PackshotError(f"{source} is not CLIP's merge table: {len(merges)} lines of {MERGE_COUNT}", hint=hint)
    return merges


def clip_vocabulary(merges: list[str]) -> dict[str, int]:
    """Token to id, in the order CLIP was trained with: bytes, bytes that end a word, merges, special tokens."""
    tokens = list(bytes_to_unicode().values())
    tokens += [char + "</w>" for char in tokens]
    tokens += [line.replace(" ", "") for line in merges]
    tokens += [START, END]
    return dict(zip(tokens, range(len(tokens)), strict=True))


def save_clip_tokenizers(merges: list[str], folder: Path) -> None:
    """Write ``tokenizer`` (pads with the end token) and ``tokenizer_2`` (pads with "!", id 0), SDXL's pair."""
    vocabulary = clip_vocabulary(merges)
    pairs = list(map(tuple, map(str.split, merges)))
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        part = folder / name
        # the class takes pairs, its annotation only knows lines
        tokenizer = CLIPTokenizer(vocabulary, pairs, pad_token=pad, model_max_length=77)  # pyright: ignore
        tokenizer.save_pretrained(part)
        # The two classic files hold the same as tokenizer.json in a third of its size, and older tools read them.
        (part / "tokenizer.json").unlink()
        (part / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        (part / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def train_florence_tokenizer(
    texts: Iterable[str], vocabulary_size: int, places: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BART's ids ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2 and Florence-2's ``<image>`` token.

    places: also its thousand ``<loc_…>`` tokens.
    """
    special = ["<s>", "<pad>", "</s>", "<unk>", "<image>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([f"<loc_{bin}>" for bin in range(1000 * places)])
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )


# The wire form of Llama 3's conversations, with a picture before the words of a turn.
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)


def train_llama_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3.2 Vision's special tokens.

    As there, the tokenizer begins every text with a start token, and ``<|image|>`` comes last: its id is one more than
    the output head has rows.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(_LLAMA_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    core.add_special_tokens(["<|image|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        extra_special_tokens={"image_token": "<|image|>"},
        model_max_length=512,
    )

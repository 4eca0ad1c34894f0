"""What is unusual about a training set or its settings, found before the first step."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from packshot.base.tokens import lost_words
from packshot.config.optimizers import OPTIMIZERS
from packshot.config.schema import TrainScript
from packshot.imaging import framing
from packshot.runs.progress import progress
from packshot.train.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_MASKS = 1000  # masks that are decoded; of a larger set every n-th
NAMED = 5  # samples that a finding names
TINY = 0.01  # share of the picture below which a product is tiny
FULL = 0.98  # share of the picture above which a mask is meaningless
MOST_UPSCALED = 1.5  # times
MOST_EPOCHS = 100


@dataclass(frozen=True)
class Finding:
    """Something that deserves a look. samples: ids, at most ``NAMED``."""

    name: str
    says: str
    samples: list[str]


def findings(
    examples: Examples, held_out: Sequence[str], config: TrainScript, processes: int, shown: int | None = None
) -> list[Finding]:
    """All findings of a run. held_out: ids of the validation set. shown: samples of an epoch; None: each once."""
    train = config.train
    per_step = train.batch_size * train.gradient_accumulation_steps * processes
    return [
        *_captions(examples),
        *_pictures(examples),
        *small_buckets(examples, per_step),
        *_held_out(examples, held_out),
        *_settings(config, shown or len(examples), per_step),
    ]


def _of(name: str, ids: Sequence[str], total: int, says: str) -> Iterator[Finding]:
    """A finding about some of the samples, if there are any."""
    if ids:
        yield Finding(name, f"{len(ids)} of {total} {says}", list(ids[:NAMED]))


def _captions(examples: Examples) -> Iterator[Finding]:
    texts = list(zip(examples.ids, examples.rows.texts, strict=False))
    total = len(examples)
    empty = [id for id, text in texts if not (text or "").strip()]
    yield from _of("captions_empty", empty, total, "captions are empty")
    counts = Counter(text for _, text in texts)
    twice = [id for id, text in texts if counts[text] > 1]
    yield from _of("captions_duplicate", twice, total, f"captions occur more than once ({len(counts)} different ones)")
    tokenizer = examples.encoder.parts.tokenizer
    chunks = examples.encoder.prompt_chunks
    lost = {text: lost_words(tokenizer, text, chunks) for text in counts if text}
    cut = [id for id, text in texts if lost.get(text)]
    longest = kept_words(tokenizer, max(lost, key=lambda text: len(lost[text]), default=""), chunks)[1]
    limit = chunks * (tokenizer.model_max_length - 2)
    yield from _of(
        "captions_too_long", cut, total, f"captions exceed the {limit} tokens that are read; lost: {longest!r}"
    )


def _pictures(examples: Examples) -> Iterator[Finding]:
    """Masks and enlargement, on every sample of a small set and every n-th of a large one."""
    indices = range(0, len(examples), max(1, len(examples) // MOST_MASKS))
    found: dict[str, list[str]] = {}
    scales = []
    with progress("looking at masks", len(indices)) as advance:
        for index in indices:
            names, scale = _picture(examples, index)
            scales.append(scale)
            for name in names:
                found.setdefault(name, []).append(examples.ids[index])
            advance()
    says = {
        "mask_empty": "masks have no product",
        "mask_full": f"masks cover more than {FULL:.0%} of the picture",
        "product_tiny": f"products cover less than {TINY:.0%} of the picture",
        "product_at_frame": "products touch the frame: the model learns products that go on outside",
        "upscaled": f"pictures are enlarged more than {MOST_UPSCALED} times (at most {max(scales):.1f})",
    }
    for name, text in says.items():
        yield from _of(name, found.get(name, []), len(indices), text)


def _picture(examples: Examples, index: int) -> tuple[list[str], float]:
    """Names of what is unusual about a sample, and how many times it is enlarged."""
    mask = examples.rows.read(index, ("mask",))["mask"]
    size = examples.rows.sizes[index]
    target = examples.encoder.shapes[examples.groups[index]]
    frame = framing.plan(size, target, framing.product_box(mask))
    scale = frame.resized[0] / size[0]
    names = ["upscaled"] if scale > MOST_UPSCALED else []
    if mask is None:
        return names, scale
    inside = np.asarray(mask) >= 128
    share = inside.mean()
    edge = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    tests = {
        "mask_empty": share == 0,
        "mask_full": share > FULL,
        "product_tiny": 0 < share < TINY,
        "product_at_frame": share <= FULL and edge.any(),
    }
    return [*names, *filter(tests.get, tests)], scale


def small_buckets(examples: Examples, per_step: int) -> Iterator[Finding]:
    """Buckets with fewer samples than a step takes. per_step: over all processes and micro-steps."""
    counts = Counter(examples.groups)
    for group, count in counts.items():
        if count < per_step:
            height, width = examples.encoder.shapes[group]
            members = [id for id, other in zip(examples.ids, examples.groups, strict=True) if other == group]
            says = f"bucket {width}x{height} has {count} samples for steps of {per_step}: they repeat within a step"
            yield Finding("bucket_small", says, members[:NAMED])


def _held_out(examples: Examples, held_out: Sequence[str]) -> Iterator[Finding]:
    known = set(examples.ids)
    both = [id for id in held_out if id in known]
    yield from _of("validated_on_training_data", both, len(held_out), "validation samples are also trained on")


def _settings(config: TrainScript, count: int, per_step: int) -> Iterator[Finding]:
    train = config.train
    kind = config.optim.kind
    low, high = OPTIMIZERS[kind.name].usual_rates
    if not low <= train.learning_rate <= high:
        usual = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        says = f"train.learning_rate={train.learning_rate:g} is unusual for optim={kind} (usual: {usual})"
        yield Finding("learning_rate", says, [])
    epochs = train.max_steps * per_step / count
    if epochs > MOST_EPOCHS:
        says = f"every sample is seen {epochs:.0f} times: the model will know them by heart"
        yield Finding("many_epochs", says, [])
    if epochs < 1:
        says = f"{1 - epochs:.0%} of the samples are never seen in train.max_steps={train.max_steps}"
        yield Finding("not_all_seen", says, [])


def kept_words(tokenizer: PreTrainedTokenizerBase, caption: str, chunks: int = 1) -> tuple[str, str]:
    """A caption cut in two: the words that the text encoders read to their end in so many chunks, and the rest."""
    words = caption.split()
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        read = not lost_words(tokenizer, " ".join(words[:middle]), chunks)
        low, high = (middle, high) if read else (low, middle - 1)
    return " ".join(words[:low]), " ".join(words[low:])


def shares(examples: Examples) -> dict[str, float]:
    """Figures about captions: mean length in words, and the share of those that are not repeated."""
    texts = examples.rows.texts[: len(examples)]
    return {
        "words_per_caption": statistics.fmean(len((text or "").split()) for text in texts),
        "distinct_captions": len(set(texts)) / len(texts),
    }

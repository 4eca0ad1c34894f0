"""``task=caption``: write the captions of a whole dataset, shard by shard, going on after every broken row."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image

from packshot.caption.data import (
    ERROR_COLUMN,
    CaptionedRow,
    Journal,
    decode_row,
    read_captions,
    read_shard,
    write_captions,
)
from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.errors import ConfigError, PackshotError
from packshot.runs.files import sha256
from packshot.runs.folder import log
from packshot.scene import Scene
from packshot.scene.scores import product_words


def judge(caption: Caption) -> CaptionedRow:
    """A caption as a row, or the reason why it may not become training data, with its wording."""
    if caption.error:
        return CaptionedRow(error=caption.error)
    if caption.truncated:
        return CaptionedRow(error=f"was cut at captioner.max_new_tokens: {caption.text}")
    if words := product_words(caption.text):
        return CaptionedRow(error=f"names the product ({', '.join(words)}): {caption.text}")
    if Scene.parse(caption.text).scene == Scene():
        return CaptionedRow(error=f"describes no scene: {caption.text}")
    return CaptionedRow(text=caption.text, confidence=caption.confidence)


def caption_shard(
    source: Path, target: Path, captioner: Captioner, identity: str, advance: Callable[..., None] = lambda n: None
) -> dict[str, float]:
    """Caption one shard into ``target``; rows that were captioned before, without an error, are kept.

    identity: names the captioner and its settings. Captions of another identity, or of a shard with other content,
        are not reused.
    advance: told how many rows are done, as they are.
    Returns: rows, captioned (now), kept, errors, images_per_second.
    """
    started = time.monotonic()
    key = json.dumps({"captioner": identity, "input": sha256(source.read_bytes())}, sort_keys=True)
    table, journal = read_shard(source), Journal(target, key)
    earlier = read_captions(target, key)
    rows = earlier or [CaptionedRow(error="not captioned yet")] * table.num_rows
    for index, row in journal.read().items():
        rows[index] = row
    todo = _by_size(table, [index for index, row in enumerate(rows) if row.error is not None])
    advance(len(rows) - len(todo))
    for start in range(0, len(todo), captioner.batch_size):
        part = todo[start : start + captioner.batch_size]
        found = dict(zip(part, _caption_rows(table, part, captioner), strict=True))
        journal.add(found)
        for index, row in found.items():
            rows[index] = row
        advance(len(part))
    if todo or earlier is None:
        write_captions(target, table, rows, key)
    journal.remove()
    errors = sum(row.error is not None for row in rows)
    rate = len(todo) / max(time.monotonic() - started, 1e-9)
    counts = {"rows": len(rows), "captioned": len(todo), "kept": len(rows) - len(todo), "errors": errors}
    return {**counts, "images_per_second": rate}


def _by_size(table: pa.Table, indices: list[int]) -> list[int]:
    """Pictures of one shape side by side, so that a batch carries little padding; as they are where no size is told."""
    if not {"width", "height"} <= set(table.column_names):
        return indices
    sizes = list(zip(table.column("height").to_pylist(), table.column("width").to_pylist(), strict=True))
    return sorted(indices, key=lambda index: sizes[index])


def _caption_rows(table: pa.Table, indices: Sequence[int], captioner: Captioner) -> list[CaptionedRow]:
    """Captions of some rows; one that cannot be decoded or captioned becomes an error and does not stop the others."""
    samples: dict[int, tuple[Image, Image | None]] = {}
    results: dict[int, CaptionedRow] = {}
    for index in indices:
        try:
            samples[index] = decode_row(table, index)
        except PackshotError as error:
            results[index] = CaptionedRow(error=error.args[0])
    results |= write_rows(samples, captioner)
    return [results[index] for index in indices]


def write_rows(samples: dict[int, tuple[Image, Image | None]], captioner: Captioner) -> dict[int, CaptionedRow]:
    """Captions of (RGB image, mask or None) by index; what fails or may not be used carries its error.

    Raises:
        ConfigError: what would fail every row alike, such as a server that refuses the key.
    """
    if not samples:
        return {}
    try:
        captions = captioner.write([image for image, _ in samples.values()], [mask for _, mask in samples.values()])
    except ConfigError:
        raise
    except Exception as error:  # whatever a model raises concerns a row; the batch is halved until the row is known
        if len(samples) == 1:
            index = next(iter(samples))
            log.warning("row %d: %s: %s", index, type(error).__name__, error)
            return {index: CaptionedRow(error=f"{type(error).__name__}: {error}")}
        items = list(samples.items())
        half = len(items) // 2
        return write_rows(dict(items[:half]), captioner) | write_rows(dict(items[half:]), captioner)
    return {index: judge(caption) for index, caption in zip(samples, captions, strict=True)}


def summary(folder: Path, files: Sequence[Path]) -> dict[str, Any]:
    """Counts over the written shards: rows, captioned, and the errors by their first words.

    Raises:
        PackshotError: not one row has a caption.
    """
    errors = [
        error
        for file in files
        for error in pq.read_table(folder / file.name, columns=[ERROR_COLUMN]).column(0).to_pylist()
    ]
    reasons = Counter(error.split(":")[0] for error in errors if error is not None)
    if errors and sum(reasons.values()) == len(errors):
        example = next(error for error in errors if error)
        raise PackshotError(
            f"none of {len(errors)} images got a caption; the first: {example}",
            f"The column {ERROR_COLUMN} of {folder} holds every reason.",
        )
    return {"rows": len(errors), "captioned": len(errors) - sum(reasons.values()), "errors": dict(reasons)}

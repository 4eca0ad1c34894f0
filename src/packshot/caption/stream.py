"""Captioning shards as one stream: pictures are decoded ahead, and a server always has as many requests as it may."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from PIL.Image import Image

from packshot.caption.data import (
    CaptionedRow,
    Journal,
    decode_row,
    read_captions,
    read_shard,
    texts_of,
    write_captions,
)
from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.dataset import corrections
from packshot.errors import ConfigError, PackshotError
from packshot.runs.cores import cores
from packshot.runs.files import sha256
from packshot.runs.folder import log
from packshot.scene import Scene
from packshot.scene.scores import product_words

A = TypeVar("A")
B = TypeVar("B")
Pictures = tuple[Image, Image | None]  # an RGB image, and the mask of its product
MOST_DECODERS = 8  # threads
_LOOP = re.compile(r"\b(\w+(?:\W+\w+){0,5})(?:\W+\1\b){2,}")  # one to six words, three times in a row


@dataclass(frozen=True)
class Given:
    """The captions that a dataset came with, and what becomes of them.

    origin: names the captioner in what it writes. overwrite: replace them. corrections: a person's words by sample id,
    which count as captions of the source.
    """

    origin: str = ""
    overwrite: bool = False
    corrections: Mapping[str, str] = field(default_factory=dict)

    def apply(self, table: pa.Table) -> pa.Table:
        """The table with the corrections."""
        readable = {"id", "text"} <= set(table.column_names)
        return corrections.apply(table, self.corrections) if readable else table

    def kept(self, table: pa.Table) -> set[int]:
        """The rows whose caption stays."""
        if self.overwrite:
            return set()
        return {index for index, text in enumerate(texts_of(table)) if text is not None}

    def key(self) -> dict[str, object]:
        """What a finished shard depends on. Shards of older versions, which kept no caption, have another key."""
        corrected = json.dumps(sorted(self.corrections.items()))
        return {"overwrite": self.overwrite, "corrections": sha256(corrected.encode())}


NOTHING_GIVEN = Given()


@dataclass
class ShardInWork:
    """A shard whose rows are being captioned.

    rows: outcomes so far. todo: the rows that this run captions. missing: how many of them have no outcome yet.
    earlier: an earlier run has written the shard, under the same key.
    """

    target: Path
    key: str
    table: pa.Table
    texts: list[str | None]
    kept: set[int]
    rows: list[CaptionedRow]
    todo: list[int]
    journal: Journal
    earlier: bool
    started: float
    missing: int = 0

    def take(self, found: Mapping[int, CaptionedRow]) -> None:
        """Record the outcomes of some rows."""
        self.journal.add(dict(found))
        for index, row in found.items():
            self.rows[index] = row
        self.missing -= len(found)

    def finish(self, origin: str) -> dict[str, float]:
        """Write the shard. Returns: rows, captioned (now), kept, errors, with_caption (in the source),
        images_per_second."""
        if self.todo or not self.earlier:
            write_captions(self.target, self.table, self.rows, self.key, origin, self.kept)
        self.journal.remove()
        return {
            "rows": len(self.rows),
            "captioned": len(self.todo),
            "kept": len(self.rows) - len(self.todo),
            "errors": sum(row.error is not None for row in self.rows),
            "with_caption": sum(text is not None for text in self.texts),
            "images_per_second": len(self.todo) / max(time.monotonic() - self.started, 1e-9),
        }


def open_shard(source: Path, target: Path, identity: str, given: Given) -> ShardInWork:
    """Read a shard, and what earlier runs have captioned of it.

    identity: names the captioner and its settings. Captions of another identity, or of a shard with other content,
        are not reused.
    """
    started = time.monotonic()
    key = json.dumps({"captioner": identity, "input": sha256(source.read_bytes()), **given.key()}, sort_keys=True)
    table = given.apply(read_shard(source))
    texts = texts_of(table)
    kept = given.kept(table)
    journal = Journal(target, key)
    earlier = read_captions(target, key)
    rows = earlier or [CaptionedRow(error="not captioned yet")] * table.num_rows
    for index, row in journal.read().items():
        rows[index] = row
    for index in kept:
        rows[index] = CaptionedRow(texts[index])
    todo = by_size(table, [index for index, row in enumerate(rows) if row.error is not None])
    return ShardInWork(
        target, key, table, texts, kept, rows, todo, journal, earlier is not None, started, missing=len(todo)
    )


def by_size(table: pa.Table, indices: list[int]) -> list[int]:
    """Rows sorted by the shape of their picture, so that batches need little padding; unsorted without such columns."""
    if not {"width", "height"} <= set(table.column_names):
        return indices
    sizes = list(zip(table.column("height").to_pylist(), table.column("width").to_pylist(), strict=True))
    return sorted(indices, key=lambda index: sizes[index])


@dataclass(frozen=True)
class DecodedRow:
    """A row on its way to the captioner. pictures: None where it cannot be decoded, for the reason in ``error``."""

    shard: ShardInWork
    index: int
    pictures: Pictures | None
    error: str = ""


def caption_shard(
    source: Path,
    target: Path,
    captioner: Captioner,
    identity: str,
    advance: Callable[..., None] = lambda n: None,
    given: Given = NOTHING_GIVEN,
) -> dict[str, float]:
    """:func:`caption_shards` for one shard; returns its counts."""
    return caption_shards([(source, target)], captioner, identity, advance, given)[0][1]


def caption_shards(
    files: Sequence[tuple[Path, Path]],
    captioner: Captioner,
    identity: str,
    advance: Callable[..., None] = lambda n: None,
    given: Given = NOTHING_GIVEN,
) -> list[tuple[Path, dict[str, float]]]:
    """Caption shards, each a (source, target); rows that an earlier run captioned without an error are kept.

    So are captions that the sources have, unless ``given`` says otherwise. A row that cannot be decoded or captioned
    gets an error and does not stop the others. The next shard is read, and its pictures are decoded, while the
    captioner still works on the one before.

    identity: as in :func:`open_shard`. advance: called with the number of rows that were finished.
    Returns: each target with the counts of :meth:`ShardInWork.finish`.
    """
    counts: list[tuple[Path, dict[str, float]]] = []

    def opened() -> Iterator[ShardInWork]:
        read = partial(open_shard, identity=identity, given=given)
        with closing(ahead_of(lambda pair: read(*pair), files, threads=1, count=1)) as shards:
            for shard in shards:
                advance(len(shard.rows) - len(shard.todo))
                if not shard.missing:
                    counts.append((shard.target, shard.finish(given.origin)))
                yield shard

    def rows_to_do() -> Iterator[tuple[ShardInWork, int]]:
        for shard in opened():
            for index in shard.todo:
                yield shard, index

    workers = min(MOST_DECODERS, cores())
    decode = partial(decode_for, captioner)
    reading = ahead_of(lambda row: decode(*row), rows_to_do(), workers, captioner.batch_size + 2 * workers)
    with closing(reading) as decoded, closing(captioned(decoded, captioner)) as parts:
        for shard, found in parts:
            shard.take(found)
            if not shard.missing:
                counts.append((shard.target, shard.finish(given.origin)))
            advance(len(found))
    return counts


def decode_for(captioner: Captioner, shard: ShardInWork, index: int) -> DecodedRow:
    """Decode one row, no larger than the captioner looks at."""
    try:
        image, mask = decode_row(shard.table, index)
    except PackshotError as error:
        return DecodedRow(shard, index, None, str(error.args[0]))
    if captioner.longest_side and max(image.size) > captioner.longest_side:
        image.thumbnail((captioner.longest_side, captioner.longest_side))
        mask = mask.resize(image.size) if mask else None
    return DecodedRow(shard, index, (image, mask))


def captioned(
    rows: Iterator[DecodedRow], captioner: Captioner
) -> Generator[tuple[ShardInWork, dict[int, CaptionedRow]]]:
    """The outcomes of rows, as many at a time as went through the captioner together.

    With ``captioner.at_once`` in work at a time they come in the order in which they are finished.
    """
    write = partial(caption_part, captioner)
    parts = batched(rows, captioner.batch_size)
    if captioner.at_once == 1:
        yield from map(write, parts)
        return
    pool = ThreadPoolExecutor(captioner.at_once)
    pending: set[Future[tuple[ShardInWork, dict[int, CaptionedRow]]]] = set()
    try:
        for part in parts:
            pending.add(pool.submit(write, part))
            # one more than there are threads: whoever has finished finds the next part waiting
            while len(pending) > captioner.at_once:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from map(Future.result, done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from map(Future.result, done)
    finally:
        pool.shutdown(cancel_futures=True)


def batched(rows: Iterable[DecodedRow], size: int) -> Iterator[list[DecodedRow]]:
    """The rows, up to ``size`` of one shard at a time."""
    for _, members in groupby(rows, key=lambda row: id(row.shard)):
        part: list[DecodedRow] = []
        for row in members:
            part.append(row)
            if len(part) == size:
                yield part
                part = []
        if part:
            yield part


def ahead_of(function: Callable[[A], B], items: Iterable[A], threads: int, count: int) -> Generator[B]:
    """The function's results in order, made by threads, up to ``count`` of them ahead of the caller.

    The items themselves are taken by the caller's thread.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def caption_part(captioner: Captioner, part: Sequence[DecodedRow]) -> tuple[ShardInWork, dict[int, CaptionedRow]]:
    """The shard of some rows, and the outcome of each of them."""
    samples: dict[int, Pictures] = {}
    results: dict[int, CaptionedRow] = {}
    for row in part:
        if row.pictures is None:
            results[row.index] = CaptionedRow(error=row.error)
        else:
            samples[row.index] = row.pictures
    return part[0].shard, results | write_rows(samples, captioner)


def write_rows(samples: dict[int, Pictures], captioner: Captioner) -> dict[int, CaptionedRow]:
    """Captions of (RGB image, mask or None) by index; a caption that fails or may not be used carries its error.

    Raises:
        ConfigError: every row would fail in the same way, because a server refuses the key, for example.
    """
    if not samples:
        return {}
    try:
        captions = captioner.write(*zip(*samples.values(), strict=True))
    except ConfigError:
        raise
    except Exception as error:  # any error of a model is blamed on a row; the batch is halved until the row is found
        if len(samples) == 1:
            index = next(iter(samples))
            log.warning("row %d: %s: %s", index, type(error).__name__, error)
            return {index: CaptionedRow(error=f"{type(error).__name__}: {error}")}
        items = list(samples.items())
        half = len(items) // 2
        return write_rows(dict(items[:half]), captioner) | write_rows(dict(items[half:]), captioner)
    return dict(zip(samples, map(judge, captions), strict=True))


def judge(caption: Caption) -> CaptionedRow:
    """A caption as a row, or the reason why it may not become training data, with its wording."""
    if caption.error:
        return CaptionedRow(error=caption.error)
    if _LOOP.search(caption.text):
        return CaptionedRow(
            error=f"repeats itself, as an untuned captioner does (captioner.adapter names a tuned one): {caption.text}"
        )
    if caption.truncated:
        return CaptionedRow(error=f"was cut at captioner.max_new_tokens: {caption.text}")
    words = product_words(caption.text)
    if words:
        return CaptionedRow(error=f"names the product ({', '.join(words)}): {caption.text}")
    if Scene.parse(caption.text).scene == Scene():
        return CaptionedRow(error=f"describes no scene: {caption.text}")
    return CaptionedRow(text=caption.text, confidence=caption.confidence)

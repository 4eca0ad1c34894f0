"""``task=caption``: caption a whole dataset, shard by shard; a broken row does not stop the others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import gather_object
from PIL.Image import Image

from packshot.caption.data import (
    ERROR_COLUMN,
    PATIENCE,
    CaptionedRow,
    Journal,
    decode_row,
    read_captions,
    read_shard,
    shard_files,
    texts_of,
    write_captions,
)
from packshot.caption.models.adapter import Caption
from packshot.caption.models.captioner import Captioner
from packshot.caption.models.load import identity, load_captioner
from packshot.caption.scores import first_words
from packshot.config.schema import CaptionVLM
from packshot.dataset import corrections
from packshot.dataset.rows import license_names
from packshot.engine.processes import Session, start
from packshot.errors import ConfigError, PackshotError
from packshot.lists import select, without_none
from packshot.runs.files import replacing_file, sha256
from packshot.runs.folder import log
from packshot.runs.licenses import refuse_rows
from packshot.runs.progress import progress
from packshot.scene import Scene
from packshot.scene.scores import product_words


class Summary(TypedDict):
    """Counts over a captioned dataset.

    captioned: rows that have a caption. stayed: rows whose caption stayed because the captioner failed on them. errors:
    by their first words.
    """

    rows: int
    captioned: int
    stayed: int
    errors: dict[str, int]


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


def caption(config: CaptionVLM) -> None:
    """Caption the dataset ``data.input``; writes its shards with captions, and ``captions.json``."""
    assert config.data.input is not None  # the task's row needs it
    files = shard_files("data.input", config.data.input)
    if config.run.dir and Path(config.run.dir).resolve() == files[0].parent.resolve():
        raise ConfigError(
            f"run.dir={config.run.dir} is data.input itself.", "Name another folder for the captioned dataset."
        )
    refuse_rows(config.licenses, "data.input", config.data.input, shard_licenses(files))
    overwrite = config.captioner.overwrite
    given = Given(config.captioner.kind.name, overwrite, corrections.read(files[0].parent))
    captioner = load_captioner(config.model, config.captioner)
    named = json.dumps(identity(config.model, config.captioner), sort_keys=True)
    # The first process to finish waits for the last, which may need hours more.
    session = start("caption_vlm", config, replace(config.train, process_timeout=PATIENCE))
    rank = session.accelerator.process_index
    mine = files[rank :: session.accelerator.num_processes]
    try:
        found: list[tuple[str, dict[str, float]]] = []
        total = sum(pq.read_metadata(file).num_rows for file in mine)
        with progress("captioning", total, show=session.run is not None) as advance:
            for file in mine:
                counts = caption_shard(file, session.path / file.name, captioner, named, advance, given)
                found.append((file.name, counts))
        found = gather_object(found)
        if session.run and session.tracker:
            for step, (name, counts) in enumerate(sorted(found, key=lambda pair: pair[0])):
                session.run.metrics({"step": step, "shard": name, **counts})
                session.tracker.log(counts, step)
            report(session, files, sum(int(counts["with_caption"]) for _, counts in found), given)
    finally:
        session.finish()


def shard_licenses(files: Sequence[Path]) -> set[str]:
    """The licences of all rows."""
    found: set[str] = set()
    for file in files:
        with pq.ParquetFile(file) as opened:
            found |= set(license_names(opened.read(["license"])))  # a table without columns if the file has none
    return found


def report(session: Session, files: Sequence[Path], with_caption: int, given: Given) -> None:
    """``captions.json``, and the counts on the screen. with_caption: rows that came with one."""
    counts = summary(session.path, files)
    kept = counts["stayed"] if given.overwrite else with_caption
    written = counts["captioned"] - kept
    with replacing_file(session.path / "captions.json") as file:
        file.write_text(json.dumps({**counts, "kept": kept, "written": written}, indent=2) + "\n")
    log.info("%d of %d rows have a caption", counts["captioned"], counts["rows"])
    if given.overwrite:
        log.warning("%d captions of the source are replaced (captioner.overwrite=true)", with_caption - kept)
        if kept:
            log.warning("%d captions of the source stay, because the captioner failed on their images", kept)
        log.info("%d captions written by %s", written, given.origin)
    else:
        log.info("%d captions of the source kept (captioner.overwrite=true replaces them)", kept)
        log.info("%d empty captions filled by %s", written, given.origin)
    for reason, count in counts["errors"].items():
        log.warning("%d rows not captioned: %s", count, reason)
    if counts["errors"]:
        log.info("run.resume=true tries these rows again; their column %s holds the reason", ERROR_COLUMN)


def judge(caption: Caption) -> CaptionedRow:
    """A caption as a row, or the reason why it may not become training data, with its wording."""
    if caption.error:
        return CaptionedRow(error=caption.error)
    if caption.truncated:
        return CaptionedRow(error=f"was cut at captioner.max_new_tokens: {caption.text}")
    words = product_words(caption.text)
    if words:
        return CaptionedRow(error=f"names the product ({', '.join(words)}): {caption.text}")
    if Scene.parse(caption.text).scene == Scene():
        return CaptionedRow(error=f"describes no scene: {caption.text}")
    return CaptionedRow(text=caption.text, confidence=caption.confidence)


def caption_shard(
    source: Path,
    target: Path,
    captioner: Captioner,
    identity: str,
    advance: Callable[..., None] = lambda n: None,
    given: Given = NOTHING_GIVEN,
) -> dict[str, float]:
    """Caption one shard into ``target``; rows that an earlier run captioned without an error are kept.

    So are captions that the source has, unless ``given`` says otherwise.

    identity: names the captioner and its settings. Captions of another identity, or of a shard with other content,
        are not reused.
    advance: called with the number of rows that were finished.
    Returns: rows, captioned (now), kept, errors, with_caption (in the source), images_per_second.
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
    advance(len(rows) - len(todo))
    for part in batched(todo, captioner.batch_size):
        found = dict(zip(part, caption_table_rows(table, part, captioner), strict=True))
        journal.add(found)
        for index, row in found.items():
            rows[index] = row
        advance(len(part))
    if todo or earlier is None:
        write_captions(target, table, rows, key, given.origin, kept)
    journal.remove()
    errors = sum(row.error is not None for row in rows)
    rate = len(todo) / max(time.monotonic() - started, 1e-9)
    counts = {"rows": len(rows), "captioned": len(todo), "kept": len(rows) - len(todo), "errors": errors}
    with_caption = sum(text is not None for text in texts)
    return {**counts, "with_caption": with_caption, "images_per_second": rate}


def batched(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """The indices, ``size`` at a time."""
    for first in range(0, len(indices), size):
        yield indices[first : first + size]


def by_size(table: pa.Table, indices: list[int]) -> list[int]:
    """Rows sorted by the shape of their picture, so that batches need little padding; unsorted without such columns."""
    if not {"width", "height"} <= set(table.column_names):
        return indices
    sizes = list(zip(table.column("height").to_pylist(), table.column("width").to_pylist(), strict=True))
    return sorted(indices, key=lambda index: sizes[index])


def caption_table_rows(table: pa.Table, indices: Sequence[int], captioner: Captioner) -> list[CaptionedRow]:
    """Captions of some rows; a row that cannot be decoded or captioned gets an error and does not stop the others."""
    samples: dict[int, tuple[Image, Image | None]] = {}
    results: dict[int, CaptionedRow] = {}
    for index in indices:
        try:
            samples[index] = decode_row(table, index)
        except PackshotError as error:
            results[index] = CaptionedRow(error=error.args[0])
    results |= write_rows(samples, captioner)
    return list(select(results, indices).values())


def write_rows(samples: dict[int, tuple[Image, Image | None]], captioner: Captioner) -> dict[int, CaptionedRow]:
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


def summary(folder: Path, files: Sequence[Path]) -> Summary:
    """Counts over the written shards.

    Raises:
        PackshotError: not one row has a caption.
    """
    rows = captioned = stayed = 0
    errors: list[str] = []
    for file in files:
        table = pq.read_table(folder / file.name, columns=["text", ERROR_COLUMN])
        failed = table.column(ERROR_COLUMN).to_pylist()
        rows += len(failed)
        errors += without_none(dict(enumerate(failed))).values()
        for text, error in zip(texts_of(table), failed, strict=True):
            captioned += text is not None
            stayed += text is not None and error is not None
    if rows and len(errors) == rows:
        raise PackshotError(
            f"none of {rows} images got a caption; the first: {errors[0]}",
            f"The column {ERROR_COLUMN} of {folder} holds every reason.",
        )
    return {"rows": rows, "captioned": captioned, "stayed": stayed, "errors": first_words(errors)}

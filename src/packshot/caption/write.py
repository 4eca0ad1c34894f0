"""``task=caption``: caption a whole dataset; see :mod:`packshot.caption.stream` for how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import pyarrow.parquet as pq
from accelerate.utils import gather_object

from packshot.caption.data import ERROR_COLUMN, PATIENCE, shard_files, texts_of
from packshot.caption.models.load import identity, load_captioner
from packshot.caption.scores import first_words
from packshot.caption.stream import Given, caption_shards
from packshot.config.schema import CaptionVLM
from packshot.dataset import corrections
from packshot.dataset.rows import license_names
from packshot.engine.processes import Session, start
from packshot.errors import ConfigError, PackshotError
from packshot.lists import without_none
from packshot.runs.files import replacing_file
from packshot.runs.folder import answer
from packshot.runs.licenses import refuse_rows
from packshot.runs.progress import progress


class Summary(TypedDict):
    """Counts over a captioned dataset.

    captioned: rows that have a caption. stayed: rows whose caption stayed because the captioner failed on them. errors:
    by their first words.
    """

    rows: int
    captioned: int
    stayed: int
    errors: dict[str, int]


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
            pairs = [(file, session.path / file.name) for file in mine]
            for target, counts in caption_shards(pairs, captioner, named, advance, given):
                found.append((target.name, counts))
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
    answer.info("%d of %d rows have a caption", counts["captioned"], counts["rows"])
    if given.overwrite:
        answer.warning("%d captions of the source are replaced (captioner.overwrite=true)", with_caption - kept)
        if kept:
            answer.warning("%d captions of the source stay, because the captioner failed on their images", kept)
        answer.info("%d captions written by %s", written, given.origin)
    else:
        answer.info("%d captions of the source kept (captioner.overwrite=true replaces them)", kept)
        answer.info("%d empty captions filled by %s", written, given.origin)
    for reason, count in counts["errors"].items():
        answer.warning("%d rows not captioned: %s", count, reason)
    if counts["errors"]:
        answer.info("run.resume=true tries these rows again; their column %s holds the reason", ERROR_COLUMN)


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

"""Shards on disk: reading the joined rows of several steps, writing one step's rows; a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from packshot.pipeline.step import Outcome, Sample, Step
from packshot.runs.files import replacing_file

T = TypeVar("T")

STEP_METADATA = b"packshot.step"  # key under which a step's file names the step, see Step.identity
BATCH = 16  # rows in memory, and rows per row group: part of the output's bytes
_BOOKKEEPING = (
    pa.field("index", pa.int32()),
    pa.field("input", pa.string()),
    pa.field("kept", pa.bool_()),
    pa.field("reason", pa.string()),
    pa.field("measure", pa.string()),
)


@dataclass(frozen=True)
class Answers:
    """A batch of samples, digests of what the step reads of them, and its outcomes."""

    samples: Sequence[Sample]
    digests: Sequence[str]
    outcomes: Sequence[Outcome]


def split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive slices of ``size``; the last may be shorter. Depends on the items alone."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def batches(items: Iterable[T], size: int = BATCH) -> Iterator[list[T]]:
    """Lists of up to ``size`` consecutive items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_outcomes(file: Path, columns: Sequence[str] | None = None) -> Iterator[Sample]:
    """Rows of one step's file with ``index``, ``kept``, ``reason``, ``measure`` and the step's columns."""
    with pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if columns is not None:
            wanted = {*columns, *pa.schema(_BOOKKEEPING).names}
            names = list(filter(wanted.__contains__, names))
        for batch in parquet.iter_batches(BATCH, columns=names):
            yield from batch.to_pylist()


def read_samples(files: Sequence[Path], columns: Sequence[str] | None = None) -> Iterator[Sample]:
    """Samples that every step kept, with the columns of all of them (of equal names the last step's counts)."""
    first, *rest = map(read_outcomes, files, repeat(columns))
    for row in first:
        sample = dict(row)
        for rows in rest:
            if not sample["kept"]:
                break
            sample |= next(rows)  # a step has one row for every sample that those before it kept
        if sample["kept"]:
            for name in ("input", "kept", "reason", "measure"):
                del sample[name]
            yield sample


def write_outcomes(path: Path, step: Step, answers: Iterable[Answers]) -> tuple[int, int]:
    """Write a step's answers, batch by batch, under a temporary name and rename; returns (rows, rejected)."""
    schema = step.schema
    if not step.final:
        metadata = {**(step.schema.metadata or {}), STEP_METADATA: step.identity().encode()}
        schema = pa.schema([*_BOOKKEEPING, *step.schema], metadata=metadata)
    rows = rejected = 0
    with replacing_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for batch in answers:
            lines = []
            for sample, digest, outcome in zip(batch.samples, batch.digests, batch.outcomes, strict=True):
                rows += 1
                rejected += not outcome.kept
                if outcome.kept or not step.final:
                    lines.append(outcome_line(sample, digest, outcome))
            writer.write_table(pa.Table.from_pylist(lines, schema=schema))
    return rows, rejected


def outcome_line(sample: Sample, digest: str, outcome: Outcome) -> Sample:
    """A step's answer as a row of its file. digest: of the sample."""
    bookkeeping = {"index": sample["index"], "input": digest}
    decided = {"kept": outcome.kept, "reason": outcome.reason, "measure": outcome.measure}
    return {**outcome.columns, **bookkeeping, **decided}

"""What a changed shard keeps of its earlier file: the rows whose input is the same, if the step is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from packshot.pipeline.shards import STEP_METADATA, read_outcomes
from packshot.pipeline.step import Outcome, Sample, Step
from packshot.runs.files import file_sha256


def row_digest(sample: Sample) -> str:
    """Digest of the columns that a step reads of a sample."""
    digest = hashlib.sha256()
    for name in sorted(sample):
        for part in (name.encode(), *_parts(sample[name])):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _parts(value: object) -> list[bytes]:
    """The bytes of a value; those of a picture are not copied into a text."""
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, dict):
        found = []
        for key in value:
            found += [str(key).encode(), *_parts(value[key])]
        return found
    return [json.dumps(value, sort_keys=True, default=str).encode()]


class EarlierRows:
    """The rows of a step's earlier file, asked for in the order of their ``index``.

    file: None, or as the ledger has it with ``sha256``; a file that was changed since is not used.
    """

    def __init__(self, step: Step, file: Path | None, sha256: str) -> None:
        self._rows = iter(())
        self._row: Sample | None = None
        if file is None or step.whole or step.final or not file.is_file() or file_sha256(file) != sha256:
            return
        metadata = pq.read_schema(file).metadata or {}
        if metadata.get(STEP_METADATA) == step.identity().encode():
            self._rows = read_outcomes(file)

    def find(self, index: int, digest: str) -> Outcome | None:
        """The earlier outcome of the sample at ``index``, if it had the same input."""
        while self._row is None or self._row["index"] < index:
            row = next(self._rows, None)
            if row is None:
                return None
            self._row = row
        if self._row["index"] != index or self._row["input"] != digest:
            return None
        columns = dict(self._row)
        for name in ("index", "input"):
            del columns[name]
        return Outcome(columns, columns.pop("reason"), columns.pop("measure"), columns.pop("kept"))


def digests_of(samples: Sequence[Sample]) -> list[str]:
    """:func:`row_digest` of each."""
    return list(map(row_digest, samples))

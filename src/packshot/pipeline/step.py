"""What a step is, and what it answers about a sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

Sample = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A step's answer for one sample.

    columns: the values that the step adds (missing ones are null).
    reason, measure: why the sample was rejected, and the value that decided. A kept sample may carry them too: a
        remark that is reported with the rejections.
    kept: False ends the sample's way here.
    """

    columns: Sample = field(default_factory=dict)
    reason: str | None = None
    measure: str | None = None
    kept: bool = True


@dataclass(frozen=True)
class Step:
    """One stage of a pipeline.

    name, version: identity; raise the version when the code gives other results.
    config: JSON-able, everything else that changes the result (the hash of a model file, say, not its path).
    schema: the columns it adds.
    function: a batch of samples -> one Outcome each, in order. It must be picklable (a function of a module, or a
        partial of one) unless the step is exclusive, and must not depend on how samples are batched.
    reads: the columns it needs; None for all.
    whole: it sees the samples of all shards in one call (deduplication); keep ``reads`` small.
    exclusive: it runs in the main process, one shard at a time (it holds a model on a GPU).
    calls_of: samples per call: fewer for slow steps, so that the bar moves sooner. Changes no result.
    final: its rows are the dataset, ``part-<shard>.parquet``: kept samples only, no bookkeeping columns.
    """

    name: str
    version: int
    config: dict[str, Any]
    schema: pa.Schema
    function: Callable[[list[Sample]], Sequence[Outcome]]
    reads: tuple[str, ...] | None = None
    whole: bool = False
    exclusive: bool = False
    calls_of: int = 16
    final: bool = False

    def key(self, input_digest: str) -> str:
        """Content address of this step's output for an input: equal keys mean equal bytes."""
        text = json.dumps([input_digest, self.name, self.version, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> str:
        """Digest of the step itself: where it is equal, equal input gives equal outcomes."""
        return self.key("")

    def file(self, shard: int) -> str:
        """Where its output lies, relative to the dataset's folder."""
        return f"part-{shard:05d}.parquet" if self.final else f"steps/{self.name}/{shard:05d}.parquet"

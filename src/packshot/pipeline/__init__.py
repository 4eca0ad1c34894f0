"""Shard-wise processing that survives being killed: steps, shards, a ledger, executors. Knows nothing of images.

A dataset is a list of items, cut into shards of a fixed size. Steps run one after the other; each reads a shard of
what the steps before it made and writes one Parquet file of its own: ``steps/<step>/<shard>.parquet``, with one row for
every sample that reached it, kept or not. A step's columns lie in its own file only, so changing a step redoes it and
those behind it, and nothing before it.
"""

from packshot.pipeline.run import Report, run_steps
from packshot.pipeline.step import Outcome, Step

__all__ = ["Outcome", "Report", "Step", "run_steps"]

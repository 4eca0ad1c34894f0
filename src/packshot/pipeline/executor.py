"""Where the shards of a step are worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from packshot.config.schema import ExecutorConfig, ExecutorKind
from packshot.core.errors import PackshotError

Job = TypeVar("Job")
Result = TypeVar("Result")


def _local(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Processes of this machine. Spawned, not forked: OpenCV and torch threads do not survive a fork."""
    if workers == 1 or len(jobs) < 2:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise PackshotError(
                "A worker process died (killed, or out of memory).",
                "Use fewer executor.workers or a smaller shard_size; run.resume=true goes on from here.",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_EXECUTORS = {ExecutorKind.local: _local}


def execute(function: Callable[[Job], Result], jobs: Sequence[Job], config: ExecutorConfig) -> Iterator[Result]:
    """Results of ``function`` over the jobs, as they are ready.

    function, jobs: picklable.
    Raises:
        PackshotError: a worker died.
        Exception: whatever the function raised; jobs not yet started are dropped.
    """
    return _EXECUTORS[config.kind](function, jobs, config.workers)

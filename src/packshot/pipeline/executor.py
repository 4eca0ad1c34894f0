"""Where the shards of a step are worked on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from packshot.config.schema import ExecutorConfig, ExecutorKind
from packshot.core.errors import PackshotError

Execute = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def _die_with_parent() -> None:
    """A pool's workers wait for ever when their parent is killed outright."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _local(workers: int) -> Iterator[Execute]:
    """Processes of this machine. Spawned, not forked: OpenCV and torch threads do not survive a fork."""
    if workers == 1:
        yield map
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_die_with_parent) as pool:

        def execute(function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
            futures = [pool.submit(function, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()

        try:
            yield execute
        except BrokenProcessPool as error:
            raise PackshotError(
                "A worker process died (killed, or out of memory).",
                "Use fewer executor.workers or a smaller shard_size; run.resume=true goes on from here.",
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_EXECUTORS = {ExecutorKind.local: _local}


def open_executor(config: ExecutorConfig) -> AbstractContextManager[Execute]:
    """Workers for a ``with`` block: ``execute(function, jobs)`` yields results as they are ready.

    function, jobs: picklable. What a function raises comes out of ``execute``; jobs not yet started are dropped.
    Raises:
        PackshotError: (on leaving the block) a worker died.
    """
    return _EXECUTORS[config.kind](config.workers)

"""Where the shards of a step are worked on."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import Synchronized
from typing import Protocol, TypeVar

from packshot.config.schema import ExecutorConfig, ExecutorKind
from packshot.errors import ConfigError, PackshotError, first_line

Job = TypeVar("Job")
Result = TypeVar("Result")


class Execute(Protocol):
    """Calls a function with every job; yields the results as they are ready, in any order."""

    def __call__(self, function: Callable[[Job], Result], jobs: Iterable[Job], /) -> Iterator[Result]: ...


_DEAD_WORKER = "A worker process died (killed, or out of memory)."
_GO_ON = "Use fewer executor.workers or a smaller shard_size; run.resume=true goes on from here."
_worker_number: int | None = None


def worker_number() -> int | None:
    """0, 1, ... in a worker process of this machine; None in the main process and elsewhere."""
    return _worker_number


def start_worker(counter: Synchronized) -> None:
    """Numbers the worker, and ends it with its parent: a pool's workers wait for ever when that is killed outright."""
    global _worker_number
    with counter.get_lock():
        _worker_number = counter.value
        counter.value += 1
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def local_workers(workers: int) -> Iterator[Execute]:
    """Processes of this machine. Spawned, not forked: OpenCV and torch threads do not survive a fork."""
    if workers == 1:
        yield map  # in this process, job by job
        return
    context = get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(counter,)) as pool:

        def execute(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
            futures = [pool.submit(function, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()

        try:
            yield execute
        except BrokenProcessPool as error:
            raise PackshotError(_DEAD_WORKER, _GO_ON) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def ray_workers(workers: int) -> Iterator[Execute]:
    """Tasks of one CPU on the Ray cluster at RAY_ADDRESS, or on one that is started here and ends with the block.

    Every node needs this package and sees the run's folder and the source under the same paths.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise ConfigError("executor=ray needs the package ray.", "pip install 'packshot[scale]'") from error
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level=logging.WARNING, **local)

    def execute(function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        task = ray.remote(num_cpus=1, max_retries=0)(function)
        waiting = iter(jobs)
        running = []
        while True:
            running += map(task.remote, itertools.islice(waiting, workers - len(running)))
            if not running:
                return
            [ready], running = ray.wait(running, num_returns=1)
            try:
                yield ray.get(ready)
            except RayTaskError as error:
                raise error.cause from error

    try:
        yield execute
    except RayError as error:
        raise PackshotError(f"{_DEAD_WORKER[:-1]}: {first_line(error)}", _GO_ON) from error
    finally:
        ray.shutdown()


_EXECUTORS = {ExecutorKind.local: local_workers, ExecutorKind.ray: ray_workers}


def open_executor(config: ExecutorConfig) -> AbstractContextManager[Execute]:
    """Workers for a ``with`` block: ``execute(function, jobs)`` yields results as they are ready.

    function, jobs: picklable. What a function raises comes out of ``execute``; jobs not yet started are dropped.
    Raises:
        ConfigError: executor=ray without the package.
        PackshotError: (on leaving the block) a worker died.
    """
    return _EXECUTORS[config.kind](config.workers)

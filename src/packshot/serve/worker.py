"""One inference at a time, in a thread of its own, with a short queue before it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class QueueFull(Exception):
    """As many jobs wait as may."""


class Worker:
    """The one thread that touches the model, so that the event loop stays free and the memory need known."""

    def __init__(self, queue_size: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._queue_size = queue_size
        self._pending = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Jobs behind the running one."""
        return max(0, self._pending - 1)

    @property
    def full(self) -> bool:
        """Whether :meth:`submit` would refuse now."""
        return self._pending > self._queue_size

    def submit(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue a job. Cancelling the future before the job's turn frees its place.

        Raises:
            QueueFull: ``queue_size`` jobs wait already.
        """
        with self._lock:
            if self.full:
                raise QueueFull
            self._pending += 1
        future = self._pool.submit(job, *args)
        future.add_done_callback(self._finished)
        return future

    def _finished(self, _: Future[Any]) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        """Drop what waits, let the running job finish."""
        self._pool.shutdown(wait=True, cancel_futures=True)

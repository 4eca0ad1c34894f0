"""One inference at a time, in a thread of its own, with a short queue before it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class QueueFull(Exception):
    """As many jobs wait as may."""


class Place:
    """A place in the queue, kept from before the upload is read until the job in it has ended."""

    def __init__(self, pool: ThreadPoolExecutor, give_back: Callable[[], None]) -> None:
        self._pool = pool
        self._give_back = give_back
        self._open = True

    def start(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue the one job of this place, whose end gives the place back; so does cancelling it before its turn."""
        future = self._pool.submit(job, *args)
        self._open = False
        future.add_done_callback(lambda _: self._give_back())
        return future

    def leave(self) -> None:
        """Give the place back, unless a job was started in it."""
        if self._open:
            self._open = False
            self._give_back()


class Worker:
    """The one thread that touches the model, so that the event loop stays free and the memory need known."""

    def __init__(self, queue_size: int) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")
        self._queue_size = queue_size
        self._pending = 0
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """Places taken behind the running job, those whose upload is still on its way included."""
        return max(0, self._pending - 1)

    def reserve(self) -> Place:
        """A place for one job; :meth:`Place.leave` it if there will be none.

        Raises:
            QueueFull: ``queue_size`` places are taken besides the running job's.
        """
        with self._lock:
            if self._pending > self._queue_size:
                raise QueueFull
            self._pending += 1
        return Place(self._pool, self._give_back)

    def submit(self, job: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue a job at once. Raises QueueFull."""
        return self.reserve().start(job, *args)

    def _give_back(self) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        """Drop what waits, let the running job finish."""
        self._pool.shutdown(wait=True, cancel_futures=True)

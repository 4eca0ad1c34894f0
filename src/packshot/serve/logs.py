"""Log quotas: nobody may fill the disk or hide other entries by making the server write."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from packshot.runs.folder import log

STRANGER_LINES = 60  # an hour, for requests without a key
LIBRARY_LINES = 60  # an hour, for each logger of a library: uvicorn warns of everything that is not HTTP
OWN_LINES = 20_000  # an hour, for our own logger


class Quota:
    """A number of log lines per time; how many were left out is logged when the next period begins."""

    def __init__(self, lines: int, seconds: float, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.lines = lines
        self.seconds = seconds
        self.what = what
        self.clock = clock
        self.began = clock()
        self.asked = 0

    def admit(self) -> bool:
        """Whether one more line may be written."""
        if self.clock() - self.began >= self.seconds:
            left_out = self.asked - self.lines
            # Reset first: this warning may itself pass through the quota.
            self.began = self.clock()
            self.asked = 0
            if left_out > 0:
                log.warning("%d %s were not logged", left_out, self.what)
        self.asked += 1
        return self.asked <= self.lines


class QuotaFilter(logging.Filter):
    """Lets each logger write only as many records an hour as its quota allows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self.quotas: dict[str, Quota] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        room = record.name.partition(".")[0]
        if room not in self.quotas:
            lines = OWN_LINES if room == log.name else LIBRARY_LINES
            self.quotas[room] = Quota(lines, 3600, f"records of {room}", self.clock)
        return self.quotas[room].admit()


def limit_logs() -> None:
    """Write the records of every library where ours go, and hold all of them to their quotas.

    The quota is a filter of the handlers, because a logger's own filter does not see what its children pass up.
    """
    quota = QuotaFilter()
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in log.handlers:
        handler.addFilter(quota)
        root.addHandler(handler)

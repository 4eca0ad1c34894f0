"""Connections that cannot make the server deaf: deadlines for headers and for reading, and a limit to their number."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

RESERVED_FILES = 64  # descriptors for everything that is not a connection: files, pipes, libraries
SWEEP_SECONDS = 0.5
STALL_SECONDS = 30.0  # how long a client may leave an answer unread


def connection_limit(wanted: int) -> int:
    """``serve.max_connections``, or what the limit of open files leaves; the soft limit is raised as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft - RESERVED_FILES))


class Connections:
    """All open connections of one server, oldest first."""

    def __init__(self, limit: int, header_seconds: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.header_seconds = header_seconds
        self.clock = clock
        self.open: dict[GuardedProtocol, None] = {}
        self.evicted = 0

    def admit(self, newcomer: GuardedProtocol) -> None:
        """Take a connection in. At the limit, the one that has waited longest without a request has to go.

        A client that sends its request at once is therefore answered, however many others send nothing.
        """
        if len(self.open) >= self.limit:
            idle = next((connection for connection in self.open if not connection.has_request()), newcomer)
            self.evicted += 1
            idle.drop()
        if not newcomer.transport.is_closing():
            self.open[newcomer] = None

    def forget(self, connection: GuardedProtocol) -> None:
        self.open.pop(connection, None)

    async def sweep(self) -> None:
        """Close connections that have passed a deadline, until cancelled."""
        while True:
            now = self.clock()
            for connection in list(self.open):
                connection.check(now)
            await asyncio.sleep(SWEEP_SECONDS)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with deadlines. Made by :func:`guarded`, which sets ``guard``."""

    guard: Connections
    idle_since: float = 0.0
    unsent: int = 0  # bytes in the write buffer when last looked at
    stalled_since: float = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.idle_since = self.guard.clock()
        self.stalled_since = self.idle_since
        self.guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.forget(self)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.idle_since = self.guard.clock()
        super().on_response_complete()

    def has_request(self) -> bool:
        """Whether the headers of a request have arrived whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def check(self, now: float) -> None:
        """Close the connection if it has passed a deadline."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self.unsent:
            self.stalled_since = now
        self.unsent = unsent
        late = not self.has_request() and now - self.idle_since > self.guard.header_seconds
        if late or now - self.stalled_since > STALL_SECONDS:
            self.drop()

    def drop(self) -> None:
        """Close without waiting for what the client may still read."""
        self.guard.forget(self)
        self.transport.abort()


def guarded(connections: Connections) -> type[GuardedProtocol]:
    """The protocol class whose connections these are."""
    return type("GuardedProtocol", (GuardedProtocol,), {"guard": connections})

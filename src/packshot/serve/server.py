"""``python serve.py``: generation over HTTP, by the same code as ``generate.py``."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from packshot.config.schema import Serve
from packshot.errors import ConfigError
from packshot.runs.folder import log, open_run
from packshot.runs.licenses import refuse_weights
from packshot.runs.tracking import open_tracker
from packshot.serve.app import create_app
from packshot.serve.connections import Connections, connection_limit, guarded
from packshot.serve.devices import process_devices
from packshot.serve.logs import limit_logs
from packshot.serve.requests import max_steps
from packshot.serve.service import CLOSE_SECONDS, Service

SPARE_SECONDS = 2.0  # of serve.timeout_seconds, kept for everything at the server's end that cannot be timed
# asyncio accepts as many connections at once as uvicorn's backlog says, before any of them can be closed again. When
# the files run out, it accepts nobody for a second. So few are accepted at once, and the system holds the others.
ACCEPTED_AT_ONCE = 16
WAITING_CONNECTIONS = 2048
ENDED_EARLY = 1  # exit code after a second signal: requests in work were not finished


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow happens.

    Raises:
        ConfigError: the port is in use or not allowed, or this machine does not have the host's address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"serve.host={host} is not a known address: {error.strerror}.", "Use 127.0.0.1.") from error
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(128)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            message = f"serve.port={port} is in use on {host}."
            raise ConfigError(message, f"Choose another one (serve.port={port + 1}), or 0 for any free one.") from error
        raise ConfigError(
            f"Cannot listen on serve.host={host}, serve.port={port}: {error.strerror}.", "Choose others."
        ) from error
    return server


class GuardedServer(uvicorn.Server):
    """uvicorn with deadlines for its connections, and an end that comes in time.

    The first signal lets requests in work finish, within ``serve.timeout_seconds``. A second one ends at once.
    """

    def __init__(self, app: FastAPI) -> None:
        service: Service = app.state.service
        limits = service.config.serve
        self.service = service
        self.seconds = limits.timeout_seconds
        self.guard = Connections(connection_limit(limits.max_connections), limits.header_seconds, time.monotonic)
        # What is left of the time after the requests is for the devices and the jobs.
        graceful = max(0.1, self.seconds - CLOSE_SECONDS - SPARE_SECONDS)
        config = uvicorn.Config(
            app,
            http=guarded(self.guard),
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            backlog=ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=graceful,  # type: ignore[arg-type]  # uvicorn hands it to asyncio, which takes floats
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(WAITING_CONNECTIONS)

    async def main_loop(self) -> None:
        sweeping = asyncio.create_task(self.guard.sweep())
        try:
            await super().main_loop()
        finally:
            self.service.closing = True  # ends the streams of events, which would last as long as their jobs
            sweeping.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.end_now()
        # In case anything that is not ours does not end: nobody should have to reach for kill -9.
        last_resort = threading.Timer(max(0.1, self.seconds - 0.2), self.end_now)
        last_resort.daemon = True
        last_resort.start()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but without raising the signals again at the end: the caller has to finish its run."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    def end_now(self) -> None:
        """End without waiting for anything. Stored jobs are drawn after the next start."""
        for device in self.service.queue.devices:
            device.close()
        os._exit(ENDED_EARLY)


def end_well(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


@contextmanager
def ending_well() -> Iterator[None]:
    """SIGINT and SIGTERM end the program with exit code 0, also before the server listens to them."""
    before = {number: signal.signal(number, end_well) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_work(config: Serve) -> None:
    """Raises ConfigError if the server's own defaults would be refused as too much work."""
    steps = config.generate.num_inference_steps
    if steps > max_steps(config, config.generate):
        raise ConfigError(
            f"generate.num_inference_steps={steps} is more than serve.max_work={config.serve.max_work:g} allows.",
            "Raise serve.max_work, or lower the steps.",
        )


def serve(config: Serve) -> None:
    """Serve until SIGINT or SIGTERM; requests in work are finished first, within ``serve.timeout_seconds``.

    Raises:
        ConfigError: the address cannot be used, or a model or adapter path is wrong.
    """
    refuse_weights(config)
    check_work(config)
    with ending_well(), listen(config.serve.host, config.serve.port) as server_socket:
        # The key must not reach config.yaml or a tracker.
        public = dataclasses.replace(config, serve=dataclasses.replace(config.serve, api_key=None))
        run = open_run("serve", public)
        limit_logs()
        tracker = open_tracker(run, public, "serve")
        app = create_app(config, process_devices(config), run, tracker)
        server = GuardedServer(app)
        service: Service = app.state.service

        def give_up() -> None:
            server.should_exit = True

        service.on_failure = give_up
        host, port = server_socket.getsockname()[:2]
        log.info("listening on http://%s:%s, documentation at /docs", f"[{host}]" if ":" in host else host, port)
        try:
            server.run(sockets=[server_socket])
            if service.failure:
                raise service.failure
        finally:
            tracker.finish()
            log.info("stopped after %d requests with a key", service.requests)
        logging.shutdown()
        os._exit(0)  # all is stored and closed; on a busy machine the interpreter's own end takes seconds

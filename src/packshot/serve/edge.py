"""The outermost layer of the app: request ids, keys, limits, metrics, the log, and the answer to unknown failures.

It is plain ASGI because FastAPI reads a whole form before any dependency runs. A stranger without a key, or a request
that finds the queue full, must not be able to make the server read an upload first.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packshot.config.schema import ServeConfig
from packshot.runs.folder import log
from packshot.serve.keys import ApiKey, find_key
from packshot.serve.schemas import ApiError, ErrorResponse
from packshot.serve.service import PROBES, Service

FORM_MIB = 1.0  # room for the text fields of a request besides its files
MAX_OTHERS = 64  # requests in work at once that are not in the queue
MAX_STREAMS = 32  # of them, those that follow a job
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

INTERNAL_ERROR = ApiError(
    500, "internal_error", "The server failed on this request.", "Its log has the reason under this request_id."
)
UNAUTHORIZED = ApiError(
    401,
    "unauthorized",
    "The API key is missing or wrong.",
    "Send the header 'Authorization: Bearer <key>' with a key of this server.",
    {"WWW-Authenticate": "Bearer"},
)
BUSY = ApiError(503, "busy", f"{MAX_OTHERS} requests are in work already.", "Try again in 1 s.", {"Retry-After": "1"})


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """The one form in which every failure is answered."""
    body = ErrorResponse(error=error.detail, error_code=error.code, request_id=request_id, hint=error.hint)
    return JSONResponse(body.model_dump(), error.status_code, error.headers)


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that name, or nothing."""
    for key, value in scope["headers"]:
        if key == name:
            return value
    return b""


def limited(scope: Scope, receive: Receive, limit: int, seconds: float) -> Receive:
    """``receive`` that raises ApiError 413 as soon as the body exceeds ``limit`` bytes, and 408 if it takes longer than
    ``seconds`` to arrive.

    The declared length is checked first because that is free; the bytes are counted because it may be absent or wrong.
    """
    too_slow = ApiError(408, "timeout", f"The request did not arrive within {seconds:g} s.", "Send smaller files.")
    too_large = ApiError(
        413,
        "too_large",
        f"The request is larger than {limit / 2**20:.1f} MiB.",
        "Send smaller files, or raise serve.max_upload_mib.",
    )
    declared = header(scope, b"content-length")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    received = 0
    complete = False
    deadline = time.monotonic() + seconds

    async def counted() -> Message:
        nonlocal received, complete
        if complete:  # what comes now is the end of the connection, and it may come at any time
            return await receive()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise too_slow from None
        received += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if received > limit:
            raise too_large
        return message

    return counted


class Edge:
    """ASGI middleware around the whole app.

    keys: one of them is needed for every request that changes or reads more than public state.
    service: gives out the places in the queue before a body is read, and records every request.
    """

    def __init__(self, app: ASGIApp, keys: list[ApiKey], service: Service) -> None:
        config: ServeConfig = service.config.serve
        self.app = app
        self.keys = keys
        self.service = service
        self.body_limit = int((3 * config.max_upload_mib + FORM_MIB) * 2**20)
        self.body_seconds = config.timeout_seconds
        self.others = 0
        self.streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = uuid.uuid4().hex
        key = find_key(self.keys, header(scope, b"authorization"))
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, started=started, figures={}, key=key)
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        metrics = self.service.metrics
        with metrics.active.track_inprogress():
            try:
                await self.guarded(scope, receive, send_noted)
            except Exception:
                log.exception("request %s failed", request_id)
                if not status:
                    await error_response(INTERNAL_ERROR, request_id)(scope, receive, send_noted)
        seconds = time.monotonic() - started
        metrics.count(scope["method"], scope["path"], status, seconds)
        line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
        self.service.record({**line, "seconds": round(seconds, 4), **state["figures"]}, key.name if key else None)

    async def guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that may not come in; hand on one that may."""
        with ExitStack() as held:
            try:
                self.check_key(scope)
                receive = limited(scope, receive, self.body_limit, self.body_seconds)
                held.enter_context(self.admitted(scope))
            except ApiError as error:
                await error_response(error, scope["state"]["request_id"])(scope, receive, send)
            else:
                await self.app(scope, receive, send)

    def check_key(self, scope: Scope) -> None:
        """Raises ApiError 401 without a key where one is needed, and 429 where a key has made too many requests."""
        key: ApiKey | None = scope["state"]["key"]
        is_open = scope["method"] in SAFE_METHODS and not scope["path"].startswith("/jobs")
        if key is None and not is_open:
            raise UNAUTHORIZED
        if key is not None and scope["method"] == "POST":
            wait = key.limit.wait()
            if wait:
                message = f"This key may make {key.limit.per_minute} POST requests a minute."
                seconds = str(int(wait) + 1)
                raise ApiError(429, "rate_limited", message, f"Try again in {seconds} s.", {"Retry-After": seconds})

    @contextmanager
    def admitted(self, scope: Scope) -> Iterator[None]:
        """Hold what a request occupies while it is answered: a place in the queue, or one of a limited number."""
        path = scope["path"]
        if scope["method"] == "POST" and path == "/generate":
            place = self.service.reserve()
            scope["state"]["place"] = place
            try:
                yield
            finally:
                place.leave()
            return
        if scope["method"] == "POST" and path == "/jobs":
            self.service.refuse_job()
        # Probes must get through however busy the server is.
        is_stream = path.endswith("/events")
        if path not in PROBES and (self.others >= MAX_OTHERS or (is_stream and self.streams >= MAX_STREAMS)):
            raise BUSY
        self.others += 1
        self.streams += is_stream
        try:
            yield
        finally:
            self.others -= 1
            self.streams -= is_stream

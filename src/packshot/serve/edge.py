"""The outermost layer of the app: request ids, the key, the limits, metrics, the log, the last resort.

It is plain ASGI because FastAPI reads a whole form before any dependency runs: neither a stranger without a key nor a
request that finds the queue full must be able to make the server swallow an upload first.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packshot.runs.folder import log
from packshot.serve.metrics import Metrics
from packshot.serve.schemas import ApiError, ErrorResponse
from packshot.serve.worker import Place

Record = Callable[[dict[str, Any], bool], None]
# What a client may know of a failure that is ours: nothing but that it happened.
INTERNAL_ERROR = ApiError(
    500, "internal_error", "The server failed on this request.", "Its log has the reason under this request_id."
)

UNAUTHORIZED = ApiError(
    401,
    "unauthorized",
    "The API key is missing or wrong.",
    "Send the header 'Authorization: Bearer <key>' with the server's key.",
    {"WWW-Authenticate": "Bearer"},
)
MAX_OTHERS = 64  # requests in work at once, besides those for pictures
BUSY = ApiError(503, "busy", f"{MAX_OTHERS} requests are in work already.", "Try again in 1 s.", {"Retry-After": "1"})
PROBES = ("/health", "/metrics")


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """The one form in which every failure is answered."""
    body = ErrorResponse(error=error.detail, error_code=error.code, request_id=request_id, hint=error.hint)
    return JSONResponse(body.model_dump(), error.status_code, error.headers)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def has_key(scope: Scope, key: str) -> bool:
    """Whether the request carries ``Authorization: Bearer <key>``."""
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    right = hmac.compare_digest(given.strip(), key.encode())
    return scheme.lower() == b"bearer" and right


def limited(scope: Scope, receive: Receive, limit: int, seconds: float) -> Receive:
    """``receive`` that raises ApiError 413 as soon as the body exceeds ``limit`` bytes, and 408 if it takes longer than
    ``seconds`` to arrive.

    The declared length is looked at first because it is free; the bytes are counted because it may be absent or a lie.
    """
    too_slow = ApiError(408, "timeout", f"The request did not arrive within {seconds:g} s.", "Send smaller files.")
    too_large = ApiError(
        413,
        "too_large",
        f"The request is larger than {limit / 2**20:.1f} MiB.",
        "Send smaller files, or raise serve.max_upload_mib.",
    )
    declared = _header(scope, b"content-length")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    seen, complete = 0, False
    deadline = time.monotonic() + seconds

    async def counted() -> Message:
        nonlocal seen, complete
        if complete:  # what comes now is the end of the connection, whenever it comes
            return await receive()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise too_slow from None
        seen += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if seen > limit:
            raise too_large
        return message

    return counted


class Edge:
    """ASGI middleware around the whole app.

    key: what ``POST`` requests must carry; reading (health, metrics, docs) is open.
    body_limit, body_seconds: size of a whole request, and how long it may take to arrive.
    reserve: takes a place in the queue, before anything of the body of a request for pictures is read.
    record: gets one dict per request, and whether it carried the key.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str,
        body_limit: int,
        body_seconds: float,
        metrics: Metrics,
        reserve: Callable[[], Place],
        record: Record,
    ) -> None:
        self._app = app
        self._key = key
        self._body_limit = body_limit
        self._body_seconds = body_seconds
        self._metrics = metrics
        self._reserve = reserve
        # who may come in: by method and path, what is held while a request is answered; all others are counted
        self._admitted = {("POST", "/generate"): self._queued}
        self._others = 0
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, started=started, figures={}, known=has_key(scope, self._key))
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with self._metrics.active.track_inprogress():
            try:
                await self._guarded(scope, receive, send_noted)
            except Exception:
                log.exception("request %s failed", request_id)
                if not status:
                    await error_response(INTERNAL_ERROR, request_id)(scope, receive, send_noted)
        seconds = time.monotonic() - started
        self._metrics.count(scope["method"], scope["path"], status, seconds)
        line = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
        self._record({**line, "seconds": round(seconds, 4), **state["figures"]}, state["known"])

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as stack:
            try:
                if scope["method"] not in ("GET", "HEAD") and not scope["state"]["known"]:
                    raise UNAUTHORIZED
                receive = limited(scope, receive, self._body_limit, self._body_seconds)
                admitted = self._admitted.get((scope["method"], scope["path"]), self._counted)
                stack.enter_context(admitted(scope))
            except ApiError as error:
                await error_response(error, scope["state"]["request_id"])(scope, receive, send)
            else:
                await self._app(scope, receive, send)

    @contextmanager
    def _queued(self, scope: Scope) -> Iterator[None]:
        """A request for pictures has a place in the queue, which the app finds in the request's state."""
        scope["state"]["place"] = place = self._reserve()
        try:
            yield
        finally:
            place.leave()

    @contextmanager
    def _counted(self, scope: Scope) -> Iterator[None]:
        """Whatever is not limited by the queue is limited by number; probes must get through when that is reached."""
        if self._others >= MAX_OTHERS and scope["path"] not in PROBES:
            raise BUSY
        self._others += 1
        try:
            yield
        finally:
            self._others -= 1

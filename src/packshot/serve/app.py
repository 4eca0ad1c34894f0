"""``python serve.py``: generation over HTTP, by the same code as ``generate.py``."""

from __future__ import annotations

import base64
import dataclasses
import errno
import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import uvicorn
from fastapi import FastAPI, Form, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from packshot.config.schema import Serve
from packshot.errors import ConfigError
from packshot.runs.folder import Run, log, open_run
from packshot.runs.licenses import refuse_weights
from packshot.runs.tracking import NullTracker, Tracker, open_tracker
from packshot.serve.edge import Edge, error_response
from packshot.serve.page import PAGE, headers
from packshot.serve.schemas import (
    ApiError,
    ErrorResponse,
    GeneratedImage,
    GenerateForm,
    GenerateResponse,
    Health,
    Info,
    Prediction,
    first_field_error,
)
from packshot.serve.service import ENDPOINTS, VERSION, Service, read_order

if TYPE_CHECKING:
    from packshot.generate import Packshot

_FORM_MIB = 1.0  # room for the text fields of a request beside its files
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def certificate_sha256(certificate: dict[str, Any]) -> str:
    """Digest of a certificate: SHA-256 over its JSON with sorted keys and without white space."""
    return hashlib.sha256(json.dumps(certificate, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _kinds(accept: str) -> set[str]:
    return {part.split(";")[0].strip().lower() for part in accept.split(",")}


def wants_png(accept: str) -> bool:
    """Whether an Accept header asks for the picture itself; JSON wins when both are named."""
    return "image/png" in _kinds(accept) and "application/json" not in _kinds(accept)


def wants_json(accept: str) -> bool:
    """Whether an Accept header asks for JSON where there is a page; the page wins when both are named."""
    return "application/json" in _kinds(accept) and "text/html" not in _kinds(accept)


def add_routes(app: FastAPI, service: Service) -> None:
    """The endpoints."""
    config = service.config
    page_headers = headers(PAGE)

    @app.get("/", response_model=Info, responses={200: {"content": {"text/html": {}}}})
    async def root(request: Request) -> Any:
        """A page to generate pictures with. `Accept: application/json` says what this server is instead."""
        if not wants_json(request.headers.get("accept", "")):
            return HTMLResponse(PAGE, headers=page_headers)
        return Info(version=VERSION, model_version=service.model_version, endpoints=ENDPOINTS)

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        loaded = service.packshot is not None
        response.status_code = 200 if loaded else 503
        return Health(
            status="ok" if loaded else "failed" if service.failure else "loading",
            model_loaded=loaded,
            version=VERSION,
            uptime_seconds=round(time.monotonic() - service.started, 3),
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post(
        "/generate",
        response_model=GenerateResponse,
        responses={200: {"content": {"image/png": {}}}, "default": {"model": ErrorResponse}},
        # Edge has checked the key before the body was read; this line makes /docs offer a field for it.
        dependencies=[Security(HTTPBearer(auto_error=False))],
    )
    async def generate(request: Request, form: Annotated[GenerateForm, Form(media_type="multipart/form-data")]) -> Any:
        """Put the product of `product_file` into a new scene. `Accept: image/png` returns the one picture itself."""
        as_png = wants_png(request.headers.get("accept", ""))
        if as_png and form.num_images != 1:
            raise ApiError(422, "invalid_field", "Accept: image/png holds one picture.", "Set num_images=1.")
        order = await read_order(form, config)
        pictures = await service.answer(order, request)
        seconds = time.monotonic() - request.state.started
        request.state.figures.update(num_images=len(pictures), seed=order.seed)
        if as_png:
            png, certificate = pictures[0]
            return Response(
                png, media_type="image/png", headers={"X-Certificate-SHA256": certificate_sha256(certificate)}
            )
        return GenerateResponse(
            request_id=request.state.request_id,
            prediction=Prediction(
                prompt=pictures[0][1]["request"]["prompt"],
                images=[
                    GeneratedImage(image=base64.b64encode(png).decode(), seed=order.seed + k, certificate=certificate)
                    for k, (png, certificate) in enumerate(pictures)
                ],
            ),
            processing_time_ms=round(seconds * 1000, 1),
            model_version=service.model_version,
        )


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in the one documented form."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            code = _HTTP_CODES.get(error.status_code, "bad_request")
            headers = dict(error.headers or {})
            error = ApiError(
                error.status_code, code, f"{error.detail.rstrip('.')}.", "/docs lists what there is.", headers
            )
        return error_response(error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def field_error(request: Request, error: RequestValidationError) -> JSONResponse:
        message, hint = first_field_error(list(error.errors()))
        return error_response(ApiError(422, "invalid_field", message, hint), request.state.request_id)


def choose_key(config: Serve) -> str:
    """The configured key, else the environment's, else a new one, printed once."""
    if key := config.serve.api_key or os.environ.get("PACKSHOT_API_KEY"):
        return key
    key = secrets.token_urlsafe(24)
    # Not through the log: the key must reach the screen and never a file.
    print(f"API key of this server (set serve.api_key or PACKSHOT_API_KEY for one of your own): {key}", flush=True)
    return key


def create_app(
    config: Serve,
    packshot: Packshot | Callable[[], Packshot],
    run: Run | None = None,
    tracker: Tracker | None = None,
) -> FastAPI:
    """The ASGI app; several may live in one process.

    packshot: a loaded model, or a function that loads it: then the app starts at once and answers 503 until it is in.
    run, tracker: where requests are recorded, if anywhere.
    """
    service = Service(config, packshot, run, tracker or NullTracker())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service.load:
            service.worker.submit(service.load_model)
        yield
        await run_in_threadpool(service.worker.close)

    app = FastAPI(title="Packshot", version=VERSION, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    add_routes(app, service)
    add_error_handlers(app)
    app.add_middleware(
        Edge,
        key=choose_key(config),
        body_limit=int((3 * config.serve.max_upload_mib + _FORM_MIB) * 2**20),
        body_seconds=config.serve.timeout_seconds,
        metrics=service.metrics,
        reserve=service.reserve,
        record=service.record,
    )
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything slow happens.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"serve.host={host} is no known address: {error.strerror}.", "Use 127.0.0.1.") from error
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


def log_uvicorn(service: Service) -> None:
    """uvicorn's messages go where ours go; it warns of whatever is no HTTP, so they count as lines of strangers."""
    logger = logging.getLogger("uvicorn.error")
    for handler in log.handlers:
        logger.addHandler(handler)
    logger.addFilter(lambda record: record.levelno > logging.WARNING or service.strangers.admit())


def _end(*_: Any) -> None:
    raise SystemExit(0)


@contextmanager
def ending_well() -> Iterator[None]:
    """SIGINT and SIGTERM end the program with exit code 0, also when uvicorn raises them again after its shutdown."""
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(config: Serve) -> None:
    """Serve until SIGINT or SIGTERM; requests in work are finished first.

    Raises:
        ConfigError: the address cannot be used, or a model or adapter path is wrong.
    """
    refuse_weights(config)
    with ending_well(), listen(config.serve.host, config.serve.port) as server_socket:
        # The key must not reach config.yaml or a tracker.
        public = dataclasses.replace(config, serve=dataclasses.replace(config.serve, api_key=None))
        run = open_run("serve", public)
        tracker = open_tracker(run, public, "serve")

        def load() -> Packshot:
            # Torch and diffusers take seconds to import: on the worker thread, with the server answering meanwhile.
            try:
                from packshot.generate import Packshot
                from packshot.generate.load import check_adapters

                check_adapters(config.adapters, config.depth, config.generate.light_angle)
                return Packshot.load(
                    model=config.model, adapters=config.adapters, matte=config.matte, depth=config.depth
                )
            except Exception:
                server.should_exit = True  # Service keeps the error; it is raised below
                raise

        app = create_app(config, load, run, tracker)
        grace = int(config.serve.timeout_seconds) + 1
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=grace)
        )
        host, port = server_socket.getsockname()[:2]
        log.info("listening on http://%s:%s, documentation at /docs", f"[{host}]" if ":" in host else host, port)
        service: Service = app.state.service
        log_uvicorn(service)
        try:
            server.run(sockets=[server_socket])
            if service.failure:
                raise service.failure
        finally:
            tracker.finish()
            log.info("stopped after %d requests with the key", service.requests)

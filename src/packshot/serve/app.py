"""The ASGI app: routes, errors in one form, and the layers around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from packshot.config.schema import Serve
from packshot.runs.folder import Run
from packshot.runs.tracking import NullTracker, Tracker
from packshot.serve.devices import Device, LocalDevice
from packshot.serve.docs import clean_schema
from packshot.serve.edge import Edge, error_response
from packshot.serve.job_routes import add_job_changes, add_job_views
from packshot.serve.keys import load_keys
from packshot.serve.requests import without_paths
from packshot.serve.routes import add_generate_route, add_mask_route, add_public_routes
from packshot.serve.schemas import ApiError, GenerateForm, Json, MaskForm, first_field_error
from packshot.serve.service import VERSION, Service

if TYPE_CHECKING:
    from packshot.generate.packshot import Packshot

HTTP_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in the one documented form."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            code = HTTP_CODES.get(error.status_code, "bad_request")
            message = f"{without_paths(str(error.detail)).rstrip('.')}."
            error = ApiError(error.status_code, code, message, "/docs lists the API.", dict(error.headers or {}))
        return error_response(error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def field_error(request: Request, error: RequestValidationError) -> JSONResponse:
        form = MaskForm if request.url.path == "/mask" else GenerateForm
        message, hint = first_field_error(list(error.errors()), list(form.model_fields))
        return error_response(ApiError(422, "invalid_field", message, hint), request.state.request_id)


def publish_schema(app: FastAPI) -> None:
    """Let the app publish its schema with forms as they can be sent."""

    def openapi() -> Json:
        if not app.openapi_schema:
            app.openapi_schema = clean_schema(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi


def create_app(
    config: Serve,
    devices: Sequence[Device] | Packshot | Callable[[], Packshot],
    run: Run | None = None,
    tracker: Tracker | None = None,
) -> FastAPI:
    """The ASGI app; several may live in one process.

    devices: where pictures are drawn; or a model, or a function that loads one, to draw in this process. The app
        starts at once and answers 503 until a model is loaded.
    run, tracker: where requests and jobs are recorded; without a run, jobs live as long as the app.
    """
    drawn_on = devices if isinstance(devices, Sequence) else [LocalDevice(devices)]
    service = Service(config, drawn_on, run, tracker or NullTracker())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.close)

    # No redirects for a trailing slash: they repeat the Host header, which the client chooses.
    app = FastAPI(
        title="Packshot", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service

    publish_schema(app)
    for add in (add_public_routes, add_generate_route, add_mask_route, add_job_changes, add_job_views):
        add(app, service)
    add_error_handlers(app)
    app.add_middleware(Edge, keys=load_keys(config.serve), service=service)
    if config.serve.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.serve.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Idempotency-Key"],
            expose_headers=["Location", "Retry-After", "X-Request-ID", "X-Certificate-SHA256"],
        )
    return app

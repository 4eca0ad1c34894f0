"""The endpoints, except those of jobs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import time
from typing import Annotated

from fastapi import FastAPI, Form, Request, Response, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST

from packshot.config.compose import to_plain
from packshot.config.schema import Shadow
from packshot.errors import PackshotError
from packshot.generate.product import prepare
from packshot.scene import SLOTS
from packshot.serve.docs import docs_page
from packshot.serve.page import PAGE, headers
from packshot.serve.requests import (
    FILES,
    build_request,
    file_name,
    max_steps,
    open_photo,
    public_error,
    read_settings,
    read_upload,
    refuse_group,
    refuse_repeated,
)
from packshot.serve.schemas import (
    ApiError,
    ErrorResponse,
    GeneratedImage,
    GenerateForm,
    GenerateResponse,
    Health,
    Info,
    Json,
    MaskForm,
    MaskResponse,
    Options,
    Prediction,
)
from packshot.serve.service import ENDPOINTS, VERSION, Service

# Edge has checked the key before the body was read; this dependency puts the key into the published schema.
KEY = [Security(HTTPBearer(auto_error=False))]
ERRORS: dict[int | str, Json] = {"default": {"model": ErrorResponse}}
PRESETS: dict[str, Json] = {
    "Marble and morning light": {
        "surface": "a white marble table",
        "background": "a beige wall",
        "lighting": "soft daylight",
        "mood": "calm",
    },
    "Podium, one colour": {
        "surface": "a pink podium",
        "background": "a pink wall",
        "lighting": "soft studio light",
        "mood": "minimalist",
    },
    "Beach": {
        "surface": "a bed of sand",
        "surroundings": ["smooth stones", "palm leaves"],
        "lighting": "harsh light from the left side",
        "mood": "fresh",
    },
    "Dark and dramatic": {
        "surface": "a black glossy table",
        "background": "a black background",
        "lighting": "a spotlight from above",
        "mood": "dramatic",
    },
}


def certificate_sha256(certificate: Json) -> str:
    """Digest of a certificate: SHA-256 over its JSON with sorted keys and without white space."""
    return hashlib.sha256(json.dumps(certificate, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def media_types(accept: str) -> list[str]:
    """The media types of an Accept header that are wanted at all; everything, where there is none."""
    types = []
    for part in accept.split(","):
        name, *parameters = [piece.strip().lower() for piece in part.split(";")]
        if name and "q=0" not in parameters and "q=0.0" not in parameters:
            types.append(name)
    return types or ["*/*"]


def wants_png(accept: str) -> bool:
    """Whether an Accept header asks for the picture itself; JSON wins when both are named.

    Raises:
        ApiError: 406, it accepts neither.
    """
    types = media_types(accept)
    if {"application/json", "application/*", "*/*"} & set(types):
        return "image/png" in types and "application/json" not in types
    if {"image/png", "image/*"} & set(types):
        return True
    raise ApiError(406, "not_acceptable", "Pictures come as application/json or as image/png.", "Accept one of them.")


def wants_json(accept: str) -> bool:
    """Whether an Accept header asks for JSON where there is a page; the page wins when both are named."""
    types = media_types(accept)
    return "application/json" in types and "text/html" not in types


def server_options(service: Service) -> Options:
    """What the page may offer on this server."""
    config = service.config
    return Options(
        references=bool(config.adapters.ip_adapter),
        light=service.queue.light or config.generate.shadow is not Shadow.none,
        defaults={**to_plain(config.generate), "seed": config.run.seed},
        max_upload_mib=config.serve.max_upload_mib,
        max_pixels=config.serve.max_pixels,
        max_steps=max_steps(config, dataclasses.replace(config.generate, size=[])),
        vocabulary={name: list(row.vocabulary) for name, row in SLOTS.items()},
        presets=PRESETS,
    )


def mask_of(data: bytes, service: Service) -> MaskResponse:
    """The mask that a request without ``mask_file`` would find."""
    photo = open_photo("product_file", data, service.config)
    try:
        product = prepare(photo, matte=service.config.matte, name="product_file")
    except PackshotError as error:
        raise public_error(422, "unusable_product", error) from error
    buffer = io.BytesIO()
    Image.fromarray(product.alpha_HW).save(buffer, "PNG")
    return MaskResponse(
        mask=base64.b64encode(buffer.getvalue()).decode(),
        width=photo.image.width,
        height=photo.image.height,
        method=product.method,
        confidence=round(product.confidence, 4),
        reasons=list(getattr(product, "reasons", ())),
    )


def add_public_routes(app: FastAPI, service: Service) -> None:
    """The endpoints that need no key."""
    page_headers = headers(PAGE)

    @app.head("/", response_model=None, include_in_schema=False)
    @app.get("/", response_model=Info, responses={200: {"content": {"text/html": {}}}})
    async def root(request: Request) -> Response | Info:
        """A page to generate pictures with. With `Accept: application/json`: name and versions of this server."""
        if not wants_json(request.headers.get("accept", "")):
            return HTMLResponse(PAGE, headers=page_headers)
        return Info(version=VERSION, model_version=service.model_version, endpoints=ENDPOINTS)

    @app.head("/health", response_model=None, include_in_schema=False)
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether the model is loaded."""
        response.status_code = 200 if service.loaded else 503
        return Health(
            status="ok" if service.loaded else "failed" if service.failure else "loading",
            model_loaded=service.loaded,
            version=VERSION,
            uptime_seconds=round(time.monotonic() - service.started, 3),
        )

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/options", response_model=Options)
    async def options() -> Options:
        """What this server can do, and words for the slots of a scene."""
        return server_options(service)

    @app.head("/docs", response_model=None, include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page = docs_page(app.openapi())
        return HTMLResponse(page, headers=headers(page))


def add_generate_route(app: FastAPI, service: Service) -> None:
    """The endpoint whose client waits for its pictures."""
    config = service.config

    @app.post(
        "/generate",
        response_model=GenerateResponse,
        responses={200: {"content": {"image/png": {}}}, **ERRORS},
        dependencies=KEY,
    )
    async def generate(
        request: Request, form: Annotated[GenerateForm, Form(media_type="multipart/form-data")]
    ) -> Response | GenerateResponse:
        """Put the product of `product_file` into a new scene. `Accept: image/png` returns the one picture itself."""
        as_png = wants_png(request.headers.get("accept", ""))
        if as_png and form.num_images != 1:
            raise ApiError(422, "invalid_field", "Accept: image/png holds one picture.", "Set num_images=1.")
        await refuse_repeated(request, form.together)
        refuse_group(form.together, len(form.product_file), len(form.mask_file))
        prompt = read_settings(form, config, form.reference_file is not None)
        files = await read_files(form, service)
        pictures = await service.answer(await run_in_threadpool(build_request, prompt, files, config), request)
        seconds = time.monotonic() - request.state.started
        request.state.figures.update(num_images=len(pictures), seed=prompt.seed)
        if as_png:
            digest = certificate_sha256(pictures[0].certificate)
            return Response(pictures[0].png, media_type="image/png", headers={"X-Certificate-SHA256": digest})
        images = []
        for k, picture in enumerate(pictures):
            encoded = base64.b64encode(picture.png).decode()
            images.append(GeneratedImage(image=encoded, seed=prompt.seed + k, certificate=picture.certificate))
        return GenerateResponse(
            request_id=request.state.request_id,
            prediction=Prediction(
                prompt=pictures[0].certificate["request"]["prompt"],
                images=images,
                cut_out=base64.b64encode(pictures[0].cut_out).decode() if pictures[0].cut_out else None,
            ),
            processing_time_ms=round(seconds * 1000, 1),
            model_version=service.model_version,
        )


def add_mask_route(app: FastAPI, service: Service) -> None:
    """The endpoint that shows what would be taken for the product."""

    @app.post("/mask", response_model=MaskResponse, responses=ERRORS, dependencies=KEY)
    async def mask(request: Request, form: Annotated[MaskForm, Form(media_type="multipart/form-data")]) -> MaskResponse:
        """The mask that would be found for this photo. Mend it and send it as `mask_file` where it is wrong."""
        await refuse_repeated(request)
        data = await read_upload("product_file", form.product_file, service.config)
        return await run_in_threadpool(mask_of, data, service)


async def read_files(form: GenerateForm, service: Service) -> dict[str, bytes]:
    """The bytes of a form's files, by the names that :func:`file_name` gives them."""
    files = {}
    for field in FILES:
        given = getattr(form, field)
        uploads = given if isinstance(given, list) else [given]
        for number, upload in enumerate(uploads):
            if upload is not None:
                files[file_name(field, number)] = await read_upload(field, upload, service.config)
    return files

"""From a form to pictures: checking what strangers send, and one turn on the model."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import Request, UploadFile
from fastapi.concurrency import run_in_threadpool

from packshot.config.checks import validate
from packshot.config.schema import Generate, GenerateSettings, Placement, SceneConfig, Serve
from packshot.errors import ConfigError, PackshotError
from packshot.runs.files import sha256
from packshot.runs.folder import Run, log, printable
from packshot.runs.tracking import Tracker
from packshot.scene import Scene
from packshot.serve.edge import PROBES
from packshot.serve.metrics import Metrics
from packshot.serve.schemas import ApiError, GenerateForm
from packshot.serve.worker import Place, QueueFull, Worker

if TYPE_CHECKING:
    from packshot.generate import Packshot
    from packshot.generate.product import Photo

ENDPOINTS = ["/", "/generate", "/health", "/metrics", "/docs", "/openapi.json"]
VERSION = version("packshot")
_SHOWN = 200  # characters of a method or path that are written down
_LINES_PER_HOUR = 60  # of the log, for requests without the key


@dataclasses.dataclass(frozen=True)
class Order:
    """A checked request: what one turn on the model needs."""

    product: Photo
    mask: Photo | None
    reference: Photo | None
    scene: Scene | str
    settings: GenerateSettings
    num_images: int
    seed: int


class Quota:
    """So many log lines in so many seconds; how many were left out is said with the first one after that."""

    def __init__(self, lines: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._asked = 0

    def admit(self) -> bool:
        """Whether one more line may be written."""
        if self._clock() - self._began >= self._seconds:
            if self._asked > self._lines:
                log.warning("%d requests without the key were not listed", self._asked - self._lines)
            self._began, self._asked = self._clock(), 0
        self._asked += 1
        return self._asked <= self._lines


class Service:
    """What the routes of one app share: config, the worker thread, the model once it is loaded."""

    def __init__(self, config: Serve, packshot: Packshot | Callable[[], Packshot], run: Run | None, tracker: Tracker):
        self.config = config
        self.run = run
        self.tracker = tracker
        self.packshot = None if callable(packshot) else packshot
        self.load = packshot if callable(packshot) else None
        self.failure: Exception | None = None
        self.started = time.monotonic()
        self.requests = 0
        self.strangers = Quota(_LINES_PER_HOUR, 3600)
        self.last_seconds = 1.0
        self.worker = Worker(config.serve.queue_size)
        self.metrics = Metrics(set(ENDPOINTS), lambda: self.worker.waiting, lambda: self.packshot is not None)
        self.model_version = f"packshot {VERSION}, {os.path.basename(config.model.base.rstrip('/'))}"

    def load_model(self) -> None:
        """Runs on the worker thread, before every request."""
        assert self.load is not None
        try:
            self.packshot = self.load()
            log.info("model loaded in %.1f s", time.monotonic() - self.started)
        except Exception as error:
            self.failure = error
            log.error("the model could not be loaded: %s", error)

    def record(self, line: dict[str, Any], known: bool) -> None:
        """One answered request: a line in the log; if it carried the key (known), also in metrics.jsonl and figures to
        the tracker. Strangers must not be able to fill the disk; probes ask every few seconds."""
        if line["path"] in PROBES or not (known or self.strangers.admit()):
            return
        line = {**line, **{key: printable(line[key])[:_SHOWN] for key in ("method", "path")}}
        log.info("%(method)s %(path)s %(status)s %(seconds).2f s %(request_id)s", line)
        if not known:
            return
        self.requests += 1
        if self.run:
            self.run.metrics({"step": self.requests, **line})
        figures = {key: float(value) for key, value in line.items() if isinstance(value, int | float)}
        self.tracker.log(figures, self.requests)

    def generate(self, order: Order) -> list[tuple[bytes, dict[str, Any]]]:
        """PNG file and certificate of every picture. Runs on the worker thread."""
        assert self.packshot is not None
        started = time.monotonic()
        try:
            packshot = self.packshot.set_product(order.product, order.mask)
        except PackshotError as error:
            raise ApiError(422, "unusable_product", error.args[0], error.hint) from error
        try:
            results = packshot.generate(
                order.scene,
                num_images=order.num_images,
                seed=order.seed,
                reference=order.reference,
                settings=order.settings,
            )
        except ConfigError as error:
            raise ApiError(422, "invalid_field", error.args[0], error.hint) from error
        pictures = [(result.png, result.certificate) for result in results]
        self.last_seconds = time.monotonic() - started
        self.metrics.inference.observe(self.last_seconds)
        return pictures

    def reserve(self) -> Place:
        """A place in the queue; raises ApiError when there is none, or no model yet."""
        if self.packshot is None:
            raise ApiError(
                503, "model_loading", "The model is not loaded yet.", "/health says when.", {"Retry-After": "5"}
            )
        try:
            return self.worker.reserve()
        except QueueFull:
            wait = max(1, round(self.last_seconds * (self.worker.waiting + 1)))
            message = f"{self.config.serve.queue_size} requests wait already."
            hint = f"Try again in {wait} s."
            raise ApiError(429, "queue_full", message, hint, {"Retry-After": str(wait)}) from None

    async def answer(self, order: Order, request: Request) -> list[tuple[bytes, dict[str, Any]]]:
        """Queue an order and wait for it: as long as the client does, and no longer than the timeout."""
        place: Place = request.state.place
        job = asyncio.wrap_future(place.start(self.generate, order))
        gone = asyncio.ensure_future(request.receive())  # after the body, only a disconnect can come
        limit = self.config.serve.timeout_seconds
        left = max(0.0, limit - (time.monotonic() - request.state.started))
        try:
            await asyncio.wait({job, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                return job.result()
            if gone.done():
                raise ApiError(499, "client_gone", "The client closed the connection.")
            raise ApiError(504, "timeout", f"There was no result within {limit:g} s.", "Try again later.")
        finally:
            gone.cancel()
            job.cancel()  # frees the place in the queue; a turn that has begun ends by itself


async def read_image(name: str, upload: UploadFile, config: Serve) -> Photo:
    """The picture of a file field with the file's hash; neither extension nor declared type are looked at.

    Raises:
        ApiError: 413 too many bytes or pixels, 415 no usable image.
    """
    from packshot.generate.product import Photo, decode  # loaded with the model, see serve()

    limits = config.serve
    if (upload.size or 0) > limits.max_upload_mib * 2**20:
        raise ApiError(
            413, "too_large", f"{name} is larger than {limits.max_upload_mib:g} MiB.", "Send a smaller file."
        )
    data = await upload.read()
    try:
        image, steps = await run_in_threadpool(decode, data, name, limits.max_pixels)
    except PackshotError as error:
        if getattr(error, "reason", "") == "too_many_pixels":
            raise ApiError(
                413, "too_large", f"{name} has more than {limits.max_pixels} pixels.", "Scale it down."
            ) from error
        raise ApiError(415, "not_an_image", error.args[0], error.hint) from error
    return Photo(image, sha256(data), tuple(steps))


def read_settings(form: GenerateForm, config: Serve) -> tuple[GenerateSettings, Scene | str]:
    """The form over the server's defaults, checked by the rules of ``generate.py``.

    Raises:
        ApiError: 422, a value is out of range or contradicts another.
    """
    names = {f.name for f in dataclasses.fields(GenerateSettings)} - {"size"}
    given = {name: value for name in names if (value := getattr(form, name, None)) is not None}
    if form.size:
        given["size"] = [int(side) for side in form.size.split("x")]
    settings = dataclasses.replace(config.generate, **given)
    if form.size and settings.placement is Placement.original:
        message = f"size={form.size} has no effect with placement=original, which keeps the photo's size."
        raise ApiError(422, "invalid_field", message, "Add placement=center, or leave size out.")
    slots = {f.name: getattr(form, f.name) for f in dataclasses.fields(SceneConfig)}
    if form.prompt and any(slots.values()):
        raise ApiError(422, "invalid_field", "prompt and scene fields are both given.", "Use one of the two.")
    if form.reference_file and not config.adapters.ip_adapter:
        raise ApiError(
            422,
            "no_ip_adapter",
            "reference_file needs an IP-Adapter, which this server has not loaded.",
            "Leave it out, or start the server with adapters.ip_adapter=<export folder>.",
        )
    try:
        validate(Generate(**vars(settings), num_images=form.num_images))
    except ConfigError as error:
        raise ApiError(422, "invalid_field", error.args[0], error.hint) from error
    if settings.size and settings.size[0] * settings.size[1] > config.serve.max_pixels:
        raise ApiError(422, "invalid_field", f"size={form.size} has more than {config.serve.max_pixels} pixels.")
    return settings, form.prompt or Scene.from_dict(slots)


async def read_order(form: GenerateForm, config: Serve) -> Order:
    """Check a form, cheap things first; raises ApiError."""
    settings, scene = read_settings(form, config)
    files = {"product_file": form.product_file, "mask_file": form.mask_file, "reference_file": form.reference_file}
    images = {name: await read_image(name, file, config) for name, file in files.items() if file is not None}
    return Order(
        product=images["product_file"],
        mask=images.get("mask_file"),
        reference=images.get("reference_file"),
        scene=scene,
        settings=settings,
        num_images=form.num_images,
        seed=config.run.seed if form.seed is None else form.seed,
    )

"""What the routes of one app share: the config, the queue before the devices, the stored jobs, the log of requests."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from packshot.config.schema import Serve
from packshot.runs.folder import Run, log, printable
from packshot.runs.tracking import Tracker
from packshot.serve.devices import Cancelled, Device, DeviceLost, GenerationRequest, Picture, Refused
from packshot.serve.jobs import Job, JobStore
from packshot.serve.logs import STRANGER_LINES, Quota
from packshot.serve.metrics import Metrics
from packshot.serve.queueing import DeviceQueue, Place, QueueFull, Turn
from packshot.serve.requests import build_request, read_settings, without_paths
from packshot.serve.schemas import ApiError, Json, SceneForm

ENDPOINTS = ["/", "/generate", "/jobs", "/mask", "/options", "/health", "/metrics", "/docs", "/openapi.json"]
PROBES = ("/health", "/metrics")
VERSION = version("packshot")
SHOWN = 200  # characters of a method or path that are written down
CLOSE_SECONDS = 1.0  # that a running denoising step gets to end in when the server ends


def drawing_error(error: BaseException) -> ApiError:
    """What a client may know of a turn that failed. Everything else is in the log."""
    if isinstance(error, Refused):
        return ApiError(422, error.code, without_paths(error.message), without_paths(error.hint))
    if isinstance(error, DeviceLost):
        return ApiError(500, "device_lost", "The process that drew the pictures has ended.", "Try again.")
    return ApiError(500, "internal_error", "The server failed on this request.", "Its log has the reason.")


class Service:
    """See the module. devices: where pictures are drawn; ``start`` loads them."""

    def __init__(self, config: Serve, devices: Sequence[Device], run: Run | None, tracker: Tracker):
        self.config = config
        self.run = run
        self.tracker = tracker
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.closing = False
        self.started = time.monotonic()
        self.requests = 0
        self.strangers = Quota(STRANGER_LINES, 3600, "requests without a key")
        self.queue = DeviceQueue(devices, config.serve.queue_size, self.fail, self.observe)
        self.metrics = Metrics(ENDPOINTS, lambda: self.queue.waiting, lambda: self.loaded)
        self.model_version = f"packshot {VERSION}, {os.path.basename(config.model.base.rstrip('/'))}"
        self.scratch = None if run else tempfile.TemporaryDirectory(prefix="packshot-jobs-")
        folder = run.path / "jobs" if run else Path(self.scratch.name if self.scratch else "")
        self.jobs = JobStore(folder, config.serve.keep_hours * 3600)
        self.turns: dict[str, Turn] = {}  # of the jobs that have not ended, by id

    @property
    def loaded(self) -> bool:
        """Whether any device has its model."""
        return self.queue.loaded > 0

    def start(self) -> None:
        """Load the devices, and queue the jobs that an earlier process has left."""
        jobs = self.jobs.recover()
        if jobs:
            log.info("%d jobs of an earlier run of this server are drawn now", len(jobs))
        for job in jobs:
            self.queue_job(job)
        self.queue.start()

    def fail(self, error: Exception) -> None:
        """A device could not be loaded: the server ends with this error."""
        if self.closing:
            return  # a signal ended the loading
        self.failure = error
        log.error("the model could not be loaded: %s", error)
        self.on_failure()

    def observe(self, seconds: float) -> None:
        self.metrics.inference.observe(seconds)

    def close(self) -> None:
        """End all turns and devices. Interrupted jobs are drawn after the next start."""
        self.closing = True
        self.queue.close(CLOSE_SECONDS)
        self.jobs.close()
        if self.scratch:
            self.scratch.cleanup()

    # ---- the log of requests ----

    def record(self, line: Json, key_name: str | None) -> None:
        """One answered request: a line in the log; with a key also in metrics.jsonl, and its figures to the tracker.

        Requests without a key have a quota, so that strangers cannot fill the disk. Probes and looks at a job's state
        come every few seconds and are not logged.
        """
        polled = line["path"] in PROBES or (line["method"] == "GET" and line["path"].startswith("/jobs"))
        if (polled and line["status"] < 400) or not (key_name or self.strangers.admit()):
            return
        for name in ("method", "path"):
            line[name] = printable(line[name])[:SHOWN]
        shown = "{method} {path} {status} {seconds:.2f} s {request_id}".format(**line)
        log.info("%s %s", shown, f"key {key_name}" if key_name else "no key")
        if not key_name:
            return
        self.requests += 1
        if self.run:
            self.run.metrics({"step": self.requests, "key": key_name, **line})
        figures = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        self.tracker.log(figures, self.requests)

    # ---- requests whose client waits ----

    def refuse_loading(self) -> None:
        """Raises ApiError 503 until a model is there."""
        if not self.loaded:
            hint = "/health answers 200 once it is."
            raise ApiError(503, "model_loading", "The model is not loaded yet.", hint, {"Retry-After": "5"})

    def reserve(self) -> Place:
        """A place in the queue; raises ApiError when there is none, or no model yet."""
        self.refuse_loading()
        try:
            return self.queue.reserve()
        except QueueFull:
            wait = max(1, round(self.queue.turn_seconds * (self.queue.waiting + 1)))
            message = f"{self.config.serve.queue_size} requests wait already."
            raise ApiError(429, "queue_full", message, f"Try again in {wait} s.", {"Retry-After": str(wait)}) from None

    async def answer(self, wanted: GenerationRequest, request: Request) -> list[Picture]:
        """Queue a request and wait for its pictures: as long as the client does, and no longer than the timeout."""
        place: Place = request.state.place
        turn = place.start(Turn(lambda: wanted, wanted.steps))
        drawn = asyncio.wrap_future(turn.future)
        drawn.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may end after the client left
        gone = asyncio.ensure_future(request.receive())  # after the body, only a disconnect can come
        limit = self.config.serve.timeout_seconds
        left = max(0.0, limit - (time.monotonic() - request.state.started))
        try:
            await asyncio.wait({drawn, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if drawn.done():
                return drawn.result()
            if gone.done():
                raise ApiError(499, "client_gone", "The client closed the connection.")
            raise ApiError(504, "timeout", f"There was no result within {limit:g} s.", "Try again later.")
        except (Refused, DeviceLost) as error:
            raise drawing_error(error) from error
        except asyncio.CancelledError:
            if not self.closing:
                raise
            raise ApiError(
                503, "shutting_down", "The server ends before the pictures are drawn.", "Try again."
            ) from None
        finally:
            gone.cancel()
            self.queue.cancel(turn)

    # ---- jobs ----

    def refuse_job(self) -> None:
        """Raises ApiError 429 when as many jobs wait as may."""
        if len(self.turns) >= self.config.serve.max_jobs:
            wait = max(1, round(self.queue.turn_seconds))
            message = f"{len(self.turns)} jobs wait already."
            raise ApiError(429, "queue_full", message, f"Try again in {wait} s.", {"Retry-After": str(wait)})

    def read_job(self, job: Job) -> GenerationRequest:
        """A stored job as the request that it was."""
        files = self.jobs.inputs(job.id)
        form = SceneForm.model_validate_json(job.form).model_copy(update={"seed": job.seed})
        prompt = read_settings(form, self.config, "reference_file" in files)
        return build_request(prompt, files, self.config, with_layers=True)

    def queue_job(self, job: Job) -> None:
        """Give a stored job its turn."""
        turn = Turn(lambda: self.read_job(job), job.steps, lambda: self.jobs.begin(job.id))
        self.turns[job.id] = turn
        turn.future.add_done_callback(lambda _: self.end_job(job, turn))
        self.queue.put(turn)

    def end_job(self, job: Job, turn: Turn) -> None:
        """Store what came out of a job's turn. Called on the device's thread, before it takes the next turn."""
        try:
            if turn.future.cancelled():
                return  # it never began, and waits in the store for the next start unless it was deleted
            error = turn.future.exception()
            if error is None:
                self.jobs.finish(job.id, turn.future.result())
                self.jobs.purge()
            elif self.closing and isinstance(error, Cancelled | DeviceLost):
                self.jobs.requeue(job.id)
            elif not isinstance(error, Cancelled):
                self.fail_job(job, error)
        except OSError as error:  # the disk is full
            self.fail_job(job, error)
        finally:
            self.turns.pop(job.id, None)

    def fail_job(self, job: Job, error: BaseException) -> None:
        """Store why a job has no pictures."""
        known = error if isinstance(error, ApiError) else drawing_error(error)
        if known.status_code >= 500:
            log.error("job %s failed", job.id, exc_info=error)
        self.jobs.fail(job.id, {"error": known.detail, "error_code": known.code, "hint": known.hint})

    async def delete_job(self, job: Job) -> None:
        """Stop a job if it has not ended, and forget it."""
        turn = self.turns.get(job.id)
        if turn is not None:
            self.queue.cancel(turn)
        await run_in_threadpool(self.jobs.remove, job.id)

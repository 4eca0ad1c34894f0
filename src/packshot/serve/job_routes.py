"""The endpoints of jobs: accept, look, follow, fetch the files, delete."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Form, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, StreamingResponse

from packshot.serve.jobs import UNFINISHED, Job, fingerprint
from packshot.serve.requests import build_request, read_settings, refuse_group, refuse_repeated
from packshot.serve.routes import ERRORS, KEY, read_files
from packshot.serve.schemas import ApiError, GenerateForm, JobError, JobImage, JobList, JobStatus, SceneForm
from packshot.serve.service import Service

EVENT_SECONDS = 0.25  # how often a followed job is looked at
HEARTBEAT_SECONDS = 10.0  # so that proxies keep the connection of a job that waits
LISTED = 50


def job_images(service: Service, job: Job) -> list[JobImage]:
    """Where the files of a finished job are."""
    files = service.jobs.files(job.id)
    images = []
    while f"{len(images)}.png" in files:
        k = len(images)
        layers = {}
        for name in files:
            if name.startswith(f"{k}-"):
                layers[name.removeprefix(f"{k}-").removesuffix(".png")] = f"/jobs/{job.id}/files/{name}"
        address = f"/jobs/{job.id}/files/{k}"
        images.append(JobImage(seed=job.seed + k, image=f"{address}.png", certificate=f"{address}.json", layers=layers))
    return images


def job_status(service: Service, job: Job) -> JobStatus:
    """A job as clients see it."""
    turn = service.turns.get(job.id) if job.state in UNFINISHED else None
    share = 1.0 if job.state == "done" else 0.0
    if turn is not None:
        share = min(1.0, turn.progress.steps_done / max(1, turn.progress.steps))
    return JobStatus(
        id=job.id,
        state=job.state,
        created_at=job.created,
        queue_position=len(service.queue.ahead(turn)) if turn else 0,
        share_done=round(share, 4),
        seconds_left=round(service.queue.seconds_left(turn), 1) if turn else None,
        images=job_images(service, job) if job.state == "done" else [],
        error=JobError(**job.error) if job.error else None,
    )


def own_job(service: Service, job_id: str, request: Request) -> Job:
    """A job of the request's key. Raises ApiError 404: others' jobs do not exist for it."""
    job = service.jobs.get(job_id, request.state.key.name)
    if job is None:
        raise ApiError(404, "not_found", "There is no such job.", "Finished jobs are kept for serve.keep_hours.")
    return job


async def job_events(service: Service, job: Job) -> AsyncIterator[str]:
    """A job's state as server-sent events, whenever it changes, until it has ended."""
    sent = ""
    sent_at = time.monotonic()
    while not service.closing:
        found = service.jobs.get(job.id, job.owner)
        if found is None:
            yield "event: deleted\ndata: {}\n\n"
            return
        state = job_status(service, found).model_dump_json()
        if state != sent:
            yield f"data: {state}\n\n"
            sent = state
            sent_at = time.monotonic()
        elif time.monotonic() - sent_at > HEARTBEAT_SECONDS:
            yield ": waiting\n\n"
            sent_at = time.monotonic()
        if found.state not in UNFINISHED:
            return
        await asyncio.sleep(EVENT_SECONDS)


def accept(service: Service, owner: str, form: SceneForm, files: dict[str, bytes], key: str | None) -> Job:
    """Check a request, store it and queue it; a repeated one gives the job that it made before.

    Raises:
        ApiError: the request is not usable, or the idempotency key belongs to another one.
    """
    prompt = read_settings(form, service.config, "reference_file" in files)
    build_request(prompt, files, service.config)  # refuses pictures that cannot be read now, not after the wait
    text = form.model_dump_json()
    job = service.jobs.repeated(owner, key) if key else None
    if job is None:
        try:
            job = service.jobs.add(owner, text, files, prompt.seed, prompt.steps, key)
            service.queue_job(job)
            return job
        except sqlite3.IntegrityError:
            job = service.jobs.repeated(owner, key or "")  # the same request came twice at the same time
    if job is None or job.fingerprint != fingerprint(text, files):
        raise ApiError(
            422, "idempotency_mismatch", "This Idempotency-Key was sent with another request.", "Use a new one."
        )
    return job


def add_job_changes(app: FastAPI, service: Service) -> None:
    """The endpoints that make and delete jobs. As all of jobs they need a key, which Edge checks."""

    @app.post("/jobs", status_code=202, response_model=JobStatus, responses=ERRORS, dependencies=KEY)
    async def create(
        request: Request,
        response: Response,
        form: Annotated[GenerateForm, Form(media_type="multipart/form-data")],
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> JobStatus:
        """Accept a request for pictures, to be drawn when its turn comes. The fields are those of /generate.

        A request that is sent again with the same `Idempotency-Key` gives the same job.
        """
        service.refuse_loading()
        await refuse_repeated(request, form.together)
        refuse_group(form.together, len(form.product_file), len(form.mask_file))
        files = await read_files(form, service)
        scene = SceneForm(**{name: getattr(form, name) for name in SceneForm.model_fields})
        job = await run_in_threadpool(accept, service, request.state.key.name, scene, files, idempotency_key)
        request.state.figures.update(num_images=form.num_images, seed=job.seed)
        response.headers["Location"] = f"/jobs/{job.id}"
        return job_status(service, job)

    @app.delete("/jobs/{job_id}", status_code=204, responses=ERRORS, dependencies=KEY)
    async def delete(request: Request, job_id: str) -> None:
        """Stop a job, if it has not ended, and delete it with its files."""
        await service.delete_job(own_job(service, job_id, request))


def add_job_views(app: FastAPI, service: Service) -> None:
    """The endpoints that show jobs and their files."""

    @app.get("/jobs", response_model=JobList, responses=ERRORS, dependencies=KEY)
    def list_jobs(request: Request) -> JobList:
        """The newest jobs of this key."""
        jobs = service.jobs.select("owner = ? ORDER BY created DESC LIMIT ?", (request.state.key.name, LISTED))
        return JobList(jobs=[job_status(service, job) for job in jobs])

    @app.get("/jobs/{job_id}", response_model=JobStatus, responses=ERRORS, dependencies=KEY)
    def status(request: Request, job_id: str) -> JobStatus:
        """Where a job is: its place in the queue, how much is done, how long it will take, and its files."""
        return job_status(service, own_job(service, job_id, request))

    @app.get("/jobs/{job_id}/events", response_class=StreamingResponse, responses=ERRORS, dependencies=KEY)
    def events(request: Request, job_id: str) -> StreamingResponse:
        """The job's state as server-sent events, whenever it changes, until it has ended."""
        stream = job_events(service, own_job(service, job_id, request))
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.get("/jobs/{job_id}/files/{name}", response_class=FileResponse, responses=ERRORS, dependencies=KEY)
    def file(request: Request, job_id: str, name: str) -> FileResponse:
        """A picture, a certificate or a layer of a finished job."""
        files = service.jobs.files(own_job(service, job_id, request).id)
        if name not in files:
            raise ApiError(404, "not_found", "This job has no such file.", "GET /jobs/{job_id} lists its files.")
        return FileResponse(files[name], headers={"X-Content-Type-Options": "nosniff"})

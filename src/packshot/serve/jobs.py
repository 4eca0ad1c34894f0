"""Jobs that survive a restart: their rows in SQLite, their files in a folder each.

What holds, also when the process is killed at any point:

- A job that was accepted has its inputs on disk and a row; it is drawn when the server is there again.
- Pictures are written to a temporary folder that is renamed when it is whole. A job with a results folder is done, and
  is never drawn again.
- A job that was running when the server died three times is failed: it may be what killed it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packshot.runs.files import sha256
from packshot.serve.devices import Picture
from packshot.serve.schemas import Json

MAX_ATTEMPTS = 3
INPUTS = "inputs"
RESULTS = "results"
UNFINISHED = ("queued", "running")
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT NOT NULL,
    form TEXT NOT NULL,
    seed INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    finished REAL,
    error TEXT,
    UNIQUE (owner, idempotency_key)
)
"""


@dataclass(frozen=True)
class Job:
    """A row. owner: name of the API key that made it. form: the SceneForm as JSON. error: code, message and hint."""

    id: str
    owner: str
    fingerprint: str
    form: str
    seed: int
    steps: int
    state: str
    attempts: int
    created: float
    error: Json | None


FIELDS = [field.name for field in dataclasses.fields(Job)]


def fingerprint(form: str, files: dict[str, bytes]) -> str:
    """Digest of a whole request, by which a repeated one is recognised."""
    parts = [form]
    for name in sorted(files):
        parts += [name, sha256(files[name])]
    return sha256("\n".join(parts).encode())


def sync(folder: Path) -> None:
    """Make sure that the files in a folder, and the folder's own entries, are on the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class JobStore:
    """The jobs of one server, in ``folder``. All methods may be called from any thread."""

    def __init__(self, folder: Path, keep_seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.keep_seconds = keep_seconds
        self.lock = threading.Lock()
        self.database = sqlite3.connect(folder / "jobs.sqlite3", check_same_thread=False, isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=FULL")
        self.database.execute(SCHEMA)

    def execute(self, statement: str, values: Sequence[object] = ()) -> int:
        """Run a statement; returns the number of rows that it changed."""
        with self.lock:
            return self.database.execute(statement, values).rowcount

    def select(self, condition: str, values: Sequence[object] = ()) -> list[Job]:
        """The jobs that meet a condition, in the order in which they were accepted."""
        with self.lock:
            rows = self.database.execute(f"SELECT {', '.join(FIELDS)} FROM jobs WHERE {condition}", values).fetchall()
        jobs = []
        for row in rows:
            columns: Json = dict(zip(FIELDS, row, strict=True))
            columns["error"] = json.loads(row[-1]) if row[-1] else None
            jobs.append(Job(**columns))
        return jobs

    def path(self, job_id: str) -> Path:
        return self.folder / job_id

    def get(self, job_id: str, owner: str) -> Job | None:
        """A job, if it belongs to this key."""
        return next(iter(self.select("id = ? AND owner = ?", (job_id, owner))), None)

    def repeated(self, owner: str, idempotency_key: str) -> Job | None:
        """The job that was made with this idempotency key."""
        return next(iter(self.select("owner = ? AND idempotency_key = ?", (owner, idempotency_key))), None)

    def add(self, owner: str, form: str, files: dict[str, bytes], seed: int, steps: int, key: str | None) -> Job:
        """Accept a job. When this returns, the job is on the disk.

        Raises:
            sqlite3.IntegrityError: the idempotency key has been used meanwhile.
        """
        job_id = uuid.uuid4().hex
        inputs = self.path(job_id) / INPUTS
        inputs.mkdir(parents=True)
        for name, data in files.items():
            (inputs / name).write_bytes(data)
        sync(inputs)
        digest = fingerprint(form, files)
        values = (job_id, owner, key, digest, form, seed, steps, "queued", time.time())
        columns = "id, owner, idempotency_key, fingerprint, form, seed, steps, state, created"
        try:
            self.execute(f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * len(values))})", values)
        except sqlite3.IntegrityError:
            shutil.rmtree(self.path(job_id))
            raise
        return Job(job_id, owner, digest, form, seed, steps, "queued", 0, values[-1], None)

    def inputs(self, job_id: str) -> dict[str, bytes]:
        """The files of a job's form, by field."""
        return {file.name: file.read_bytes() for file in (self.path(job_id) / INPUTS).iterdir()}

    def begin(self, job_id: str) -> bool:
        """Mark a job as running; False if it is not queued any more."""
        statement = "UPDATE jobs SET state = 'running', attempts = attempts + 1 WHERE id = ? AND state = 'queued'"
        return self.execute(statement, (job_id,)) == 1

    def requeue(self, job_id: str) -> None:
        """Take a job back that the server's end has interrupted; it is not the job's fault."""
        statement = "UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE id = ? AND state = 'running'"
        self.execute(statement, (job_id,))

    def finish(self, job_id: str, pictures: list[Picture]) -> None:
        """Store the pictures of a running job, all or none of them."""
        temporary = self.path(job_id) / f"{RESULTS}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
        except FileNotFoundError:
            return  # the job was deleted meanwhile
        for k, picture in enumerate(pictures):
            (temporary / f"{k}.png").write_bytes(picture.png)
            certificate = json.dumps(picture.certificate, indent=2, ensure_ascii=False)
            (temporary / f"{k}.json").write_text(certificate + "\n", encoding="utf-8")
            if picture.cut_out is not None:
                (temporary / f"{k}-input.png").write_bytes(picture.cut_out)
            for name, layer in picture.layers.items():
                (temporary / f"{k}-{name}.png").write_bytes(layer)
        sync(temporary)
        temporary.rename(self.path(job_id) / RESULTS)
        self.execute("UPDATE jobs SET state = 'done', finished = ? WHERE id = ?", (time.time(), job_id))

    def fail(self, job_id: str, error: Json) -> None:
        """Store why a job has no pictures."""
        statement = "UPDATE jobs SET state = 'failed', finished = ?, error = ? WHERE id = ?"
        self.execute(statement, (time.time(), json.dumps(error), job_id))

    def remove(self, job_id: str) -> None:
        """Forget a job and delete its files."""
        self.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        shutil.rmtree(self.path(job_id), ignore_errors=True)

    def purge(self) -> None:
        """Remove the jobs that ended too long ago."""
        for job in self.select("finished < ?", (time.time() - self.keep_seconds,)):
            self.remove(job.id)

    def recover(self) -> list[Job]:
        """Bring rows and files together after a restart; returns the jobs that are still to be drawn."""
        self.purge()
        known = set()
        for job in self.select("1 = 1"):
            known.add(job.id)
            if job.state in UNFINISHED and (self.path(job.id) / RESULTS).is_dir():
                # killed between the renaming and the row
                self.execute("UPDATE jobs SET state = 'done', finished = ? WHERE id = ?", (time.time(), job.id))
            elif job.state == "running" and job.attempts >= MAX_ATTEMPTS:
                message = f"The server ended {MAX_ATTEMPTS} times while it drew this job."
                self.fail(job.id, {"error": message, "error_code": "interrupted", "hint": "Ask for less at once."})
        for folder in self.folder.iterdir():
            if folder.is_dir() and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)  # killed before its job was accepted
        self.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")
        return self.select("state = 'queued' ORDER BY created")

    def files(self, job_id: str) -> dict[str, Path]:
        """The files of a finished job by name."""
        with contextlib.suppress(FileNotFoundError):
            return {file.name: file for file in sorted((self.path(job_id) / RESULTS).iterdir())}
        return {}

    def close(self) -> None:
        with self.lock:
            self.database.close()

"""Rendered packshots as a step of the pipeline: jobs in, rows out, one Blender process per worker.

A worker speaks to its Blender by JSON lines and reads what it wrote; no scene is rendered twice, and a killed build
loses at most the scenes that were being rendered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from packshot.config.schema import BuildData, RenderSplit
from packshot.errors import ConfigError, PackshotError
from packshot.pipeline import Outcome, Step
from packshot.pipeline.executor import worker_number
from packshot.pipeline.step import Sample
from packshot.render.frame import Job
from packshot.render.phrase_lookup import renderable
from packshot.render.rows import features, row
from packshot.render.sample import is_test_seed, sample_job
from packshot.runs.files import CHECKOUT, file_sha256, resolve, sha256

VERSION = 2  # raise it when the same job gives other pixels
SEEDS_PER_RUN_SEED = 1_000_000


@dataclass(frozen=True)
class Farm:
    """How scenes are rendered. python: Blender's environment; folder: where finished scenes lie, one folder each."""

    python: str
    folder: str
    size: int
    samples: int
    quality: int | None
    threads: int
    pinned: bool


def blender_python(environment: str) -> Path:
    """The interpreter of Blender's environment.

    Raises:
        ConfigError: there is none.
    """
    python = resolve(environment) / "bin" / "python"
    if not python.exists():
        raise ConfigError(
            f"render.environment={environment}: Blender is not installed there.",
            "`make render-env` installs it (about 1 GB, into .venv-render).",
        )
    return python


def job_name(job: Sample, size: int, samples: int) -> str:
    """Name of the job's folder: it changes with everything that changes a pixel."""
    text = json.dumps([VERSION, job, size, samples], sort_keys=True)
    return f"{job['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def seeds(split: RenderSplit, first: int) -> Iterator[int]:
    """The seeds of a split, in order, from `first` on."""
    wanted = {RenderSplit.all: (False, True), RenderSplit.train: (False,), RenderSplit.heldout: (True,)}[split]
    return (seed for seed in itertools.count(first) if is_test_seed(seed) in wanted)


def jobs(config: BuildData) -> list[Sample]:
    """The render jobs that ``config.render`` asks for, as items of a pipeline.

    Raises:
        ConfigError: a slot value that the renderer does not know.
    """
    render = config.render
    given = renderable(asdict(render.scene), render.nearest)
    first = config.run.seed * SEEDS_PER_RUN_SEED
    wanted = render.seeds or itertools.islice(seeds(render.split, first), render.count)
    return [{"source": f"seed {seed}", "job": json.dumps(sample_job(seed, given))} for seed in wanted]


def fingerprints(items: Sequence[Sample]) -> list[str]:
    """Digests of each job with the meshes it refers to."""
    meshes = file_sha256(resolve("data/objects/objects.zip"))
    return [sha256((meshes + item["job"]).encode()) for item in items]


@contextmanager
def sole_use(folder: str) -> Iterator[None]:
    """Holds a folder of finished scenes (``render.folder``) while the block runs.

    Two builds there at once would take each other's drafts for a killed run's remains. The system frees the lock when
    its process ends, however it ends.

    Raises:
        ConfigError: another build holds it, or it cannot be written.
    """
    lock = FileLock(Path(folder) / ".lock", timeout=0, mode=0o666)  # the next build may be another user's
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"render.folder={folder} is in use by another build.",
            "Wait until it has ended, its scenes can be reused then; or name another folder.",
        ) from error
    except OSError as error:
        raise ConfigError(f"render.folder={folder} cannot be written: {error.strerror}.", "Name another.") from error
    try:
        yield
    finally:
        lock.release()


def open_farm(config: BuildData, run: Path) -> Farm:
    """Settings of the renderer for a run, and its folder for finished scenes, cleared of a killed run's remains."""
    render = config.render
    cores = len(os.sched_getaffinity(0))
    folder = Path(render.folder) if render.folder else run / "renders"
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(".*.draft"):
        shutil.rmtree(draft, ignore_errors=True)
    _scratch(folder).mkdir(exist_ok=True)
    threads = max(1, cores // config.executor.workers)
    return Farm(
        str(blender_python(render.environment)),
        str(folder),
        render.size,
        render.samples,
        render.quality,
        threads,
        pinned=threads == 1 and cores > 1,
    )


def _scratch(folder: str | Path) -> Path:
    """Folder of Blender's temporary files, 16 MB of meshes a process. The next run clears what a killed one left."""
    return Path(folder) / ".scratch.draft"


def render_step(farm: Farm) -> Step:
    """Job to row. Its key holds what changes a pixel or a byte, not how many processes do it."""
    config = {"version": VERSION, "size": farm.size, "samples": farm.samples, "quality": farm.quality}
    return Step("render", VERSION, config, features().arrow_schema, partial(_render, farm=farm), calls_of=1)


def _render(samples: list[Sample], farm: Farm) -> list[Outcome]:
    return [_render_one(sample, farm) for sample in samples]


def _render_one(sample: Sample, farm: Farm) -> Outcome:
    job = json.loads(sample["job"])
    name = job_name(job, farm.size, farm.samples)
    folder = Path(farm.folder) / name
    if not folder.is_dir():
        refused = _blender(farm).render({**job, "name": name})
        if refused:
            return Outcome({"id": "", "source": sample["source"]}, "product_not_visible", refused, kept=False)
    return Outcome(row(folder, farm.quality))


@cache
def _blender(farm: Farm) -> Blender:
    return Blender(farm)


class Blender:
    """One Blender process that renders job after job; it ends when this process does (its input closes)."""

    def __init__(self, farm: Farm) -> None:
        command = [farm.python, "-m", "packshot.render.blender", "--out", farm.folder]
        command += ["--size", str(farm.size), "--samples", str(farm.samples), "--threads", str(farm.threads)]
        number = worker_number()
        if farm.pinned and number is not None:
            cores = sorted(os.sched_getaffinity(0))
            command += ["--core", str(cores[number % len(cores)])]
        paths = {"PYTHONPATH": str(CHECKOUT / "src"), "TMPDIR": str(_scratch(farm.folder).absolute())}
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **paths},
        )

    def render(self, job: Job) -> str | None:
        """Render one job into its folder; returns why it was refused, or None.

        Raises:
            PackshotError: Blender stopped.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            raise PackshotError(
                f"Blender stopped while rendering seed {job['seed']} (exit code {code}): {self._tail()}",
                "run.resume=true goes on, finished scenes are kept. Short of memory? Use fewer executor.workers.",
            )
        return json.loads(answer)["error"]

    def _tail(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return " / ".join(lines[-3:]) or "it printed nothing"

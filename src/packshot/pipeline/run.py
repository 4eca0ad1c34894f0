"""Running steps over shards, with everything finished before left as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packshot.config.schema import ExecutorConfig
from packshot.lists import pick, select
from packshot.pipeline.executor import Execute, open_executor
from packshot.pipeline.ledger import Entry, Ledger
from packshot.pipeline.reuse import EarlierRows, digests_of
from packshot.pipeline.shards import Answers, batches, read_outcomes, read_samples, write_outcomes
from packshot.pipeline.step import Outcome, Sample, Step
from packshot.pipeline.worker_progress import report, watching
from packshot.runs.files import file_sha256, sha256
from packshot.runs.progress import progress


@dataclass(frozen=True)
class Report:
    """What a run left. entries: per step, one per shard. worked: shards that were done now, not found done."""

    folder: Path
    entries: dict[str, list[Entry]]
    worked: int

    def files(self, step: str) -> list[Path]:
        """A step's files in the order of the shards."""
        return [self.folder / entry.file for entry in self.entries[step]]


@dataclass(frozen=True)
class Job:
    """A shard for a worker.

    items: what the first step works on. files: what the steps before have written, empty for the first step.
    rows: how many samples reach the step. known: the ledger's entry of the shard.
    """

    folder: Path
    step: Step
    shard: int
    items: Sequence[Sample]
    fingerprints: Callable[[Sequence[Sample]], list[str]]
    files: list[Path]
    files_digest: str
    rows: int
    known: Entry | None

    def samples(self) -> Iterable[Sample]:
        """The step's input."""
        return read_samples(self.files, self.step.reads) if self.files else self.items

    def item_digests(self) -> list[str]:
        """The hash of each item's content for the first step, else nothing."""
        return [] if self.files else self.fingerprints(self.items)

    def digest(self, item_digests: Sequence[str]) -> str:
        """The hash of the input's content."""
        return self.files_digest if self.files else sha256("".join(item_digests).encode())


def run_steps(
    folder: Path,
    shards: Sequence[Sequence[Sample]],
    fingerprints: Callable[[Sequence[Sample]], list[str]],
    steps: Sequence[Step],
    executor: ExecutorConfig,
) -> Report:
    """Bring every step of every shard up to date.

    A shard of a step is done again when its key (content of its input, step name, version, config) or the bytes of its
    file differ from the ledger. In such a shard the rows with unchanged input are kept if the step is unchanged.
    Killed anywhere and run again, the folder ends with the same bytes.

    shards: the input items; the first step receives them with their position as ``index``.
    fingerprints: digests of the contents that items stand for, one each (called in the workers).
    """
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("steps/*/.*.tmp")]:
        leftover.unlink()  # of a killed run
    ledger = Ledger(folder)
    done: dict[str, list[Entry]] = {}
    worked = 0
    with open_executor(executor) as execute:
        for step in steps:
            jobs = jobs_of(folder, step, shards, fingerprints, list(done.values()), ledger)
            done[step.name], new = run_step(folder, step, jobs, ledger, execute)
            worked += new
    everything = list(itertools.chain(*done.values()))
    ledger.finish(everything)
    prune(folder, {entry.file for entry in everything})
    return Report(folder, done, worked)


def run_step(
    folder: Path, step: Step, jobs: Sequence[Job], ledger: Ledger, execute: Execute
) -> tuple[list[Entry], int]:
    """A step over all shards: their entries in order, and how many shards were not found done."""
    entries: dict[int, Entry] = {}
    new = rejected = 0
    rows = sum(job.rows for job in jobs)
    with progress(step.name, rows) as advance, watching(folder, advance) as meter:
        for entry, is_new in results_of(step, jobs, execute):
            if is_new:
                ledger.add(entry)
                new += 1
            entries[entry.shard] = entry
            rejected += entry.rejected
            meter.finished(entry.shard, entry.rows, rejected=rejected)
    return list(select(entries, range(len(jobs))).values()), new


def rejections(report: Report, step: str, columns: Sequence[str]) -> list[tuple[int, Sample]]:
    """(shard, row) of every sample to which a step gave a reason, kept ones with a remark included."""
    found = []
    for shard, file in enumerate(report.files(step)):
        for row in read_outcomes(file, columns):
            if row["reason"] is not None:
                found.append((shard, row))
    return found


def jobs_of(
    folder: Path,
    step: Step,
    shards: Sequence[Sequence[Sample]],
    fingerprints: Callable[[Sequence[Sample]], list[str]],
    before: Sequence[Sequence[Entry]],
    ledger: Ledger,
) -> list[Job]:
    """A job per shard: over the items for the first step, over the files of all steps before it for the others."""
    jobs = []
    folder = folder.absolute()  # a worker on another machine has another current folder
    for shard, items in enumerate(shards):
        numbered = [{**item, "index": index} for index, item in enumerate(items)]
        files = []
        hashes = ""
        rows = len(items)
        for of_step in before:
            entry = of_step[shard]
            files.append(folder / entry.file)
            hashes += entry.sha256
            rows -= entry.rejected
        digest = sha256(hashes.encode())
        known = ledger.find(step.name, shard)
        jobs.append(Job(folder, step, shard, numbered, fingerprints, files, digest, rows, known))
    return jobs


def results_of(step: Step, jobs: Sequence[Job], execute: Execute) -> Iterator[tuple[Entry, bool]]:
    """Entries as they are ready, each with whether it had to be made."""
    if step.whole:
        return iter(run_whole(step, jobs))
    return map(run_shard, jobs) if step.exclusive else execute(run_shard, jobs)


def is_done(job: Job, key: str) -> bool:
    """Whether the ledger and the file of a shard agree with this key."""
    known = job.known
    if known is None or (known.key, known.file) != (key, job.step.file(job.shard)):
        return False
    file = job.folder / known.file
    return file.is_file() and file_sha256(file) == known.sha256


def run_shard(job: Job) -> tuple[Entry, bool]:
    """(entry, whether it had to be done). Runs in a worker."""
    of_items = job.item_digests()
    key = job.step.key(job.digest(of_items))
    if is_done(job, key):
        assert job.known is not None
        return job.known, False
    return commit(job, key, answers_of(job, iter(of_items))), True


def answers_of(job: Job, of_items: Iterator[str]) -> Iterator[Answers]:
    """A shard through the step, batch by batch. of_items: digests of the items, for the first step."""
    known = job.known
    earlier = EarlierRows(job.step, job.folder / known.file if known else None, known.sha256 if known else "")
    for batch in batches(job.samples()):
        digests = list(itertools.islice(of_items, len(batch))) or digests_of(batch)
        yield Answers(batch, digests, call_step(job, batch, digests, earlier))


def call_step(job: Job, batch: list[Sample], digests: list[str], earlier: EarlierRows) -> list[Outcome]:
    """A batch through the step, reported to the main process part by part; rows with the same input are kept."""
    outcomes: dict[int, Outcome] = {}
    changed: list[int] = []
    for position, sample in enumerate(batch):
        found = earlier.find(sample["index"], digests[position])
        if found is None:
            changed.append(position)
        else:
            outcomes[position] = found
    report(job.folder, job.shard, len(outcomes))
    for part in batches(changed, job.step.calls_of):
        outcomes.update(zip(part, job.step.function(pick(batch, part)), strict=True))
        report(job.folder, job.shard, len(part))
    return list(select(outcomes, range(len(batch))).values())


def run_whole(step: Step, jobs: Sequence[Job]) -> list[tuple[Entry, bool]]:
    """All shards in one call; its key covers all of them."""
    key = step.key(sha256("".join(job.digest(job.item_digests()) for job in jobs).encode()))
    if all(is_done(job, key) for job in jobs):
        return [(job.known, False) for job in jobs if job.known]
    samples = list(map(list, map(Job.samples, jobs)))
    outcomes = iter(step.function(list(itertools.chain(*samples))))
    entries = []
    for job, shard in zip(jobs, samples, strict=True):
        entries.append((commit(job, key, dealt(shard, outcomes)), True))
    return entries


def dealt(shard: Sequence[Sample], outcomes: Iterator[Outcome]) -> Iterator[Answers]:
    """A shard's part of the outcomes of a whole call, batch by batch."""
    for batch in batches(shard):
        yield Answers(batch, digests_of(batch), list(itertools.islice(outcomes, len(batch))))


def commit(job: Job, key: str, answers: Iterable[Answers]) -> Entry:
    """Write a shard and make its entry for the ledger."""
    path = job.folder / job.step.file(job.shard)
    rows, rejected = write_outcomes(path, job.step, answers)
    return Entry(job.step.name, job.shard, key, job.step.file(job.shard), file_sha256(path), rows, rejected)


def prune(folder: Path, wanted: set[str]) -> None:
    """Remove shards of an earlier configuration (a step that is gone, more shards)."""
    for file in [*folder.glob("part-*.parquet"), *folder.glob("steps/*/*.parquet")]:
        if file.relative_to(folder).as_posix() not in wanted:
            file.unlink()
    for step in folder.glob("steps/*"):
        if not any(step.iterdir()):
            step.rmdir()

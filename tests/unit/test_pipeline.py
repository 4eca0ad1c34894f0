"""Rule 29: shards are committed whole, a killed run ends with the bytes of an unbroken one, done work stays done."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packshot.config.schema import ExecutorConfig
from packshot.errors import PackshotError
from packshot.pipeline import Outcome, Step, run_steps
from packshot.pipeline.run import rejections
from packshot.pipeline.shards import split
from packshot.pipeline.worker_progress import report, watching
from packshot.runs.files import sha256

ITEMS = [{"value": value} for value in range(50)]
NUMBER = pa.schema([("number", pa.int64())])


def fingerprints(items):
    return [sha256(json.dumps(item["value"]).encode()) for item in items]


def double(samples):
    return [
        Outcome({}, "unlucky", str(s["value"]), kept=False)
        if s["value"] % 13 == 0
        else Outcome({"number": 2 * s["value"]})
        for s in samples
    ]


def drop_seen(samples, modulus=7):
    """Keeps the first sample of each remainder over the whole dataset."""
    seen, outcomes = set(), []
    for sample in samples:
        rest = sample["number"] % modulus
        outcomes.append(Outcome() if rest not in seen else Outcome({}, "seen", str(rest), kept=False))
        seen.add(rest)
    return outcomes


def add(samples, amount=1):
    return [Outcome({"number": s["number"] + amount}, *(("big", "x") if s["number"] > 20 else ())) for s in samples]


def write(samples):
    return [Outcome({"number": s["number"]}) for s in samples]


def die(samples):
    os.kill(os.getpid(), signal.SIGKILL)


def steps(amount=1, modulus=70):
    return [
        Step("double", 1, {}, NUMBER, double),
        Step("unique", 1, {"m": modulus}, pa.schema([]), partial(drop_seen, modulus=modulus), ("number",), whole=True),
        Step("add", 1, {"amount": amount}, NUMBER, partial(add, amount=amount), ("number",)),
        Step("part", 1, {}, NUMBER, write, final=True),
    ]


def run(folder, items=ITEMS, size=20, workers=1, **options):
    return run_steps(folder, split(items, size), fingerprints, steps(**options), ExecutorConfig(workers=workers))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def numbers(report):
    return [n for file in report.files("part") for n in pq.read_table(file)["number"].to_pylist()]


def test_steps_pass_on_what_they_keep_in_order(tmp_path):
    report = run(tmp_path, modulus=14)
    assert numbers(report) == [2 * value + 1 for value in range(1, 8)]
    reasons = [row["reason"] for name in ("double", "unique", "add") for _, row in rejections(report, name, ())]
    assert reasons.count("unlucky") == 4
    assert reasons.count("seen") == 50 - 4 - 7
    # Every sample is accounted for: kept, or rejected by exactly one step.
    assert sum(e.rejected for entries in report.entries.values() for e in entries) + 7 == 50


def test_workers_change_nothing(tmp_path):
    """The number of shards comes from the input alone."""
    one, two = run(tmp_path / "one"), run(tmp_path / "two", workers=2)
    assert len(one.files("part")) == len(two.files("part")) == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_rerun_on_finished_work_does_nothing(tmp_path):
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    second = run(tmp_path)
    assert (first.worked, second.worked) == (12, 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def add_and_note(samples, notes, amount):
    with open(notes, "a") as file:
        file.writelines(f"{sample['number']}\n" for sample in samples)
    return add(samples, amount)


def noted_steps(notes, amount=1):
    middle = Step("add", 1, {"amount": amount}, NUMBER, partial(add_and_note, notes=notes, amount=amount), ("number",))
    return [steps()[0], middle, steps()[3]]


@pytest.mark.parametrize("amount", [1, 5], ids=["same step", "changed step"])
def test_only_changed_rows_of_a_shard_are_redone(tmp_path, amount):
    """As long as the step is the same; the bytes are those of a run from the beginning."""
    notes = tmp_path / "notes"
    run_steps(tmp_path / "a", split(ITEMS, 20), fingerprints, noted_steps(notes), ExecutorConfig())
    changed = [{"value": 99} if item["value"] == 25 else item for item in ITEMS]
    notes.unlink()
    run_steps(tmp_path / "a", split(changed, 20), fingerprints, noted_steps(notes, amount), ExecutorConfig())
    redone = notes.read_text().split()
    run_steps(tmp_path / "b", split(changed, 20), fingerprints, noted_steps(notes, amount), ExecutorConfig())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert redone == ["198"] if amount == 1 else len(redone) == 46


def test_a_damaged_file_is_not_reused(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    file = tmp_path / "steps/add/00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.get_field_index("number"), "number", [[0] * len(table)]), file)
    run(tmp_path)
    assert contents(tmp_path) == before


def worked(folder, **options):
    """Steps and shards that a run touches."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    run(folder, **options)
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.parquet")
        if path.stat().st_mtime_ns != before.get(path)
    }


def test_a_changed_setting_redoes_its_step_and_those_behind_it(tmp_path):
    run(tmp_path)
    redone = worked(tmp_path, amount=2)
    assert {name.rsplit("/", 1)[0] for name in redone if "/" in name} == {"steps/add"}
    assert len(redone) == 6
    fresh = tmp_path / "fresh"
    run(fresh, amount=2)
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("fresh")} == contents(fresh)


def test_a_changed_item_redoes_its_shard_only(tmp_path):
    run(tmp_path)
    items = [*ITEMS[:30], {"value": 1000}, *ITEMS[31:]]
    redone = worked(tmp_path, items=items)
    assert "steps/double/00001.parquet" in redone
    assert not {"steps/double/00000.parquet", "steps/double/00002.parquet"} & redone


def test_a_damaged_shard_is_done_again(tmp_path):
    run(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "steps/add/00001.parquet").write_bytes(b"damaged")
    (tmp_path / "part-00002.parquet").unlink()
    assert run(tmp_path).worked == 2
    assert contents(tmp_path) == whole


def test_fewer_shards_leave_nothing_behind(tmp_path):
    run(tmp_path / "a", size=20)
    run(tmp_path / "a", size=50)
    run(tmp_path / "b", size=50)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_pipeline
left = int(sys.argv[3])
def counted(function):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
test_pipeline.run(Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return contents(folder)


# A shard costs three events: its file is synced, renamed, its line in the ledger synced. 12 shards, then the ledger.
@pytest.mark.parametrize("event", [1, 2, 3, 4, 18, 29, 35])
def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path, unbroken, event):
    done = subprocess.run([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), str(event)])
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path) != unbroken
    run(tmp_path)
    assert contents(tmp_path) == unbroken


def test_a_ledger_line_cut_short_by_a_kill_is_no_line(tmp_path, unbroken):
    run(tmp_path)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-40])
    assert run(tmp_path).worked == 1
    assert contents(tmp_path) == unbroken


def test_a_dead_worker_is_an_error_with_a_way_out(tmp_path):
    bad = [Step("die", 1, {}, NUMBER, die)]
    with pytest.raises(PackshotError, match="worker") as caught:
        run_steps(tmp_path, split(ITEMS, 20), fingerprints, bad, ExecutorConfig(workers=2))
    assert "run.resume=true" in caught.value.hint


def test_progress_adds_up_to_the_rows(tmp_path):
    told = []
    with watching(tmp_path, lambda n=1, **figures: told.append(n)) as meter:
        report(tmp_path, 0, 3)
        meter.poll()
        meter.poll()
        report(tmp_path, 0, 1)
        report(tmp_path, 1, 2)
        meter.poll()
        meter.finished(0, 5)
        meter.finished(1, 2)
        meter.finished(2, 4)  # found done: nobody told
    assert sum(told) == 11
    assert not (tmp_path / "steps" / ".progress").exists()

"""The run folder: one process works in it at a time, and nothing from outside can write an entry in its log."""

import errno
import gc
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from packshot.cli import STAGES, Stage, run_stage
from packshot.config.compose import compose
from packshot.engine import processes
from packshot.errors import ConfigError, PackshotError
from packshot.runs.folder import answer, discard_refused, log, open_run, printable, start_log
from packshot.runs.plan_file import answer_figures
from packshot.runs.progress import lines


def test_names_and_tracebacks_cannot_pass_for_entries(tmp_path):
    run = open_run("evaluate", compose("evaluate", [f"run.dir={tmp_path}/run"]))
    name = "a.png\n2026-01-01 00:00:00,000 INFO all is well\x1b[2J\r\u2028x"
    log.warning("%s failed", name)
    try:
        raise ValueError(name)
    except ValueError:
        log.exception("failed")
    text = (run.path / "log.txt").read_text()
    entries = [line for line in text.splitlines() if not line.startswith("    ")]
    assert [line.split(" ", 2)[2] for line in entries] == [
        f"INFO running in {run.path}",
        "WARNING a.png",
        "ERROR failed",
    ]
    assert r"all is well\x1b[2J\r\u2028x failed" in text
    assert "    ValueError: a.png" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("Äpfel 10 € 文", "Äpfel 10 € 文"), ("a\nb\tc\x00", r"a\nb\tc\x00"), ("\udc80\u202e", r"\udc80\u202e")],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown


def test_a_folder_of_a_running_process_is_refused(tmp_path):
    """It is free again once that process has ended."""
    work = f"""
import time
from packshot.config.compose import compose
from packshot.runs.folder import open_run
from packshot.runs.files import replacing_file, replacing_folder
run = open_run("evaluate", compose("evaluate", ["run.dir={tmp_path}/run"]))
with replacing_file(run.path / "report.json") as file, replacing_folder(run.path / "checkpoints" / "10") as folder:
    file.write_text("half")
    (folder / "state.json").write_text("half")
    print("open", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "open\n"
            config = (tmp_path / "run" / "config.yaml").read_text()
            again = compose("evaluate", [f"run.dir={tmp_path}/run", "run.resume=true", "suite=scene"])
            with pytest.raises(ConfigError, match="in use: another process works in it"):
                open_run("evaluate", again)
            assert (tmp_path / "run" / "config.yaml").read_text() == config
            assert len(list((tmp_path / "run").rglob(".*.tmp"))) == 2
        finally:
            other.send_signal(signal.SIGKILL)
    assert open_run("evaluate", again).resumed
    assert not list((tmp_path / "run").rglob(".*.tmp"))  # nor does what it was writing stay
    assert open_run("evaluate", again).resumed  # the same process may


def test_a_folder_stays_locked_during_an_inner_run(tmp_path):
    """As evaluate.py has one when it draws, and as whoever reads log.txt."""
    outer = open_run("evaluate", compose("evaluate", [f"run.dir={tmp_path}/run"]))
    open_run("generate", compose("generate", [f"run.dir={tmp_path}/run/base"]))
    start_log(outer.path / "log.txt")
    (outer.path / "log.txt").read_text()
    work = f"""
from packshot.config.compose import compose
from packshot.runs.folder import open_run
open_run("evaluate", compose("evaluate", ["run.dir={tmp_path}/run", "run.resume=true"]))
"""
    refused = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True)
    assert "in use: another process works in it" in refused.stderr
    del outer
    gc.collect()
    assert not subprocess.run([sys.executable, "-c", work]).returncode


def test_a_full_disk_ends_any_script_with_a_sentence(monkeypatch, capsys):
    def fail(config):
        raise failure

    monkeypatch.setitem(sys.modules, "work", SimpleNamespace(fail=fail))
    monkeypatch.setitem(STAGES, "evaluate", Stage("", "work:fail"))
    failure = OSError(errno.ENOSPC, "No space left on device", "report.json")
    with pytest.raises(SystemExit) as ended:
        run_stage("evaluate", [])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "error: report.json cannot be read or written: No space left on device." in said
    assert "Free some space. run.resume=true" in said
    failure = OSError(errno.EROFS, "Read-only file system", "outputs")
    with pytest.raises(SystemExit) as ended:
        run_stage("evaluate", [])
    assert ended.value.code == 1
    assert "outputs cannot be read or written: Read-only file system.\n  The file system" in capsys.readouterr().err
    failure = FileNotFoundError(errno.ENOENT, "No such file")
    with pytest.raises(FileNotFoundError):
        run_stage("evaluate", [])


def test_a_machine_without_the_run_folder_stops_all(tmp_path, monkeypatch):
    other = SimpleNamespace(
        num_processes=2, process_index=1, is_main_process=False, wait_for_everyone=lambda: None, sign=tmp_path / "x"
    )
    monkeypatch.setattr(processes, "broadcast_from_main", lambda accelerator, make: "x")
    monkeypatch.setattr(processes, "gather_object", lambda items: items)
    with pytest.raises(PackshotError, match=r"process 1 \(on .*\) sees another folder of that name, or none") as caught:
        processes.refuse_unshared(tmp_path, other)
    assert "data.cache_dir" in caught.value.hint
    other.sign.touch()
    processes.refuse_unshared(tmp_path, other)


def test_a_log_line_before_anything_is_done_has_no_eta(capsys):
    """Ten seconds may pass before the first of the work, and then there is no rate."""
    with contextmanager(lines)("pictures", 4, 0, every_seconds=0.0) as advance:
        advance(0)
        advance(4)
    first, last = capsys.readouterr().err.splitlines()
    assert "0/4  ETA unknown" in first
    assert "4/4  took" in last


@pytest.mark.parametrize("script", ["merge", "generate", "caption_vlm"])
def test_every_run_folder_has_the_three_files(tmp_path, script):
    run = open_run(script, compose(script, [f"run.dir={tmp_path}/run"]))
    assert {"config.yaml", "metrics.jsonl", "log.txt"} <= {entry.name for entry in run.path.iterdir()}


@pytest.mark.parametrize("worked", [False, True])
def test_a_refused_run_leaves_no_folder(tmp_path, worked):
    """Unless it has measured something."""
    run = open_run("merge", compose("merge", [f"run.dir={tmp_path}/run"]))
    if worked:
        run.metrics({"step": 1})
    discard_refused()
    assert run.path.exists() == worked


def test_a_plan_shows_figures_as_people_read_them(monkeypatch):
    shown = []
    monkeypatch.setattr(answer, "info", lambda line, *values: shown.append((line % values).split(maxsplit=1)))
    answer_figures({"seconds": (0.0000053, 1.5), "price": None, "change": "", "pictures": 5, "total_gib": 0.1})
    assert shown == [["seconds", "5.3e-06 to 1.500"], ["pictures", "5"], ["total_gib", "0.100"]]

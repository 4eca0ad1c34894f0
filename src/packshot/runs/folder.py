"""The run folder: ``config.yaml``, ``metrics.jsonl``, ``log.txt`` and what the script adds."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO
from weakref import WeakSet

from packshot.config.common import RunConfig
from packshot.config.compose import to_yaml
from packshot.config.unread import script_notes
from packshot.errors import ConfigError
from packshot.runs.files import remove_leftovers, replacing_file, writing

log = logging.getLogger("packshot")  # what happens while a command works: standard error, and the run's log.txt
answer = log.getChild("answer")  # what the command found or made: standard output, and log.txt
LOCK = ".lock"
METRICS = "metrics.jsonl"
# Where a run writes. Other runs may write to other folders below it.
OWN_FOLDERS = (".", "checkpoints", "samples", "layers")
# What a run holds before it has done any work.
WITHOUT_WORK = {LOCK, "config.yaml", METRICS, "log.txt", "wandb", "wandb_id.txt", "tensorboard"}


# The runs that this process has opened, as long as anything holds them: a run's lock goes with it.
opened: WeakSet[Run] = WeakSet()


class RunScript(Protocol):
    """A script's config, of which only ``run`` is read here."""

    run: RunConfig


@dataclass(frozen=True)
class Run:
    """An open run folder. Only the main process of a run writes to it. lock: held as long as this object lives."""

    path: Path
    resumed: bool
    lock: TextIO | None = field(default=None, repr=False, compare=False)

    def write_config(self, config: object) -> None:
        """Write ``config.yaml``, or replace it."""
        with replacing_file(self.path / "config.yaml") as file:
            file.write_text(to_yaml(config))

    def metrics(self, line: Mapping[str, object]) -> None:
        """Append one line to ``metrics.jsonl``. Raises PackshotError if it cannot be written."""
        file = self.path / METRICS
        with (
            writing(str(file), "run.resume=true continues from the newest checkpoint, if there is one."),
            file.open("a+b") as out,
        ):
            if ends_inside_line(out):  # a full disk or a kill has cut the last line
                out.write(b"\n")
            out.write(json.dumps(line).encode() + b"\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first, without lines that a full disk or a kill has cut."""
    file = run / METRICS
    lines: list[dict[str, Any]] = []
    if not file.exists():
        return lines
    for text in file.read_text().splitlines():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def ends_inside_line(file: BinaryIO) -> bool:
    """Whether the last line of an open file has no end."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def default_dir(script: str) -> str:
    """``outputs/<script>/<date-time>``."""
    return f"outputs/{script}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def open_run(script: str, config: RunScript, resumable: bool = True) -> Run:
    """Create the folder ``config.run.dir`` (or continue in it) and start its log.

    resumable: whether a run may continue with any config. If not, a resumed folder keeps its ``config.yaml`` until the
        caller has found that the new config fits, and writes it.

    Raises:
        ConfigError: the folder has content and run.resume is not set, another process works in it, or it cannot be
            written.
    """
    path = Path(config.run.dir or default_dir(script))
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={path} is a file.", "Name a new folder.")
    used = path.is_dir() and any(entry.name != LOCK for entry in path.iterdir())
    if used and not config.run.resume:
        raise ConfigError(
            f"run.dir={path} exists and is not empty.",
            "Name a new folder, or add run.resume=true to continue in this one. Nothing was changed.",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = Run(path, resumed=used, lock=claim(path))
        opened.add(run)
        start_log(path / "log.txt")
        (path / METRICS).open("ab").close()  # every run folder has one; the time of an old one stays
        if used:  # the folder is locked, so the process that left half-written files there has ended
            for name in OWN_FOLDERS:
                remove_leftovers(path / name)
        if resumable or not (path / "config.yaml").exists():
            run.write_config(config)
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be written: {error.strerror}.", "Choose another folder.") from error
    log.info("%s in %s", "resuming" if used else "running", path)
    for text in script_notes(config):
        log.warning("%s", text)
    return run


def discard_refused() -> None:
    """Delete the folders of this process's runs that have done no work, because their config was refused.

    A folder that was resumed, or that holds anything else than what opening a run writes, is kept.
    """
    for run in list(opened):
        used = run.resumed or any(entry.name not in WITHOUT_WORK for entry in run.path.iterdir())
        used = used or bool(read_metrics(run.path))
        if not used:
            shutil.rmtree(run.path)


def claim(path: Path) -> TextIO | None:
    """Lock a run folder until the result is garbage-collected or this process ends. None: the file system has no locks.

    It is a POSIX lock. Unlike others, forked processes do not inherit it; they may outlive a killed parent by seconds.

    Raises:
        ConfigError: another process has it.
    """
    stream = (path / LOCK).open("a")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise ConfigError(
            f"run.dir={path} is in use: another process works in it. Nothing was changed.",
            f"Wait until it has ended, or name another folder. If its machine died: delete {path / LOCK}.",
        ) from None
    return stream


def printable(text: str) -> str:
    """The text on one line: line breaks, control characters and others that do not print become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class EntryFormatter(logging.Formatter):
    """Indents what follows the first line of an entry.

    File names and texts that strangers send can then neither look like another entry nor control the terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().format(record).split("\n")))


class AnswerHandler(logging.StreamHandler):
    """Writes answers to standard output. A reader that has gone (``| head -1``) is an error, as with ``print``."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error that emit() is handling


def is_no_answer(record: logging.LogRecord) -> bool:
    return record.name != answer.name


def start_log(file: Path) -> None:
    """Log to the end of this file and to the screen, and to no other file. Raises OSError if it cannot be written."""
    for logger in (log, answer):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    to_file = logging.FileHandler(file)
    to_file.setFormatter(EntryFormatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen = logging.StreamHandler(sys.stderr)
    to_screen.setFormatter(EntryFormatter("%(message)s"))
    to_screen.addFilter(is_no_answer)
    to_output = AnswerHandler(sys.stdout)
    to_output.setFormatter(to_screen.formatter)
    log.addHandler(to_file)
    log.addHandler(to_screen)
    answer.addHandler(to_output)

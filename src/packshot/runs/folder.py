"""The run folder: ``config.yaml``, ``metrics.jsonl``, ``log.txt`` and whatever the script adds."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from packshot.config.compose import to_yaml
from packshot.errors import ConfigError
from packshot.runs.files import remove_leftovers, replacing_file, writing

log = logging.getLogger("packshot")
LOCK = ".lock"
_OWN = (".", "checkpoints", "samples", "layers")  # where a run writes; other runs may write to other folders below it


@dataclass(frozen=True)
class Run:
    """An open run folder. Only the main process of a run writes to it. lock: held as long as this object lives."""

    path: Path
    resumed: bool
    lock: Any = field(default=None, repr=False, compare=False)

    def write_config(self, config: Any) -> None:
        """(Re)write ``config.yaml``."""
        with replacing_file(self.path / "config.yaml") as file:
            file.write_text(to_yaml(config))

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``. Raises PackshotError if it cannot be written."""
        file = self.path / "metrics.jsonl"
        with (
            writing(str(file), "Make room; run.resume=true goes on from the newest checkpoint."),
            file.open("a+b") as out,
        ):
            cut = _ends_inside_a_line(out)  # a full disk, or a kill, cut the last one
            out.write(b"\n" * cut + json.dumps(line).encode() + b"\n")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, oldest first; without those that a full disk or a kill cut."""
    file, lines = run / "metrics.jsonl", []
    for text in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _ends_inside_a_line(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def default_dir(script: str) -> str:
    """``outputs/<script>/<date-time>``."""
    return f"outputs/{script}/{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def open_run(script: str, config: Any, resumable: bool = True) -> Run:
    """Create the folder ``config.run.dir`` (or continue in it) and start its log.

    resumable: whether going on with this config needs nobody's leave. If not, a folder that is gone on with keeps its
        ``config.yaml`` until the caller has found that the config fits, and writes it.

    Raises:
        ConfigError: the folder has content and run.resume is not set, another process works in it, or the path is no
            folder that can be written.
    """
    path = Path(config.run.dir or default_dir(script))
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={path} is a file.", "Name a new folder.")
    used = path.is_dir() and any(entry.name != LOCK for entry in path.iterdir())
    if used and not config.run.resume:
        raise ConfigError(
            f"run.dir={path} exists and is not empty.",
            "Name a new folder, or add run.resume=true to go on in this one. Nothing was changed.",
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = Run(path, resumed=used, lock=_claim(path))
        start_log(path / "log.txt")
        for name in _OWN if used else ():  # the folder is ours alone, so what is half written there is dead
            remove_leftovers(path / name)
        if resumable or not (path / "config.yaml").exists():
            run.write_config(config)
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be written: {error.strerror}.", "Choose another folder.") from error
    log.info("%s in %s", "resuming" if used else "running", path)
    return run


def _claim(path: Path) -> TextIO | None:
    """Lock a run folder until what is returned is collected, or this process ends. None: its file system has no locks.

    By POSIX lock: unlike others it does not pass to forked processes, which may outlive a killed parent by seconds.

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
    """The text on one line: line breaks, control characters and whatever else does not print become escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class EntryFormatter(logging.Formatter):
    """Indents what follows an entry's first line: names of files and texts that strangers send can neither pass for
    another entry nor steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n    ".join(map(printable, super().format(record).split("\n")))


def start_log(file: Path) -> None:
    """Log to this file (its end) and the screen, and to no other file. Raises OSError if it cannot be written."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    to_file = logging.FileHandler(file)
    to_file.setFormatter(EntryFormatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen = logging.StreamHandler(sys.stderr)
    to_screen.setFormatter(EntryFormatter("%(message)s"))
    log.addHandler(to_file)
    log.addHandler(to_screen)

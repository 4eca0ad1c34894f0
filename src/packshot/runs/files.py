"""Files: where relative paths lead, and writes that are either whole or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packshot.errors import ConfigError, PackshotError

CHECKOUT = Path(__file__).resolve().parents[3]  # without a checkout, a folder of the installation
SHIPPED = "data"
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # it can only be read by setting it
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


def resolve(path: str | Path) -> Path:
    """A path as the user means it: relative to the working folder, else where the shipped ``data/`` lies.

    Raises:
        ConfigError: PACKSHOT_DATA names no folder.
    """
    given = Path(path).expanduser()
    if given.is_absolute() or given.exists():
        return given
    if given.parts[:1] == (SHIPPED,):
        shipped = shipped_data() / given.relative_to(SHIPPED)
        return shipped if shipped.exists() else given
    in_checkout = CHECKOUT / given
    return in_checkout if in_checkout.exists() else given


def shipped_data() -> Path:
    """The folder with the mini family and the rendered sets: the one that PACKSHOT_DATA names, else the checkout's."""
    named = os.environ.get("PACKSHOT_DATA")
    if not named:
        return CHECKOUT / SHIPPED
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"PACKSHOT_DATA={named}: there is no such folder.", "Name the data/ folder of a checkout.")
    return folder


def missing_hint(path: str | Path) -> str:
    """Where a path was looked for."""
    given = Path(path).expanduser()
    hint = f"Looked for {given.absolute()}."
    if given.parts[:1] != (SHIPPED,):
        return hint
    return f"{hint} Shipped data comes with a checkout; elsewhere set PACKSHOT_DATA to the data/ folder of one."


def readable(key: str, path: str | Path) -> Path:
    """The resolved path of a file or folder that the config names under ``key``.

    Raises:
        ConfigError: when it does not exist or may not be read.
    """
    found = resolve(path)
    if not found.exists():
        raise ConfigError(f"{key}={path}: no such file or folder.", missing_hint(path))
    if not os.access(found, os.R_OK | (os.X_OK if found.is_dir() else 0)):
        raise ConfigError(f"{key}={path} may not be read.", f"chmod u+r {found.absolute()}")
    return found


def _temporary(path: Path) -> Path:
    """A hidden name that no other process writes to: folders may be shared by machines, whose process numbers meet."""
    return path.with_name(f".{path.name}.{zlib.crc32(platform.node().encode())}{os.getpid()}.tmp")


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path next to ``path`` that takes its place when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an exception; an old ``path`` goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _settle(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what :func:`replacing_file` and :func:`replacing_folder` were writing in the folder when their process was
    killed. Nobody else may be writing there."""
    for found in list(folder.glob(".*.tmp")):
        if _TEMPORARY.fullmatch(found.name):
            shutil.rmtree(found, ignore_errors=True) if found.is_dir() else found.unlink(missing_ok=True)


STALE_SECONDS = 3600  # no file is written for that long without a change


def remove_stale(folder: Path) -> int:
    """Delete what killed processes left half-written in a folder where others may be writing; returns its bytes.

    The age tells: processes of other machines and containers write there too, and their numbers say nothing here.
    """
    removed = 0
    for found in list(folder.glob(".*.tmp")):
        with suppress(OSError):  # its process has just finished, or it belongs to somebody else
            state = found.stat()
            if _TEMPORARY.fullmatch(found.name) and time.time() - state.st_mtime > STALE_SECONDS:
                found.unlink()
                removed += state.st_size
    return removed


REMEDIES = {
    errno.ENOSPC: "Free some space. ",
    errno.EDQUOT: "Free some space, or ask for a larger quota. ",
    errno.EACCES: "Give yourself the right to write there. ",
    errno.EPERM: "Give yourself the right to write there. ",
    errno.EROFS: "The file system is mounted read-only: choose another folder. ",
    errno.ENAMETOOLONG: "Choose a shorter name. ",
}


@contextmanager
def writing(what: str, way_out: str) -> Iterator[None]:
    """Files are written in this block; when that fails, it ends with an error message that names the remedy.

    what: names it in the message, as the subject. way_out: what is safe, and how to continue.

    Raises:
        PackshotError: in place of what Python, safetensors and torch raise.
    """
    from safetensors import SafetensorError  # Blender's environment, where this module is read too, has none

    try:
        yield
    except OSError as error:
        reason, cause, number = error.strerror or str(error), error, error.errno or 0
    except SafetensorError as error:
        reason, cause = str(error), error
        found = re.search(r"os error (\d+)", reason)
        number = int(found[1]) if found else 0
    except RuntimeError as error:
        if "inline_container" not in str(error):  # the writer of torch.save has no type and no reason for it
            raise
        reason, cause, number = "a file could not be written to its end", error, errno.ENOSPC
    else:
        return
    raise PackshotError(f"{what} cannot be written: {reason}.", f"{REMEDIES.get(number, '')}{way_out}") from cause


def _settle(path: Path) -> None:
    """On disk, and as readable as other new files: safetensors writes for its user alone."""
    path.chmod(path.stat().st_mode | (0o666 & ~_UMASK))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """The new name is on disk too when this returns: what it replaces may then be deleted."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256(data: bytes) -> str:
    """Hex digest of bytes: the ``id`` of a sample."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path, pattern: str = "*") -> str:
    """Digest over names and contents of a folder's files: identity of a dataset or of a model's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob(pattern)):
        if file.is_file():
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()

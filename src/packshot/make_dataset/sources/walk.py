"""The regular files behind a path: folders, globs and single files, on this machine or on any store."""

from __future__ import annotations

import os
import re
import stat
from pathlib import PurePosixPath
from typing import Any

import fsspec

from packshot.dataset.walk import Unread, hidden, walk
from packshot.errors import ConfigError
from packshot.imaging.files import IMAGE_SUFFIXES
from packshot.make_dataset.sources.base import Listing, is_local
from packshot.runs.files import resolve


def open_path(path: str) -> tuple[Any, str]:
    """(file system, path inside it).

    Raises:
        ConfigError: no driver for the store.
    """
    if "://" not in path:
        return fsspec.filesystem("file"), str(resolve(path).absolute())
    try:
        return fsspec.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be opened: {error}",
            "Install its driver: s3:// needs s3fs (packshot[scale]), https:// aiohttp, gs:// gcsfs.",
        ) from error


def list_files(given: str, cache: str = "") -> Listing:
    """The files behind ``source.path``, and what of it cannot be read.

    Raises:
        ConfigError: nothing there, or no driver for the store.
    """
    fs, root = open_path(given)
    unread = Unread()
    base = root.rstrip("/")
    if is_local(fs) and os.path.isdir(root):
        paths = list(walk(root.rstrip("/") or "/", unread))
    elif fs.exists(root):  # before it is taken for a glob: names may hold brackets
        if not fs.isdir(root):
            base = root.rpartition("/")[0]
        paths = fs.find(root) if fs.isdir(root) else [root]
    else:
        wild = re.search(r"[*?[]", root)
        if wild is None:
            raise ConfigError(f"source.path={given}: no such file or folder.", f"Looked for {root}.")
        base = root[: wild.start()].rpartition("/")[0]
        paths = fs.glob(root)
    kept = [path for path in sorted(paths) if path == root or usable(fs, path, base, unread)]
    return Listing(fs, given, root, base, kept, unread, cache)


def usable(fs: Any, path: str, base: str, unread: Unread) -> bool:
    """Whether a path is a regular file that is not hidden; notes what is not."""
    inside = path[len(base) :].lstrip("/")
    if hidden(inside):
        if (
            PurePosixPath(inside).suffix.lower() in IMAGE_SUFFIXES
        ):  # .DS_Store, .lock and Thumbs.db are not worth a line
            unread.add("hidden or the system's", inside)
        return False
    if not is_local(fs):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        unread.add(f"{error.strerror}", inside)
        return False
    if stat.S_ISREG(mode):
        return True
    unread.add("folders behind a glob (** reads them too)" if stat.S_ISDIR(mode) else "not regular files", inside)
    return False

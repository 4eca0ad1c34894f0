"""Every file below a folder of pictures, and what of it is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from packshot.errors import ConfigError

# Folders that systems and storage boxes keep among a person's files, and files of the same kind.
_SYSTEM = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini", "System Volume Information"))
_NAMED = 3  # names in a message, of files that were not read


@dataclass
class Unread:
    """Files that nothing reads, by the reason. key: the config key that names the folder."""

    names: dict[str, list[str]] = field(default_factory=dict)
    key: str = "source.path"

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def lines(self) -> list[str]:
        """A line for each reason, with the count and some of the names."""
        lines = []
        for reason, names in self.names.items():
            shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            lines.append(f"{self.key}: {len(names)} not read, {reason}: {shown}")
        return lines


def hidden(inside: str) -> bool:
    """Whether a part of a path, relative to the source, belongs to the system and not to the person."""
    return any(part.startswith(".") or part in _SYSTEM for part in PurePosixPath(inside).parts)


def walk(root: str, unread: Unread) -> Iterator[str]:
    """Every file below a folder. Links to folders are followed, a folder that was seen before is not entered again."""
    seen: set[tuple[int, int]] = set()
    folders = [root]
    linked: list[str] = []
    while folders or linked:
        # Folders before links to them: a picture has the name of the place where it lies.
        folder = folders.pop() if folders else linked.pop(0)
        inside = folder[len(root) :].lstrip("/")
        try:
            state = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise ConfigError(
                    f"{unread.key}={root} cannot be read: {error.strerror}.", "Check its rights."
                ) from error
            unread.add(f"folders that cannot be opened ({error.strerror})", inside)
            continue
        if (state.st_dev, state.st_ino) in seen:
            unread.add("links to a folder that is read already", inside)
            continue
        seen.add((state.st_dev, state.st_ino))
        for entry in entries:
            name = f"{inside}/{entry.name}".lstrip("/")
            if not entry.is_dir():
                yield entry.path
            elif hidden(name):
                unread.add("hidden or the system's", f"{name}/")
            elif entry.is_symlink():
                linked.append(entry.path)
            else:
                folders.append(entry.path)

"""Which image a name in a table means: people's names differ in case, accents, slashes and endings."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable

_ELSEWHERE = re.compile(r"/|[A-Za-z]:/|~|\w+://")  # how a path begins that may be of another machine


def fold(path: str) -> str:
    """A path with what file systems and spreadsheets change: case, how accents are composed, slashes."""
    return unicodedata.normalize("NFC", path.replace("\\", "/")).casefold()


class Names:
    """Paths by the names that people give them; a name that fits several is none."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        self._loose: dict[str, str | None] = {}
        for path in paths:
            for name in (os.path.splitext(path)[0], path):
                self._exact[name] = path
                key = fold(name)
                self._loose[key] = path if self._loose.get(key, path) == path else None

    def find(self, folder: str, name: str) -> str | None:
        """The path that a name in a folder means, with or without ending; None where it is none of them.

        Of a path of another machine the end counts: ``/home/me/set/a.jpg`` is the folder's ``me/set/a.jpg``, else its
        ``set/a.jpg``, else its ``a.jpg``.
        """
        given = name if name.startswith("/") else f"{folder}/{name}"
        exact = self._exact.get(os.path.normpath(given))
        if exact or not name:
            return exact
        plain = name.replace("\\", "/")
        if not _ELSEWHERE.match(plain):
            return self._loose.get(fold(os.path.normpath(f"{folder}/{plain}")))
        parts = plain.split("/")
        for start in range(1, len(parts)):
            found = self._loose.get(fold("/".join([folder, *parts[start:]])))
            if found:
                return found
        return None

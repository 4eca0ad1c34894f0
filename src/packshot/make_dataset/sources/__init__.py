"""What there is to build from: pictures in any of the forms that :mod:`packshot.config.sources` lists.

An item names one picture without reading it. Reading happens in the workers, a sample at a time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Protocol, cast

from packshot.config.schema import SourceConfig
from packshot.config.sources import SOURCES, conventions
from packshot.errors import ConfigError, PackshotError
from packshot.make_dataset.sources.base import Item, Listing, Raw, by_extension
from packshot.make_dataset.sources.files import is_archive, unread_reason
from packshot.make_dataset.sources.walk import list_files

_TRIES = 4  # with 1, 2 and 4 seconds between them


class Reader(Protocol):
    """What the module of a row in ``SOURCES`` has."""

    def claims(self, listing: Listing) -> list[str]:
        """The files of the listing that this kind reads; none: the source is of another kind."""
        ...

    def list_items(self, listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
        """An item per picture, in the order of the paths."""
        ...

    def read_item(self, item: Item) -> Raw:
        """The bytes of one item. Runs in a worker."""
        ...


def reader(kind: str) -> Reader:
    """The module that reads a kind of source."""
    return cast("Reader", import_module(SOURCES[kind].module))


def list_items(source: SourceConfig, cache: str = "") -> tuple[list[Item], list[str]]:
    """Every picture of the source, sorted by path; and lines for the screen, what is not read among them.

    cache: folder for downloads.

    Raises:
        ConfigError: nothing there, no picture there, or columns, masks or shards that cannot be used.
    """
    try:
        listing = list_files(source.path, cache)
        for kind in SOURCES:
            paths = reader(kind).claims(listing)
            if paths:
                items = reader(kind).list_items(listing, paths, source)
                notes = [*listing.notes, *listing.unread.lines()]
                return [{**item, "kind": kind} for item in items], notes
    except PackshotError:
        raise
    except Exception as error:  # every store has errors of its own
        if "://" not in source.path and not isinstance(error, OSError):
            raise
        raise ConfigError(
            f"source.path={source.path} cannot be read: {type(error).__name__}: {str(error)[:200]}.",
            "Check the address, the network and your rights there.",
        ) from error
    for path in listing.paths:
        if is_archive(path):
            listing.unread.add(unread_reason(path), listing.inside(path))
    kinds = by_extension(listing.paths) or "none that can be read"
    raise ConfigError(
        f"source.path={source.path} holds no image ({len(listing.paths)} files: {kinds}).",
        " ".join([*listing.unread.lines(), f"It reads {conventions()}."]),
    )


def read_items(items: Sequence[Item]) -> Iterator[Raw]:
    """The samples behind items, in order."""
    for item in items:
        yield read_item(item)


def read_item(item: Item) -> Raw:
    """One sample. What is not there, or not for us to read, is a rejected sample; a store that is down ends the build.

    Raises:
        PackshotError: a remote store does not answer, after several tries.
    """
    for attempt in range(_TRIES):
        try:
            return reader(item["kind"]).read_item(item)
        except PackshotError:
            raise
        except Exception as error:  # every store has errors of its own
            lasting = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
            if isinstance(error, OSError) and (lasting or item["place"].startswith("/")):
                return Raw(item["name"], None, error=error.strerror or str(error))
            if item["place"].startswith("/"):
                raise
            if attempt + 1 == _TRIES:
                raise PackshotError(
                    f"{item['name']} cannot be read: {type(error).__name__}: {str(error)[:200]}.",
                    "The store does not answer. run.resume=true goes on from here.",
                ) from error
        time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def fingerprints(items: Sequence[Item]) -> list[str]:
    """Digests over name and contents (image, mask, caption) of each item."""
    found = []
    for raw in read_items(items):
        digest = hashlib.sha256()
        texts = (raw.name, raw.text, raw.encoding, raw.license or "", raw.error, str(raw.repeats), raw.origin)
        for part in (*map(str.encode, (*texts, *raw.captions)), raw.data or b"", raw.mask or b""):
            digest.update(len(part).to_bytes(8, "big") + part)
        found.append(digest.hexdigest())
    return found

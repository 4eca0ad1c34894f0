"""What there is to build from: pictures in any of the forms that :mod:`packshot.config.sources` lists.

An item names one picture without reading it. Reading happens in the workers, a sample at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Protocol, cast

from packshot.config.schema import SourceConfig
from packshot.config.sources import SOURCES, conventions
from packshot.errors import ConfigError
from packshot.make_dataset.sources.base import Item, Listing, Raw, by_extension
from packshot.make_dataset.sources.walk import list_files


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
    listing = list_files(source.path, cache)
    for kind in SOURCES:
        paths = reader(kind).claims(listing)
        if paths:
            items = reader(kind).list_items(listing, paths, source)
            notes = [*listing.notes, *listing.unread.lines()]
            return [{**item, "kind": kind} for item in items], notes
    kinds = by_extension(listing.paths) or "none that can be read"
    raise ConfigError(
        f"source.path={source.path} holds no image ({len(listing.paths)} files: {kinds}).",
        " ".join([*listing.unread.lines(), f"It reads {conventions()}."]),
    )


def read_items(items: Sequence[Item]) -> Iterator[Raw]:
    """The samples behind items, in order."""
    for item in items:
        yield reader(item["kind"]).read_item(item)


def fingerprint(items: Sequence[Item]) -> str:
    """Digest over names and contents (image, mask, caption) of a shard."""
    digest = hashlib.sha256()
    for raw in read_items(items):
        texts = (raw.name, raw.text, raw.encoding, raw.license or "", raw.error, str(raw.repeats), raw.origin)
        for part in (*(text.encode() for text in texts), raw.data or b"", raw.mask or b""):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()

"""Tar shards, as WebDataset writes them: a sample's files lie together and share their name up to its first dot."""

from __future__ import annotations

import atexit
import json
import lzma
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from packshot.config.schema import SourceConfig
from packshot.dataset.rows import CAPTIONS
from packshot.dataset.text_files import EncodingError, decode_text
from packshot.dataset.walk import hidden
from packshot.errors import ConfigError
from packshot.imaging.files import is_image
from packshot.lists import column
from packshot.make_dataset.sources.base import Item, Listing, Raw, caption_count, described_row
from packshot.make_dataset.sources.packing import open_unpacked
from packshot.make_dataset.sources.tables import refuse_masks

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_ROLES = {"image", "mask", "txt", "caption", "json"}  # files of a sample that are read
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)


def claims(listing: Listing) -> list[str]:
    """Files with the name of a tar."""
    return [path for path in listing.paths if path.lower().endswith(_SUFFIXES)]


def list_items(listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
    """An item per sample of every shard. Raises ConfigError for a shard that cannot be read, or source.masks."""
    refuse_masks(source)
    items: list[Item] = []
    shards = set(paths)
    for path in listing.paths:
        if path not in shards:
            listing.unread.add("next to tar shards", listing.inside(path))
    for path in paths:
        items += tar_items(listing, path, source.caption_column)
    listing.notes.append(caption_count(sum(column(items, "captioned")), len(items)))
    return items


@dataclass(frozen=True)
class Shard:
    """A tar that is listed.

    samples: by key, where each file of a sample lies (offset, bytes), by its role. captioned: keys of samples with a
    caption. several: keys of those with several.
    """

    listing: Listing
    path: str
    caption_column: str | None
    samples: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    captioned: set[str] = field(default_factory=set)
    several: set[str] = field(default_factory=set)

    def leave_out(self, reason: str, member: str) -> None:
        """Count a file of the tar that is not read."""
        self.listing.unread.add(f"{reason} in tar shards", f"{self.listing.inside(self.path)}#{member}")


def tar_items(listing: Listing, path: str, caption_column: str | None) -> list[Item]:
    """One item per sample of a shard, in its order: where its image, mask, caption and metadata lie in the tar.

    ``<key>.jpg`` (or another image), ``<key>.mask.png``, ``<key>.txt`` or ``caption`` and ``license`` in
    ``<key>.json``; other files are counted and left alone.

    Raises:
        ConfigError: it is damaged, or a sample has several images.
    """
    shard = Shard(listing, path, caption_column)
    place = listing.place(path)
    try:
        with open_unpacked(place) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            note_members(shard, tar, 0)
    except _DAMAGED as error:
        raise ConfigError(
            f"source.path: {path} is not a whole tar file ({error}).",
            "Fetch it again, or pack it again as .tar, .tar.gz, .tar.bz2, .tar.xz or .tar.zst.",
        ) from error
    held = set().union(*shard.samples.values())
    if "image" not in held:
        named = ", ".join(sorted(held)) or "nothing"
        raise ConfigError(f"source.path: {path} holds no image, only {named}.", "A sample is <key>.jpg with <key>.txt.")
    name = listing.named(path)
    shared = {"place": place, "caption_column": caption_column}
    items = []
    for key, spans in shard.samples.items():
        for kind in set(spans) - _ROLES:
            shard.leave_out(kind, f"{key}.{kind}")
        if not _ROLES & set(spans):  # a file of the whole shard, such as a table
            continue
        texts = {"captioned": key in shard.captioned, "several": key in shard.several}
        items.append({**shared, "name": f"{name}#{key}", "spans": spans, **texts})
    return items


def note_members(shard: Shard, tar: tarfile.TarFile, start: int) -> None:
    """Add the files of a tar, and those of tars inside it. start: where the tar begins in the file."""
    for member in tar:
        if not member.isfile():
            if not member.isdir():
                shard.leave_out("links and devices", member.name)
            continue
        inner = tar.extractfile(member) if member.name.endswith(".tar") else None
        if inner is not None:
            with tarfile.open(fileobj=inner, mode="r:") as packed:
                note_members(shard, packed, start + member.offset_data)
        else:
            note_member(shard, tar, member, start)


def note_member(shard: Shard, tar: tarfile.TarFile, member: tarfile.TarInfo, start: int) -> None:
    """Add a file of the shard to its sample."""
    place = PurePosixPath(member.name)
    if hidden(member.name):
        if is_image(member.name):
            shard.leave_out("hidden or the system's", member.name)
        return
    first, _, kind = place.name.partition(".")
    kind = kind.lower()
    key = str(place.with_name(first))
    role = "mask" if kind.startswith("mask.") else "image" if is_image(f"x.{kind}") else kind
    spans = shard.samples.setdefault(key, {})
    if role == "image" and role in spans:
        raise ConfigError(
            f"source.path: {shard.path} has several images named {key}.", "Leave one, or name masks .mask.png."
        )
    spans[role] = (start + member.offset_data, member.size)
    if role == "json":
        described = json_fields(tar.extractfile(member), shard.caption_column)
        if described.get("text"):
            shard.captioned.add(key)
        if described.get(CAPTIONS):
            shard.several.add(key)
    elif role in ("txt", "caption") and member.size:
        shard.captioned.add(key)


def json_fields(file: IO[bytes] | None, caption_column: str | None) -> dict[str, Any]:
    """Captions and licence of a sample's .json; nothing for one that is damaged, which is rejected when it is read."""
    try:
        values = json.loads(file.read() if file else b"{}")
    except (ValueError, RecursionError):
        return {}
    return described_row(values, caption_column) if isinstance(values, dict) else {}


# The shard that was read last, open: samples of a compressed one are found by reading on, not from its start.
_open_shard: tuple[str, Any] | None = None


def close_shard() -> None:
    """Let go of the shard that was read last."""
    if _open_shard is not None:
        _open_shard[1].close()


def member_bytes(item: Item, role: str) -> bytes | None:
    """The content of one file of a sample; None where it has none."""
    global _open_shard
    if role not in item["spans"]:
        return None
    if _open_shard is None or _open_shard[0] != item["place"]:
        if _open_shard is not None:
            _open_shard[1].close()
        else:
            atexit.register(close_shard)
        _open_shard = item["place"], open_unpacked(item["place"])
    offset, size = item["spans"][role]
    _open_shard[1].seek(offset)
    return _open_shard[1].read(size)


def read_item(item: Item) -> Raw:
    """The files of one sample."""
    try:
        data = member_bytes(item, "image")
        mask = member_bytes(item, "mask")
        written = member_bytes(item, "txt") or member_bytes(item, "caption") or b""
        values = json.loads(member_bytes(item, "json") or b"{}")
        described = described_row(values, item["caption_column"]) if isinstance(values, dict) else {}
        text, encoding = decode_text(written)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        return Raw(item["name"], None, error=f"the shard is damaged ({error})")
    except EncodingError as error:
        return Raw(item["name"], None, error=f"its caption is {error}")
    except (ValueError, RecursionError) as error:
        return Raw(item["name"], None, error=f"its .json is damaged ({error})")
    error = "" if data is not None else f"the shard has no image named {item['name'].rpartition('#')[2]}"
    captions: tuple[str, ...] = () if text else described.get(CAPTIONS, ())
    text = text or described.get("text", "")
    license_name = described.get("license") or None
    return Raw(item["name"], data, text, encoding, mask, license_name, error, captions=captions)

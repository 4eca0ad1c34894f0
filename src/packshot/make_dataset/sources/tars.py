"""Tar shards, as WebDataset writes them: a sample's files lie together and share their name up to its first dot."""

from __future__ import annotations

import atexit
import bz2
import gzip
import json
import lzma
import tarfile
import zlib
from pathlib import PurePosixPath
from typing import Any

from packshot.config.schema import SourceConfig
from packshot.dataset.text_files import EncodingError, decode_text
from packshot.dataset.walk import hidden
from packshot.errors import ConfigError
from packshot.imaging.files import is_image
from packshot.make_dataset.sources.base import Item, Listing, Raw, caption_count, described_by, open_place
from packshot.make_dataset.sources.tables import refuse_masks

_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
# By the first bytes of a file: how its content is unpacked while it is read.
_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile}
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)


def claims(listing: Listing) -> list[str]:
    """Files with the name of a tar."""
    return [path for path in listing.paths if path.lower().endswith(_SUFFIXES)]


def list_items(listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
    """An item per sample of every shard. Raises ConfigError for a shard that cannot be read, or source.masks."""
    refuse_masks(source)
    items: list[Item] = []
    for path in listing.paths:
        if path not in paths:
            listing.unread.add("next to tar shards", listing.inside(path))
    for path in paths:
        items += tar_items(listing, path, source.caption_column)
    captioned = 0
    for item in items:
        captioned += any(item["spans"].get(kind, (0, 0))[1] > 0 for kind in ("txt", "caption", "json"))
    listing.notes.append(caption_count(captioned, len(items)))
    return items


def open_shard(place: str) -> Any:
    """The plain tar behind a file, seekable; compression is recognised by the first bytes."""
    file = open_place(place)
    start = file.read(6)
    file.seek(0)
    for mark, unpack in _COMPRESSIONS.items():
        if start.startswith(mark):
            return unpack(file) if unpack is not gzip.GzipFile else gzip.GzipFile(fileobj=file)
    return file


def tar_items(listing: Listing, path: str, caption_column: str | None) -> list[Item]:
    """One item per sample of a shard, in its order: where its image, mask, caption and metadata lie in the tar.

    ``<key>.jpg`` (or another image), ``<key>.mask.png``, ``<key>.txt`` or ``caption`` and ``license`` in
    ``<key>.json``; other files are counted and left alone.

    Raises:
        ConfigError: it is damaged, or a sample has several images.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    place = listing.place(path)
    try:
        with open_shard(place) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            note_members(samples, shard, path, 0)
    except _DAMAGED as error:
        raise ConfigError(
            f"source.path: {path} is not a whole tar file ({error}).",
            "Fetch it again, or pack it again as .tar, .tar.gz, .tar.bz2 or .tar.xz.",
        ) from error
    held = set().union(*samples.values())
    if "image" not in held:
        named = ", ".join(sorted(held)) or "nothing"
        raise ConfigError(f"source.path: {path} holds no image, only {named}.", "A sample is <key>.jpg with <key>.txt.")
    name = listing.named(path)
    shared = {"place": place, "caption_column": caption_column}
    for key, spans in samples.items():
        for kind in set(spans) - {"image", "mask", "txt", "caption", "json"}:
            listing.unread.add(f"{kind} in tar shards", f"{listing.inside(path)}#{key}.{kind}")
    return [{**shared, "name": f"{name}#{key}", "spans": spans} for key, spans in samples.items()]


def note_members(samples: dict[str, dict[str, tuple[int, int]]], shard: tarfile.TarFile, path: str, start: int) -> None:
    """Add the files of a tar, and those of tars inside it. start: where the tar begins in the file."""
    for member in shard:
        if not member.isfile():
            continue
        inner = shard.extractfile(member) if member.name.endswith(".tar") else None
        if inner is not None:
            with tarfile.open(fileobj=inner, mode="r:") as packed:
                note_members(samples, packed, path, start + member.offset_data)
        else:
            note_member(samples, member, path, start)


def note_member(samples: dict[str, dict[str, tuple[int, int]]], member: tarfile.TarInfo, path: str, start: int) -> None:
    """Add a file of the shard to its sample, with its place (offset, bytes)."""
    place = PurePosixPath(member.name)
    if hidden(member.name):
        return
    first, _, kind = place.name.partition(".")
    key = str(place.with_name(first))
    role = "mask" if kind.startswith("mask.") else "image" if is_image(f"x.{kind}") else kind
    spans = samples.setdefault(key, {})
    if role == "image" and role in spans:
        raise ConfigError(f"source.path: {path} has several images named {key}.", "Leave one, or name masks .mask.png.")
    spans[role] = (start + member.offset_data, member.size)


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
        _open_shard = item["place"], open_shard(item["place"])
    offset, size = item["spans"][role]
    _open_shard[1].seek(offset)
    return _open_shard[1].read(size)


def read_item(item: Item) -> Raw:
    """The files of one sample."""
    try:
        data = member_bytes(item, "image")
        mask = member_bytes(item, "mask")
        written = member_bytes(item, "txt") or member_bytes(item, "caption") or b""
        described = described_by(json.loads(member_bytes(item, "json") or b"{}"), item["caption_column"])
        text, encoding = decode_text(written)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        return Raw(item["name"], None, error=f"the shard is damaged ({error})")
    except EncodingError as error:
        return Raw(item["name"], None, error=f"its caption is {error}")
    except (ValueError, RecursionError) as error:
        return Raw(item["name"], None, error=f"its .json is damaged ({error})")
    error = "" if data is not None else f"the shard has no image named {item['name'].rpartition('#')[2]}"
    text = text or described.get("text", "")
    return Raw(item["name"], data, text, encoding, mask, described.get("license") or None, error)

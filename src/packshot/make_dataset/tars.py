"""Tar shards, as WebDataset writes them: a sample's files lie together and share their name up to its first dot."""

from __future__ import annotations

import json
import tarfile
from pathlib import PurePosixPath
from typing import Any

import fsspec

from packshot.errors import ConfigError
from packshot.imaging.files import is_image

_UNPACK = "Shards are read at many places at once: unpack it, or write it anew as an uncompressed .tar."


def tar_items(fs: Any, path: str, name: str) -> list[dict[str, Any]]:
    """One item per sample of a shard, in its order: where its image, mask, caption and metadata lie in the file.

    ``<key>.jpg`` (or another image), ``<key>.mask.png``, ``<key>.txt`` or ``caption`` and ``license`` in
    ``<key>.json``; other files are left alone. name: of the shard, in messages and tables.

    Raises:
        ConfigError: it is damaged, compressed or no tar file, or a sample has several images.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with fs.open(path) as file, tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                if member.isfile():
                    _note(samples, member, path)
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(f"source.path: {path} is no whole tar file ({error}).", _UNPACK) from error
    url = fs.unstrip_protocol(path)
    return [{"name": f"{name}#{key}", "url": url, "spans": spans} for key, spans in samples.items()]


def _note(samples: dict[str, dict[str, tuple[int, int]]], member: tarfile.TarInfo, path: str) -> None:
    """Add a file of the shard to its sample, with its place (offset, bytes)."""
    place = PurePosixPath(member.name)
    if place.name.startswith("."):
        return
    first, _, kind = place.name.partition(".")
    key = str(place.with_name(first))
    role = "mask" if kind.startswith("mask.") else "image" if is_image(f"x.{kind}") else kind
    spans = samples.setdefault(key, {})
    if role == "image" and role in spans:
        raise ConfigError(f"source.path: {path} has several images named {key}.", "Leave one, or name masks .mask.png.")
    spans[role] = (member.offset_data, member.size)


def read_member(item: dict[str, Any]) -> dict[str, Any]:
    """``data``, ``mask``, ``text``, ``license`` and ``error`` of a sample in a shard; ``data`` is None without image.

    Raises:
        OSError: the shard cannot be read.
    """
    spans = item["spans"]
    with fsspec.open(item["url"], "rb") as opened:
        file: Any = opened

        def read(role: str) -> bytes | None:
            if role not in spans:
                return None
            offset, size = spans[role]
            file.seek(offset)
            return file.read(size)

        data, mask, text, described = (read(role) for role in ("image", "mask", "txt", "json"))
    error = "" if data is not None else f"the shard has no image named {item['name'].rpartition('#')[2]}"
    known = {}
    try:
        known = json.loads(described or b"{}")
    except ValueError as broken:
        data, error = None, f"its .json is damaged ({broken})"
    known = known if isinstance(known, dict) else {}
    words = text.decode("utf-8", errors="replace") if text is not None else str(known.get("caption") or "")
    licence = known.get("license")
    return {
        "data": data,
        "mask": mask,
        "text": words.strip(),
        "license": str(licence) if licence else None,
        "error": error,
    }

"""One file of many entries of tensors, found by an index of 32 bytes an entry; nothing is read but what is asked for.

Layout: the entries' bytes one after the other, then the index (:data:`ROW`, sorted by key), then the layouts as JSON
(names, dtypes and shapes of an entry's tensors, of which a file has few), then :data:`FOOTER`. The index has a checksum
and so has every entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
SUFFIX = ".packed"
MAGIC = b"packshot"
VERSION = 1
# Where an entry is: a digest of its key, as two numbers; where its bytes begin; which layout they have; their CRC-32.
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("offset", "<u8"), ("layout", "<u4"), ("crc", "<u4")])
# Magic, version, number of entries, bytes of the entries, bytes of the layouts, CRC-32 of index and layouts.
FOOTER = struct.Struct("<8sIQQQI")


class DamagedError(Exception):
    """A file, or an entry in it, is not what was written."""


class OtherVersionError(Exception):
    """A file has the layout of another version."""


@dataclass(frozen=True)
class Part:
    """A tensor of an entry: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * self.dtype.itemsize


Layout = tuple[Part, ...]


def halves(key: str) -> tuple[int, int]:
    """The numbers by which the index knows a key."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's values as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_packed(path: Path, entries: Mapping[str, Tensors]) -> None:
    """Write a file. Equal entries in an equal order make equal bytes."""
    layouts: dict[Layout, int] = {}
    rows = np.zeros(len(entries), ROW)
    offset = 0
    with path.open("wb") as file:
        for number, (key, tensors) in enumerate(entries.items()):
            layout = tuple(Part(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
            content = b"".join(map(raw_bytes, tensors.values()))
            known = layouts.setdefault(layout, len(layouts))
            rows[number] = (*halves(key), offset, known, zlib.crc32(content))
            file.write(content)
            offset += len(content)
        rows.sort(order=("high", "low"))
        described = json.dumps(list(map(describe, layouts))).encode()
        tail = rows.tobytes() + described
        file.write(tail)
        file.write(FOOTER.pack(MAGIC, VERSION, len(rows), offset, len(described), zlib.crc32(tail)))


def describe(layout: Layout) -> list[list[object]]:
    """A layout as JSON has it."""
    return [[part.name, str(part.dtype).removeprefix("torch."), list(part.shape)] for part in layout]


def read_layout(described: list[tuple[str, str, list[int]]]) -> Layout:
    """A layout from JSON."""
    return tuple(Part(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in described)


@dataclass(frozen=True)
class Packed:
    """The index of a file.

    rows: of dtype :data:`ROW`, sorted by key. verified: the rows whose checksum was compared.
    """

    path: Path
    rows: np.ndarray
    layouts: list[Layout]
    verified: np.ndarray

    def read(self, descriptor: int, row: int) -> Tensors:
        """The tensors of an entry, from the opened file. The first time, its checksum is compared.

        Raises:
            DamagedError: its bytes are not those that were written.
        """
        layout = self.layouts[self.rows["layout"][row]]
        size = sum(part.nbytes for part in layout)
        content = bytearray(os.pread(descriptor, size, int(self.rows["offset"][row])))
        if len(content) != size or not (self.verified[row] or zlib.crc32(content) == self.rows["crc"][row]):
            raise DamagedError(f"checksum of the entry at byte {self.rows['offset'][row]}")
        self.verified[row] = True
        tensors: Tensors = {}
        start = 0
        for part in layout:
            tensors[part.name] = tensor_at(content, start, part)
            start += part.nbytes
        return tensors


def tensor_at(content: bytearray, start: int, part: Part) -> Tensor:
    """A tensor in some bytes, which it shares."""
    if not part.nbytes:
        return torch.empty(part.shape, dtype=part.dtype)
    flat = torch.frombuffer(content, dtype=torch.uint8, offset=start, count=part.nbytes)
    if start % part.dtype.itemsize:
        flat = flat.clone()
    return flat.view(part.dtype).reshape(part.shape)


def open_packed(path: Path) -> Packed:
    """Read the index of a file.

    Raises:
        DamagedError: the file is cut, longer than it was written, or its index is damaged.
        OtherVersionError: another version of Packshot has written it.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        if length < FOOTER.size:
            raise DamagedError("it is cut")
        file.seek(length - FOOTER.size)
        magic, version, count, data, described, crc = FOOTER.unpack(file.read(FOOTER.size))
        tail = count * ROW.itemsize + described
        if magic == MAGIC and version != VERSION:
            raise OtherVersionError(f"version {version}")
        if magic != MAGIC or length != data + tail + FOOTER.size:
            raise DamagedError("it is cut, or no such file")
        file.seek(data)
        content = file.read(tail)
    if zlib.crc32(content) != crc:
        raise DamagedError("checksum of the index")
    rows = np.frombuffer(content, ROW, count)
    layouts = list(map(read_layout, json.loads(content[count * ROW.itemsize :])))
    return Packed(path, rows, layouts, np.zeros(count, bool))

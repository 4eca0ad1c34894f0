"""Compressed files as plain, seekable ones: what a file is packed with is told by its first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, cast

import pyarrow as pa

from packshot.make_dataset.sources.base import open_place

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 2**20
_MARK_BYTES = 6


class Borrowed:
    """A file for pyarrow, which closes what it reads when it lets go of it; the file itself stays open."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read
        self.closed = False

    def close(self) -> None:
        self.closed = True


class ZstdFile(io.RawIOBase):
    """The content of a Zstandard file. Seeking back unpacks it from its start again, as for gzip.

    file: closed with this one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._start()

    def _start(self) -> None:
        self._file.seek(0)
        self._stream = pa.CompressedInputStream(pa.PythonFile(Borrowed(self._file), "r"), "zstd")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._stream.read(len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Raises io.UnsupportedOperation from the end: the length is not known before everything is unpacked."""
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("a Zstandard file is read from its start")
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if target < self._position:
            self._start()
        while self._position < target:
            skipped = len(self._stream.read(min(_CHUNK, target - self._position)))
            if not skipped:
                break
            self._position += skipped
        return self._position

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def unpack_gzip(file: IO[bytes]) -> IO[bytes]:
    """The content of a gzip file."""
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file))


def unpack_zstd(file: IO[bytes]) -> IO[bytes]:
    """The content of a Zstandard file."""
    return io.BufferedReader(ZstdFile(file), _CHUNK)


# pzstd begins a file with a frame that holds a length, under a mark of its own.
PACKINGS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": unpack_gzip,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": unpack_zstd,
    b"\x50\x2a\x4d\x18": unpack_zstd,
}


def open_unpacked(place: str) -> IO[bytes]:
    """A file, seekable, without the compression that its first bytes show."""
    file = open_place(place)
    start = file.read(_MARK_BYTES)
    file.seek(0)
    for mark, unpack in PACKINGS.items():
        if start.startswith(mark):
            return unpack(file)
    return file

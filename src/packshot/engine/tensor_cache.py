"""Encoded samples on disk: content-addressed entries in large files, shared by every run that needs the same tensors.

What is in memory is an index of some 60 bytes an entry; an entry is read, and verified, when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from packshot.engine.packed import (
    ROW,
    SUFFIX,
    DamagedError,
    OtherVersionError,
    Packed,
    Tensors,
    halves,
    open_packed,
    write_packed,
)
from packshot.engine.processes import broadcast_from_main
from packshot.errors import PackshotError
from packshot.lists import pick
from packshot.runs.cores import cores
from packshot.runs.files import remove_stale, replacing_file, writing
from packshot.runs.folder import log
from packshot.runs.progress import progress

Item = Any  # only the encoder looks into it
SHARD_BYTES = 128 * 2**20  # of tensors in a file: a kill costs one file at most
MOST_OPEN = 128  # files that are kept open to read from
# Threads that prepare items while the encoder works. Each process takes its share of the cores; ``mode=plan`` says how
# many a GPU needs.
MOST_DECODERS = 16


@dataclass(frozen=True)
class Job:
    """An entry to make: its key, its name in messages, and the item that the encoder takes."""

    key: str
    name: str
    item: Item


def content_key(*parts: object) -> str:
    """Name of a cache entry: a digest over everything the tensors depend on."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


class Index:
    """Where each key is: the file, by its number, and the row in it. Of several copies the first file's counts."""

    def __init__(self, packs: Sequence[Packed]) -> None:
        rows = np.concatenate([np.empty(0, ROW), *(pack.rows for pack in packs)])
        counts = [len(pack.rows) for pack in packs]
        files = np.repeat(np.arange(len(packs), dtype=np.uint32), counts)
        # the number of a row in its file
        numbers = np.concatenate([np.empty(0, np.uint32), *(np.arange(count, dtype=np.uint32) for count in counts)])
        order = np.lexsort((files, rows["low"], rows["high"]))
        self.high = rows["high"][order].astype(np.uint64)
        self.low = rows["low"][order].astype(np.uint64)
        self.files = files[order]
        self.numbers = numbers[order]

    def __len__(self) -> int:
        """How many keys there are."""
        if not len(self.high):
            return 0
        again = (self.high[1:] == self.high[:-1]) & (self.low[1:] == self.low[:-1])
        return len(self.high) - int(again.sum())

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """The place of each key in this index, int64; -1 where it is absent."""
        found = np.full(len(keys), -1, np.int64)
        if not len(self.high):
            return found
        pairs = np.array(list(map(halves, keys)), np.uint64).reshape(-1, 2)
        places = np.searchsorted(self.high, pairs[:, 0])
        first = np.minimum(places, len(self.high) - 1)
        alike = self.high[first] == pairs[:, 0]
        same = alike & (self.low[first] == pairs[:, 1])
        found[same] = first[same]
        for number in np.flatnonzero(alike & ~same):  # another key begins with the same eight bytes: next to never
            last = np.searchsorted(self.high, pairs[number, 0], side="right")
            matching = first[number] + np.flatnonzero(self.low[first[number] : last] == pairs[number, 1])
            found[number] = matching[0] if len(matching) else -1
        return found


class TensorCache:
    """Tensors by content key, in the files of one folder. Entries are never changed: a key names its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._packs: dict[Path, Packed] = {}
        self._others: set[Path] = set()  # files of another version
        self._listed: list[Packed] = []  # in the order of the index
        self._index = Index([])
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return bool(self._index.find([key])[0] >= 0)

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])
        self.open()  # a loader process opens the files itself

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def open(self) -> None:
        """Take in the files that have appeared since the last call, and forget those that are gone. A damaged file is
        set aside and an unreadable one is skipped, each with a warning.

        If two runs wrote the same entry, the older copy wins, in every process and at every call.
        """
        ordered = self.oldest_first()
        known = self._packs
        others = len(self._others)
        self._packs = {}
        for path in ordered:
            pack = known.get(path) or self._opened(path)
            if pack:
                self._packs[path] = pack
        self._listed = list(self._packs.values())
        self._index = Index(self._listed)
        if len(self._others) > others:
            log.warning(
                "%s holds files of another version of Packshot: %d. They are not read, their samples are encoded again",
                self.folder,
                len(self._others),
            )

    def _opened(self, path: Path) -> Packed | None:
        try:
            return open_packed(path)
        except DamagedError as error:
            self._set_aside(path, str(error))
        except OtherVersionError:
            self._others.add(path)
        except FileNotFoundError:  # another process has just set it aside
            pass
        except OSError as error:  # another user's file, or the storage is away for a moment: it must not be removed
            log.warning("cache file %s cannot be read (%s): its samples are encoded again", path, error)
        return None

    def oldest_first(self) -> list[Path]:
        """The files of the folder by the time they were written."""
        written: dict[Path, int] = {}
        for path in self.folder.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another process has just set it aside
                written[path] = path.stat().st_mtime_ns
        return sorted(written, key=lambda path: (written[path], path))

    def _set_aside(self, path: Path, reason: str) -> None:
        """Rename a damaged file, so that it is no longer read; its entries are missing from now on."""
        log.warning("cache file %s is damaged (%s): it is set aside, its samples are encoded again", path, reason)
        with suppress(FileNotFoundError):  # another process was faster
            path.rename(path.with_name(f"{path.name}.damaged"))

    def get(self, key: str) -> Tensors:
        """The tensors of an entry.

        Raises:
            PackshotError: there is none, or it is damaged; then its file is set aside.
        """
        (place,) = self._index.find([key])
        if place < 0:
            raise PackshotError(f"{self.folder} has no entry {key}.", "Start again: missing entries are encoded first.")
        pack = self._listed[self._index.files[place]]
        try:
            with self._lock:  # closing a file must not meet a reader
                return pack.read(self._descriptor(pack.path), int(self._index.numbers[place]))
        except (DamagedError, FileNotFoundError) as error:
            self._set_aside(pack.path, str(error))
            raise PackshotError(
                f"cache file {pack.path} is damaged ({error}) and was set aside.",
                "Start again, with run.resume=true to continue: its samples are encoded first.",
            ) from error

    def _descriptor(self, path: Path) -> int:
        """The opened file; those that were used last stay open."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        self._descriptors.move_to_end(path)
        if len(self._descriptors) > MOST_OPEN:
            _, oldest = self._descriptors.popitem(last=False)
            os.close(oldest)
        return self._descriptors[path]

    def put(self, entries: dict[str, Tensors]) -> None:
        """Write a file of entries, whose values must all be finite. Raises PackshotError if it cannot be written."""
        path = self.folder / f"{content_key(*sorted(entries))[:24]}{SUFFIX}"
        with self.writing(), replacing_file(path) as file:
            write_packed(file, entries)

    def writing(self) -> AbstractContextManager[None]:
        """What fails to be written in this block ends with a PackshotError that names the key of the folder."""
        return writing(f"{self.folder}", "Finished files are kept; data.cache_dir names another folder.")

    def prepare(self, is_main: bool) -> None:
        """Make the folder, take in its files and, in the main process, remove what killed runs left half-written.

        Raises:
            PackshotError: the folder is not there and cannot be made.
        """
        if not self.folder.is_dir():  # one that may only be read will do if it holds everything
            with self.writing():
                self.folder.mkdir(parents=True, exist_ok=True)
        stale = remove_stale(self.folder) if is_main else 0
        if stale:
            log.info("%s: removed %.1f MiB that killed runs had left half-written", self.folder, stale / 2**20)
        self.open()

    def missing(self, chunks: Sequence[Sequence[Job]], key_of: Callable[[Job], str] = attrgetter("key")) -> list[bool]:
        """For each chunk, whether an entry of it is absent. key_of: the key of a job in this cache."""
        absent = self._index.find(list(map(key_of, chain.from_iterable(chunks)))) < 0
        starts = np.cumsum([0, *map(len, chunks)])
        return [bool(absent[first:last].any()) for first, last in pairwise(starts)]

    def size_of(self, keys: Sequence[str]) -> int:
        """Bytes of the files that hold any of these entries."""
        places = self._index.find(keys)
        numbers = np.unique(self._index.files[places[places >= 0]])
        return sum(self._listed[number].path.stat().st_size for number in numbers)

    def fill(
        self,
        description: str,
        chunks: Sequence[Sequence[Job]],
        encode: Callable[[list[Item]], list[Tensors]],
        accelerator: Accelerator,
        prepare: Callable[[Item], Item] | None = None,
    ) -> None:
        """:func:`fill` for this cache alone."""
        fill(description, [Filling(self, description, encode)], chunks, accelerator, prepare)


@dataclass
class Filling:
    """A cache that is being filled.

    encode: makes the tensors of the items of a chunk. name: of what it makes, for the log. key_of: the key of a job in
    this cache, where it depends on more than the job's own key.
    """

    cache: TensorCache
    name: str
    encode: Callable[[list[Item]], list[Tensors]]
    key_of: Callable[[Job], str] = attrgetter("key")
    entries: dict[str, Tensors] = field(default_factory=dict)
    size: int = 0

    def add(self, chunk: Sequence[Job], items: list[Item]) -> None:
        """Encode the items of a chunk, unless all their entries are there. Existing entries stay."""
        keys = list(map(self.key_of, chunk))
        if all(key in self.cache for key in keys):
            return
        for job, key, tensors in zip(chunk, keys, self.encode(items), strict=True):
            if key not in self.cache:
                refuse_non_finite(tensors, f"{self.name}, {job.name}")
                self.entries[key] = tensors
                self.size += sum(map(attrgetter("nbytes"), tensors.values()))

    def write(self, at_least: int = 1) -> None:
        """Write a file, if there is enough for one."""
        if self.entries and self.size >= at_least:
            self.cache.put(self.entries)
            self.entries = {}
            self.size = 0


def fill(
    description: str,
    fillings: Sequence[Filling],
    chunks: Sequence[Sequence[Job]],
    accelerator: Accelerator,
    prepare: Callable[[Item], Item] | None = None,
) -> None:
    """Encode the entries that are missing from some caches, in one pass over the items. Every process takes its share
    and waits for the others.

    chunks: the jobs that go through an encoder together. A chunk with a missing entry is encoded whole, so that no bit
        of an entry depends on earlier contents or on the number of processes.
    prepare: is done to each item before, in threads that work ahead of the encoders: reading and decoding pictures.

    Raises:
        PackshotError: a value is not finite, or the folders or the tensors cannot be written.
    """
    for filling in fillings:
        filling.cache.prepare(accelerator.is_main_process)

    def missing_chunks() -> list[int]:
        missing = [filling.cache.missing(chunks, filling.key_of) for filling in fillings]
        return [number for number, of_caches in enumerate(zip(*missing, strict=True)) if any(of_caches)]

    # The main process decides, because other runs write here too and each process may see other files.
    todo = broadcast_from_main(accelerator, missing_chunks)
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    encode_chunks(description, fillings, pick(chunks, mine), accelerator, prepare)
    accelerator.wait_for_everyone()
    encoded = sum(map(len, pick(chunks, todo)))
    for filling in fillings:
        keys = list(map(filling.key_of, chain.from_iterable(chunks)))
        finish_filling(filling, keys, encoded, accelerator.is_main_process)


def finish_filling(filling: Filling, keys: list[str], encoded: int, shown: bool) -> None:
    """Make sure that all entries are here. encoded: how many were to be made; shown: log the size of the cache.

    Raises:
        PackshotError: entries that the processes have written are not here.
    """
    cache = filling.cache
    cache.open()
    distinct = sorted(set(keys))
    absent = int((cache._index.find(distinct) < 0).sum())
    if absent:
        raise PackshotError(
            f"{cache.folder} lacks {absent} of {len(distinct)} entries that the processes have just written.",
            "data.cache_dir must be a folder that all of them see and may read.",
        )
    if shown:
        cached = 100 * (1 - encoded / max(1, len(keys)))
        size = cache.size_of(distinct) / 2**20
        log.info("%s: %d entries, %.1f MiB, %.0f %% were cached", filling.name, len(distinct), size, cached)


def encode_chunks(
    description: str,
    fillings: Sequence[Filling],
    chunks: Sequence[Sequence[Job]],
    accelerator: Accelerator,
    prepare: Callable[[Item], Item] | None,
) -> None:
    """Encode chunks and write their new entries, a file whenever there is enough for one; log the speed."""
    started = time.monotonic()
    total = sum(map(len, chunks))
    ready = prepared_ahead(chunks, prepare)
    with progress(description, total, show=bool(chunks) and accelerator.is_main_process) as advance, closing(ready):
        for chunk, items in ready:
            for filling in fillings:
                filling.add(chunk, items)
                filling.write(at_least=SHARD_BYTES)
            advance(len(chunk))
    for filling in fillings:
        filling.write()
    if total:
        log.info("%s: %.3g per second and process", description, total / (time.monotonic() - started))


def prepared_ahead(
    chunks: Sequence[Sequence[Job]], prepare: Callable[[Item], Item] | None
) -> Generator[tuple[Sequence[Job], list[Item]]]:
    """Each chunk with its items, prepared by a pool of threads while the caller works on earlier chunks.

    Only so many are ahead as keep the threads busy, because prepared items are whole pictures.
    """
    if prepare is None:
        for chunk in chunks:
            yield chunk, list(map(attrgetter("item"), chunk))
        return
    workers = min(MOST_DECODERS, cores())
    waiting: deque[tuple[Sequence[Job], list[Future[Item]]]] = deque()
    ahead = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decoder")
    try:
        for chunk in chunks:
            waiting.append((chunk, [pool.submit(prepare, job.item) for job in chunk]))
            ahead += len(chunk)
            while ahead > 2 * workers + len(waiting[0][0]):
                first, futures = waiting.popleft()
                ahead -= len(first)
                yield first, list(map(Future.result, futures))
        for rest, futures in waiting:
            yield rest, list(map(Future.result, futures))
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_non_finite(tensors: Tensors, name: str) -> None:
    """Raises PackshotError when a value is NaN or infinite. name: of the sample, for the message."""
    for part, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PackshotError(
                f"{name}: {part} has values that are not finite.",
                "An fp16 VAE can cause that; use its fp32 weights or sdxl-vae-fp16-fix.",
            )

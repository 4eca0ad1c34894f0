"""Encoded samples on disk: content-addressed shards, memory-mapped, shared by every run that needs the same tensors."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packshot.engine.processes import broadcast_from_main
from packshot.errors import PackshotError
from packshot.lists import pick, select
from packshot.runs.files import replacing_file, writing
from packshot.runs.folder import log
from packshot.runs.progress import progress

Tensors = dict[str, Tensor]
Item = Any  # only the encoder looks into it
# Tensors per file. A kill costs one file at most; every file is mapped, and a process may have 65,530 maps.
SHARD_BYTES = 128 * 2**20
MOST_DECODERS = 8  # threads that prepare items while the encoder works; more than a GPU's VAE can keep up with


@dataclass(frozen=True)
class Job:
    """An entry to make: its key, its name in messages, and the item that the encoder takes."""

    key: str
    name: str
    item: Item


def keys_of(chunk: Iterable[Job]) -> set[str]:
    """The keys of some jobs."""
    return set(map(attrgetter("key"), chunk))


def content_key(*parts: object) -> str:
    """Name of a cache entry: a digest over everything the tensors depend on."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


class TensorCache:
    """Tensors by content key, in the files of one folder. Entries are never changed: a key names its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, safe_open] = {}  # open and mapped
        self._places: dict[str, Path] = {}  # the file of each key
        self._names: dict[str, list[str]] = {}  # the tensors of each key

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"])
        self.open()  # a loader process maps the files itself

    def open(self) -> None:
        """Add the files that have appeared since the last call. A damaged file is removed and an unreadable one is
        skipped, each with a warning.

        If two runs wrote the same entry, the older copy wins, in every process and at every call.
        """
        for path in self.oldest_first():
            if path not in self._files:
                self._add(path)

    def _add(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            names = list(file.keys())
        except SafetensorError as error:
            self._drop(path, str(error))
            return
        except OSError as error:  # another user's file, or the storage is away for a moment: it must not be removed
            log.warning("cache file %s cannot be read (%s): its samples are encoded again", path, error)
            return
        self._files[path] = file
        for name in names:
            key, _, short = name.partition("/")
            if self._places.setdefault(key, path) != path:
                continue
            known = self._names.setdefault(key, [])
            if short not in known:
                known.append(short)

    def oldest_first(self) -> list[Path]:
        """The files of the folder by the time they were written."""
        written: dict[Path, int] = {}
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process has just removed it
                written[path] = path.stat().st_mtime_ns
        return sorted(written, key=lambda path: (written[path], path))

    def _drop(self, path: Path, reason: str) -> None:
        log.warning("cache file %s is damaged (%s): removed, its samples are encoded again", path, reason)
        self._forget(path)
        with suppress(FileNotFoundError):  # another process was faster
            path.unlink()

    def _forget(self, path: Path) -> None:
        self._files.pop(path, None)
        for key, place in list(self._places.items()):
            if place == path:
                del self._places[key]
                del self._names[key]

    def get(self, key: str) -> Tensors:
        """The tensors of an entry.

        Raises:
            PackshotError: there is none.
        """
        if key not in self._places:
            raise PackshotError(f"{self.folder} has no entry {key}.", "Start again: missing entries are encoded first.")
        file = self._files[self._places[key]]
        return {name: file.get_tensor(f"{key}/{name}") for name in self._names[key]}

    def put(self, entries: dict[str, Tensors]) -> None:
        """Write a file of entries, whose values must all be finite. Raises PackshotError if it cannot be written."""
        flat: Tensors = {}
        sums: dict[str, int] = {}
        for key, tensors in entries.items():
            for name, tensor in tensors.items():
                flat[f"{key}/{name}"] = tensor.contiguous()
                sums[f"{key}/{name}"] = checksum(tensor)
        path = self.folder / f"{content_key(*sorted(entries))[:24]}.safetensors"
        hint = "Finished files are kept; data.cache_dir names another folder."
        with writing(f"{self.folder}", hint), replacing_file(path) as file:
            save_file(flat, file, metadata={"crc32": json.dumps(sums)})

    def verify(self, path: Path) -> None:
        """Compare every tensor of a file with its stored checksum; a damaged file is removed with a warning."""
        try:
            with safe_open(path, framework="pt") as file:  # its own mapping, whose memory is freed at the end
                sums = json.loads(file.metadata()["crc32"])
                wrong = [name for name, expected in sums.items() if checksum(file.get_tensor(name)) != expected]
        except OSError as error:
            self._forget(path)
            log.warning("cache file %s cannot be read (%s): its samples are encoded again", path, error)
            return
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            wrong = [str(error)]
        if wrong:
            self._drop(path, f"checksum of {wrong[0]}")

    def fill(
        self,
        description: str,
        chunks: Sequence[Sequence[Job]],
        encode: Callable[[list[Item]], list[Tensors]],
        accelerator: Accelerator,
        prepare: Callable[[Item], Item] | None = None,
    ) -> None:
        """Verify existing entries and encode missing ones. Every process takes its share and waits for the others.

        chunks: the jobs that go through the encoder together. A chunk with a missing entry is encoded whole, so that no
            bit of an entry depends on earlier contents or on the number of processes. Existing entries stay.
        encode: makes the tensors of the items of a chunk.
        prepare: is done to each item before, in threads that work ahead of the encoder: reading and decoding pictures.

        Raises:
            PackshotError: a value is not finite, or the tensors cannot be written.
        """
        wanted = set().union(*map(keys_of, chunks))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.open()
        self._verify_share(wanted, accelerator)

        def missing_chunks() -> list[int]:
            return [number for number, chunk in enumerate(chunks) if not keys_of(chunk) <= self._places.keys()]

        # The main process decides, because other runs write here too and each process may see other files.
        todo = broadcast_from_main(accelerator, missing_chunks)
        mine = todo[accelerator.process_index :: accelerator.num_processes]
        self._encode(description, pick(chunks, mine), encode, accelerator, prepare)
        accelerator.wait_for_everyone()
        self.open()
        self._refuse_absent(wanted)
        if accelerator.is_main_process:
            size = sum(path.stat().st_size for path in self.files_of(wanted)) / 2**20
            encoded = sum(map(len, pick(chunks, todo)))
            cached = 100 * (1 - encoded / max(1, sum(map(len, chunks))))
            log.info("%s: %d entries, %.1f MiB, %.0f %% were cached", description, len(wanted), size, cached)

    def _refuse_absent(self, wanted: set[str]) -> None:
        """Raises PackshotError when entries that the processes have written are not here."""
        absent = len(wanted - self._places.keys())
        if absent:
            raise PackshotError(
                f"{self.folder} lacks {absent} of {len(wanted)} entries that the processes have just written.",
                "data.cache_dir must be a folder that all of them see and may read.",
            )

    def files_of(self, keys: Iterable[str]) -> list[Path]:
        """The files that hold any of these entries, sorted."""
        return sorted(set(select(self._places, self._places.keys() & keys).values()))

    def _verify_share(self, keys: set[str], accelerator: Accelerator) -> None:
        """Verify this process's share of the files, and forget those that another process removes."""
        for path in self.files_of(keys):
            # By name, not by place in a list: other runs write here too, so each process may see other files.
            if int(path.stem[:8], 16) % accelerator.num_processes == accelerator.process_index:
                self.verify(path)
        accelerator.wait_for_everyone()
        for path in list(self._files):
            if not path.exists():
                self._drop(path, "removed by another process")

    def _encode(
        self,
        description: str,
        chunks: Sequence[Sequence[Job]],
        encode: Callable[[list[Item]], list[Tensors]],
        accelerator: Accelerator,
        prepare: Callable[[Item], Item] | None,
    ) -> None:
        """Encode chunks and write their new entries, a file whenever there is enough for one; log the speed."""
        started = time.monotonic()
        entries: dict[str, Tensors] = {}
        size = 0
        total = sum(map(len, chunks))
        shown = bool(chunks) and accelerator.is_main_process
        ready = prepared_ahead(chunks, prepare)
        with progress(description, total, show=shown) as advance, closing(ready):
            for number, (chunk, items) in enumerate(ready, 1):
                results = encode(items)
                for job, tensors in zip(chunk, results, strict=True):
                    if job.key not in self:
                        refuse_non_finite(tensors, f"{description}, {job.name}")
                        entries[job.key] = tensors
                        size += sum(map(attrgetter("nbytes"), tensors.values()))
                # there may be none: another run may have written them since the main process looked
                if entries and (size >= SHARD_BYTES or number == len(chunks)):
                    self.put(entries)
                    entries = {}
                    size = 0
                advance(len(chunk))
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
    workers = min(MOST_DECODERS, os.cpu_count() or 1)
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

"""Encoded samples on disk: content-addressed shards, memory-mapped, shared by every run that needs the same tensors."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from packshot.engine.processes import from_main
from packshot.errors import PackshotError
from packshot.runs.files import replacing_file
from packshot.runs.folder import log
from packshot.runs.progress import progress

Tensors = dict[str, Tensor]
SHARD_BYTES = 128 * 2**20  # of tensors per file: what a kill can cost. Files are mapped, and a process has 65,530 maps


@dataclass(frozen=True)
class Job:
    """An entry to make: its key, its name in messages, and what the encoder takes."""

    key: str
    name: str
    item: Any


def content_key(*parts: object) -> str:
    """Name of a cache entry: a digest over everything the tensors depend on."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)


class TensorCache:
    """Tensors by content key, in the files of one folder. Entries are never changed: a key names its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        self._names: dict[str, list[str]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # a loader's process opens the files anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])
        self.open()

    def open(self) -> None:
        """Take up the files that have come since; a damaged one is removed, one that may not be read passed over, each
        with a message.

        Of an entry that two runs have written at a time, the older copy counts, whoever looks and however often.
        """
        for path in self._oldest_first():
            if path in self._files:
                continue
            try:
                file = safe_open(path, framework="pt")
                names = list(file.keys())
            except SafetensorError as error:
                self._drop(path, str(error))
                continue
            except OSError as error:  # another user's, or the storage is away for a moment: not ours to remove
                log.warning("cache file %s cannot be read (%s): its samples are encoded again", path, error)
                continue
            self._files[path] = file
            for name in names:
                key, _, short = name.partition("/")
                if self._where.setdefault(key, path) != path:
                    continue
                known = self._names.setdefault(key, [])
                if short not in known:
                    known.append(short)

    def _oldest_first(self) -> list[Path]:
        written: dict[Path, int] = {}
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # removed by another process since
                written[path] = path.stat().st_mtime_ns
        return sorted(written, key=lambda path: (written[path], path))

    def _drop(self, path: Path, reason: str) -> None:
        log.warning("cache file %s is damaged (%s): removed, its samples are encoded again", path, reason)
        self._forget(path)
        with suppress(FileNotFoundError):  # another process was faster
            path.unlink()

    def _forget(self, path: Path) -> None:
        self._files.pop(path, None)
        for key in [key for key, where in self._where.items() if where == path]:
            del self._where[key], self._names[key]

    def get(self, key: str) -> Tensors:
        """The tensors of an entry.

        Raises:
            PackshotError: there is none.
        """
        if key not in self._where:
            raise PackshotError(f"{self.folder} has no entry {key}.", "Start again: what is missing is encoded first.")
        file = self._files[self._where[key]]
        return {name: file.get_tensor(f"{key}/{name}") for name in self._names[key]}

    def _put(self, entries: dict[str, Tensors]) -> None:
        """Write a shard; all values must be finite."""
        flat = {
            f"{key}/{name}": tensor.contiguous() for key, tensors in entries.items() for name, tensor in tensors.items()
        }
        sums = json.dumps({name: _checksum(tensor) for name, tensor in flat.items()})
        path = self.folder / f"{content_key(*sorted(entries))[:24]}.safetensors"
        with replacing_file(path) as file:
            save_file(flat, file, metadata={"crc32": sums})

    def _verify(self, path: Path) -> None:
        """Compare every tensor of a file with the checksum it was written with."""
        try:
            with safe_open(path, framework="pt") as file:  # a mapping of its own, which leaves memory with it
                sums = json.loads(file.metadata()["crc32"])
                wrong = [name for name, expected in sums.items() if _checksum(file.get_tensor(name)) != expected]
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
        encode: Callable[[list[Any]], list[Tensors]],
        accelerator: Accelerator,
    ) -> None:
        """Verify what is there and compute what is missing. Every process takes its share; returns when all are done.

        chunks: what goes through the encoder together. A chunk of which anything is missing is encoded whole, so that
            no bit of an entry depends on what was cached before or on the number of processes; what was there stays.
        encode: the items of a chunk to their tensors.

        Raises:
            PackshotError: a value is not finite, or the tensors cannot be written.
        """
        wanted = {job.key for chunk in chunks for job in chunk}
        rank, world = accelerator.process_index, accelerator.num_processes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.open()
        # By name, not by place in a list: other runs write here too, so processes may see different files.
        for path in sorted({self._where[key] for key in wanted if key in self._where}):
            if int(path.stem[:8], 16) % world == rank:
                self._verify(path)
        accelerator.wait_for_everyone()
        self._forget_removed()

        def incomplete(chunk: Sequence[Job]) -> bool:
            return any(job.key not in self for job in chunk)

        # One process says what is missing: others may see other files, as other runs write here too.
        todo = from_main(accelerator, lambda: [number for number, chunk in enumerate(chunks) if incomplete(chunk)])
        missing = sum(len(chunks[number]) for number in todo)
        self._encode(description, [chunks[number] for number in todo[rank::world]], encode, accelerator)
        accelerator.wait_for_everyone()
        self.open()
        absent = sum(key not in self for key in wanted)
        if absent:
            raise PackshotError(
                f"{self.folder} lacks {absent} of {len(wanted)} entries that the processes have just written.",
                "data.cache_dir has to be a folder that all of them see, and may read.",
            )
        if accelerator.is_main_process:
            size = sum(path.stat().st_size for path in {self._where[key] for key in wanted}) / 2**20
            hits = 100 * (1 - missing / max(1, sum(map(len, chunks))))
            log.info("%s: %d entries, %.1f MiB, %.0f %% were cached", description, len(wanted), size, hits)

    def _forget_removed(self) -> None:
        for path in [path for path in self._files if not path.exists()]:
            self._drop(path, "removed by another process")

    def _encode(
        self,
        description: str,
        chunks: Sequence[Sequence[Job]],
        encode: Callable[[list[Any]], list[Tensors]],
        accelerator: Accelerator,
    ) -> None:
        entries: dict[str, Tensors] = {}
        size = 0
        total = sum(map(len, chunks))
        with progress(description, total, show=bool(chunks) and accelerator.is_main_process) as advance:
            for number, chunk in enumerate(chunks, 1):
                for job, tensors in zip(chunk, encode([job.item for job in chunk]), strict=True):
                    if job.key not in self:
                        entries[job.key] = _finite(tensors, f"{description}, {job.name}")
                        size += sum(tensor.nbytes for tensor in tensors.values())
                # another run may have written all of them since the main process looked
                if entries and (size >= SHARD_BYTES or number == len(chunks)):
                    try:
                        self._put(entries)
                    except (OSError, SafetensorError) as error:
                        raise PackshotError(
                            f"{self.folder} cannot be written: {error}.",
                            "Free some space, or name another folder by data.cache_dir. What is written is kept.",
                        ) from error
                    entries, size = {}, 0
                advance(len(chunk))


def _finite(tensors: Tensors, name: str) -> Tensors:
    for part, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PackshotError(
                f"{name}: {part} has values that are not finite.", "An fp16 VAE does that; use fp32 or fp16-fix."
            )
    return tensors

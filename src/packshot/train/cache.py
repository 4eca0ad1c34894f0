"""Encoded samples on disk: content-addressed, written atomically, shared by every run that needs the same tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from packshot.core.errors import PackshotError
from packshot.core.progress import progress
from packshot.core.run import log
from packshot.core.storage import replacing_file

Tensors = dict[str, Tensor]


def content_key(*parts: object) -> str:
    """Name of a cache entry: a digest over everything the tensors depend on."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()


class TensorCache:
    """Tensors by content key, one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensors:
        """Raises PackshotError when the entry is absent or damaged."""
        try:
            return load_file(self._path(key))
        except (OSError, SafetensorError) as error:
            raise PackshotError(
                f"cache entry {self._path(key)} is unreadable ({error}).", "Delete it and rerun."
            ) from error

    def __contains__(self, key: str) -> bool:
        return self._path(key).exists()

    def put(self, key: str, tensors: Tensors) -> None:
        """Store tensors; all must be finite."""
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise PackshotError(
                    f"{name} has values that are not finite.", "An fp16 VAE does that; use fp32 or fp16-fix."
                )
        with replacing_file(self._path(key)) as file:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    def fill(
        self,
        description: str,
        jobs: Iterable[tuple[str, str, Callable[[], Tensors]]],
        accelerator: Accelerator,
    ) -> None:
        """Compute what is missing. Every process takes its share; returns when all are done.

        jobs: (key, name for messages, function that computes the tensors).
        """
        wanted = {key: (name, compute) for key, name, compute in jobs}
        missing = [key for key in wanted if key not in self]
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        accelerator.wait_for_everyone()
        if missing and accelerator.is_main_process:
            log.info("%s: %d of %d already cached", description, len(wanted) - len(missing), len(wanted))
        with progress(description, len(mine), show=bool(mine) and accelerator.is_main_process) as advance:
            for key in mine:
                name, compute = wanted[key]
                try:
                    self.put(key, compute())
                except PackshotError as error:
                    raise PackshotError(f"{description}, {name}: {error.args[0]}", error.hint) from error
                advance()
        accelerator.wait_for_everyone()

"""How every process starts, before it imports the libraries that do the work, and how it ends."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sys
from dataclasses import dataclass
from typing import NoReturn

# glibc's mallopt: https://man7.org/linux/man-pages/man3/mallopt.3.html
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 32 * 2**20  # bytes of a block; the largest that mallopt takes
_KEPT = 2**30  # bytes


@dataclass
class Ending:
    """code: the exit code of a process that is about to end; None while it works, or after a traceback."""

    code: int | None = None


ENDING = Ending()


def start_process() -> None:
    """Each process calls it first."""
    atexit.register(leave_group)  # exit handlers run in reverse order: those of all libraries come before this one
    quiet_libraries()
    keep_freed_memory()


def end_process(code: int) -> NoReturn:
    """Each script ends with it. See :func:`leave_group`."""
    ENDING.code = code
    raise SystemExit(code)


def leave_group() -> None:
    """A process that a launcher started leaves here, before Python takes itself apart.

    gloo's threads may still hold a tensor of the last collective. They need Python's lock to let go of it. A thread
    that asks for the lock after Python's end aborts the process, and the launcher then kills the others, the main
    process with its unfinished export among them. DistributedDataParallel keeps the group, so that
    ``destroy_process_group`` does not end these threads.
    """
    distributed = sys.modules.get("torch.distributed")
    if ENDING.code is None or distributed is None or not distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ENDING.code)


def quiet_libraries() -> None:
    """Silence messages of libraries on import about parts that are not used here (torchvision, GPU kernels)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' bar for weights
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def keep_freed_memory() -> None:
    """Let the process keep up to 1 GiB of freed memory for its next tensors.

    By default glibc returns a freed block of some MiB to the system, and the next tensor of that size is mapped anew,
    page by page. On a CPU that was a fifth of the VAE's time. ``engine.memory.return_freed_memory`` returns what was
    kept. The environment's ``MALLOC_`` variables go first; other C libraries have no ``mallopt``.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        return
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)

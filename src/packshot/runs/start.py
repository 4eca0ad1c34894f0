"""What every process sets before it imports the libraries that do the work."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

# glibc's mallopt: https://man7.org/linux/man-pages/man3/mallopt.3.html
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 32 * 2**20  # bytes of a block; the largest that mallopt takes
_KEPT = 2**30  # bytes


def start_process() -> None:
    """Each process calls it first."""
    quiet_libraries()
    keep_freed_memory()


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

"""GPUs that a plan can be made for: memory and speed, one row each."""

from __future__ import annotations

import re
from dataclasses import dataclass

from packshot.lists import by_name

TIGHT = 0.9  # share of the memory above which fragmentation and workspaces may no longer fit
USABLE = 0.95


@dataclass(frozen=True)
class Gpu:
    """A model of GPU.

    memory_gib: what its driver leaves to one process. tflops: products of dense bf16 matrices with fp32 sums, TFLOP/s,
    by the maker's data sheet; no training reaches it. pattern: regular expression that is searched in the name that
    CUDA reports. bandwidth: of its memory, TB/s, by the same sheet; 0 where it is not known.
    """

    name: str
    title: str
    memory_gib: float
    tflops: float
    pattern: str
    bandwidth: float = 0.0


GPUS: dict[str, Gpu] = by_name(
    (
        Gpu("rtx3090", "GeForce RTX 3090", 23.5, 71, r"RTX 3090", 0.94),
        Gpu("rtx4090", "GeForce RTX 4090", 23.5, 165, r"RTX 4090", 1.01),
        Gpu("rtx5090", "GeForce RTX 5090", 31.3, 209, r"RTX 5090", 1.79),
        Gpu("l4", "L4", 22.0, 121, r"\bL4\b", 0.3),
        Gpu("a10", "A10", 22.0, 125, r"\bA10G?\b", 0.6),
        Gpu("l40s", "L40S", 44.4, 362, r"\bL40S\b", 0.86),
        Gpu("a100_40", "A100 40 GB", 39.3, 312, r"A100.*40GB", 1.56),
        Gpu("a100", "A100 80 GB", 79.1, 312, r"A100", 2.04),
        Gpu("h100", "H100 SXM", 79.1, 989, r"H100", 3.35),
        Gpu("h200", "H200", 139.7, 989, r"H200", 4.8),
        Gpu("b200", "B200", 178.0, 2250, r"B200", 8.0),
    )
)


def find_gpu(reported: str) -> Gpu | None:
    """The row of the GPU that CUDA reports under this name; None if there is none."""
    for gpu in GPUS.values():
        if re.search(gpu.pattern, reported):
            return gpu
    return None


def hours_text(hours: tuple[float, float]) -> str:
    """A span of hours in words."""
    return f"{hours[0]:.2f} to {hours[1]:.2f} hours" if hours[1] >= 0.01 else "less than a minute"


def verdict_of(needed_gib: float, gpu: Gpu) -> str:
    """Whether so much memory "fits" a GPU, is "tight" on it, or "does not fit"."""
    if needed_gib > USABLE * gpu.memory_gib:
        return "does not fit"
    return "fits" if needed_gib <= TIGHT * gpu.memory_gib else "tight"


def verdict_text(verdict: str, gpu: str, memory_gib: float) -> str:
    """What :func:`verdict_of` says, in words: "It is tight on l4 (22.5 GiB)"."""
    words = {"tight": "is tight"}.get(verdict, verdict)
    return f"It {words} on {gpu} ({memory_gib:.1f} GiB)"


def span(tflop: float, peak: float, fast: float, slow: float) -> tuple[float, float]:
    """Seconds for so many TFLOP at the higher and at the lower utilisation; zeros where the peak is not known."""
    return (tflop / peak / fast, tflop / peak / slow) if peak else (0.0, 0.0)

"""How many processor cores this process has."""

from __future__ import annotations

import os


def cores() -> int:
    """The cores that this process may use, at least 1: its share where a launcher started several on one machine.

    Containers and Slurm allow a process fewer than the machine has.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

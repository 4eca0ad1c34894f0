"""The device of this process, before the processes of a run know each other."""

from __future__ import annotations

import os


def own_device() -> str:
    """The GPU that the launcher gave to this process, or the CPU.

    Models are loaded before the processes of a run know each other, so the current device is not set yet: a bare "cuda"
    would put all of them on the first GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"

"""What libraries say on their own."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Silence messages of libraries on import about parts that are not used here (torchvision, GPU kernels).

    Each process calls it before it imports them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also transformers' bar for weights
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

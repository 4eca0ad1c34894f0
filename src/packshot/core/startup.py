"""Quick starts: imports without what a run has no use for."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def without(packages: Sequence[str]) -> Iterator[None]:
    """Code in this block takes these optional packages for not installed; those already imported stay as they are.

    Libraries import such packages on suspicion. What they find out here they mostly remember for good.
    """
    hidden = [name for name in packages if name not in sys.modules]
    # None in sys.modules is Python's own way to say that there is no such module
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def collecting_nothing() -> Iterator[None]:
    """For imports: the garbage collector neither runs in this block nor ever looks at what exists at its end.

    It would walk through half a million objects of modules again and again, none of which goes before the process.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()

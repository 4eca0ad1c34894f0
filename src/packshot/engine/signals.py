"""Signals by which a scheduler asks a run for a checkpoint before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class SignalWatch:
    """A context that notes SIGTERM (write a checkpoint and stop) and SIGUSR1 (write a checkpoint and continue).

    The loop asks :meth:`take_save` and ``stop`` in each step. A second SIGTERM ends the process at once. Python lets
    only the main thread set handlers; in another thread the signals keep their meaning.
    """

    def __init__(self) -> None:
        self.stop = False
        self._save = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._save = True
        if number == signal.SIGTERM:
            self.stop = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked = self._save
        if asked:  # only then: the signal may arrive right here
            self._save = False
        return asked

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself returned


def ignore_sigterm(worker: int) -> None:
    """Ignore SIGTERM in a loader process: a scheduler sends it to the whole job, and the loop still needs a batch."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

"""Turns on the devices: who waits, who draws, and how long the others still have to wait."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

from packshot.runs.folder import log
from packshot.serve.devices import Cancelled, Device, DeviceLost, GenerationRequest, Picture, Progress


class QueueFull(Exception):
    """As many requests wait as the queue may hold."""


class Turn:
    """One request's turn on a device, from waiting to its pictures.

    read: gives the request when the turn begins, so that a waiting job keeps no pictures in memory.
    begin: called then; False if the turn is not wanted any more.
    """

    def __init__(
        self,
        read: Callable[[], GenerationRequest],
        steps: int,
        begin: Callable[[], bool] = lambda: True,
    ) -> None:
        self.read = read
        self.begin = begin
        self.progress = Progress(steps)
        self.future: Future[list[Picture]] = Future()


class Place:
    """A place in the queue, held from before the upload is read until the turn in it has ended."""

    def __init__(self, put: Callable[[Turn], None], give_back: Callable[[], None]) -> None:
        self.put = put
        self.give_back = give_back
        self.open = True

    def start(self, turn: Turn) -> Turn:
        """Queue the one turn of this place. Its end gives the place back."""
        self.open = False
        turn.future.add_done_callback(lambda _: self.give_back())
        self.put(turn)
        return turn

    def leave(self) -> None:
        """Give the place back, unless a turn was started in it."""
        if self.open:
            self.open = False
            self.give_back()


class DeviceQueue:
    """Threads that hand turns to the devices, one thread a device.

    Requests whose client waits and stored jobs have a line each. The devices take from them in turns, so that neither
    many jobs nor many clients keep the other ones waiting for ever.

    on_failure: gets the reason when a device cannot be loaded. on_turn: gets the seconds of every finished turn.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        queue_size: int,
        on_failure: Callable[[Exception], None],
        on_turn: Callable[[float], None],
    ) -> None:
        self.devices = devices
        self.queue_size = queue_size
        self.on_failure = on_failure
        self.on_turn = on_turn
        self.loaded = 0
        self.light = False  # whether the model reads the direction of light
        self.closing = False
        self.step_seconds = 0.1  # of one denoising step, averaged; the first guess matters until a turn has ended
        self.turn_seconds = 1.0  # of the last turn
        self.taken = 0  # places, those of running turns included
        self.lines: tuple[deque[Turn], deque[Turn]] = (deque(), deque())  # waiting clients, stored jobs
        self.next_line = 0
        self.running: set[Turn] = set()
        self.changed = threading.Condition()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Load the devices, each in its thread. Turns that are queued meanwhile wait for that."""
        for number, device in enumerate(self.devices):
            thread = threading.Thread(target=self.serve_device, args=(device,), name=f"device-{number}", daemon=True)
            self.threads.append(thread)
            thread.start()

    @property
    def waiting(self) -> int:
        """Places taken by requests that do not run yet, those whose upload is still arriving included."""
        return max(0, self.taken - len(self.devices))

    def reserve(self) -> Place:
        """A place for one turn; :meth:`Place.leave` it if there will be none.

        Raises:
            QueueFull: ``queue_size`` places are taken besides those of the devices.
        """
        with self.changed:
            if self.taken >= self.queue_size + len(self.devices):
                raise QueueFull
            self.taken += 1
        return Place(lambda turn: self.put(turn, 0), self.give_back)

    def give_back(self) -> None:
        with self.changed:
            self.taken -= 1

    def put(self, turn: Turn, line: int = 1) -> None:
        """Queue a turn: in line 0 those with a place, in line 1 stored jobs."""
        with self.changed:
            self.lines[line].append(turn)
            self.changed.notify()

    def cancel(self, turn: Turn) -> None:
        """Give up a turn: a waiting one leaves its line at once, a running one ends after its denoising step."""
        turn.progress.cancelled.set()
        with self.changed:
            lines = [line for line in self.lines if turn in line]
            for line in lines:
                line.remove(turn)
        if lines:  # a running turn keeps its place until the device is free
            turn.future.cancel()

    def ahead(self, turn: Turn) -> list[Turn]:
        """The jobs and running turns that come before a waiting job; none for one that runs."""
        with self.changed:
            if turn in self.running or turn not in self.lines[1]:
                return []
            return [*self.running, *list(self.lines[1])[: self.lines[1].index(turn)]]

    def seconds_left(self, turn: Turn) -> float:
        """Estimate of the time until a job has its pictures, from the steps that are left and their usual time."""
        steps = 0
        for one in [*self.ahead(turn), turn]:
            steps += max(0, one.progress.steps - one.progress.steps_done)
        return steps * self.step_seconds / len(self.devices)

    def serve_device(self, device: Device) -> None:
        """One device's thread."""
        try:
            self.light = device.load()
        except Exception as error:
            self.on_failure(error)
            return
        self.loaded += 1
        while (turn := self.take()) is not None:
            self.run(device, turn)
            with self.changed:
                self.running.discard(turn)

    def take(self) -> Turn | None:
        """The next turn, when there is one; None when the queue closes."""
        with self.changed:
            while not self.closing:
                for line in (self.lines[self.next_line], self.lines[1 - self.next_line]):
                    if line:
                        turn = line.popleft()
                        self.next_line = 1 if line is self.lines[0] else 0
                        self.running.add(turn)
                        return turn
                self.changed.wait()
        return None

    def run(self, device: Device, turn: Turn) -> None:
        """Let a device draw a turn. Its future gets the pictures, or why there are none."""
        started = time.monotonic()
        # A future that its owner cancelled meanwhile takes no result.
        with contextlib.suppress(InvalidStateError):
            try:
                if turn.progress.cancelled.is_set() or not turn.begin():
                    raise Cancelled
                pictures = device.draw(turn.read(), turn.progress)
            except DeviceLost as error:
                log.error("%s The next request starts it again.", error.args[0])
                turn.future.set_exception(error)
            except Exception as error:
                turn.future.set_exception(error)
            else:
                self.turn_seconds = time.monotonic() - started
                self.step_seconds = (self.step_seconds + self.turn_seconds / max(1, turn.progress.steps)) / 2
                self.on_turn(self.turn_seconds)
                turn.future.set_result(pictures)

    def close(self, seconds: float) -> None:
        """Cancel everything, give running steps that long to end, and then end the devices."""
        with self.changed:
            self.closing = True
            turns = [*self.running, *self.lines[0], *self.lines[1]]
            self.changed.notify_all()
        for turn in turns:
            self.cancel(turn)
        until = time.monotonic() + seconds
        for thread in self.threads:
            if self.running:
                thread.join(max(0.0, until - time.monotonic()))
        for device in self.devices:
            device.close()
        for thread in self.threads:  # a killed process has let go of its thread, which now stores how its turn ended
            thread.join(0.2)

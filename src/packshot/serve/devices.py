"""Where pictures are drawn: in a worker process per device, or in this process by a model that the caller loaded."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from packshot.config.conditions import networks
from packshot.config.schema import GenerateSettings, Serve
from packshot.errors import ConfigError, PackshotError
from packshot.runs.start import start_process
from packshot.scene import Scene

if TYPE_CHECKING:
    from packshot.generate import Packshot
    from packshot.generate.product import Photo

Json = dict[str, Any]
POLL_SECONDS = 0.05  # how soon a worker process hears that it should stop, besides its own denoising step


class Cancelled(Exception):
    """Nobody waits for this turn any more."""


class Refused(Exception):
    """The request cannot be drawn, and the client can mend it."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(code, message, hint)
        self.code = code
        self.message = message
        self.hint = hint


class DeviceLost(PackshotError):
    """A worker process ended by itself: out of memory, or a crash of a library."""

    def __init__(self) -> None:
        super().__init__("The worker process has ended.", "Its last messages are on the screen.")


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request: what one turn on a device needs.

    products: one, or several that stand in one picture. masks: one for each of them, or none. with_layers: whether the
    layers are encoded, too. most_pixels: of the cut-out that several products make.
    """

    products: tuple[Photo, ...]
    masks: tuple[Photo, ...]
    reference: Photo | None
    scene: Scene | str
    settings: GenerateSettings
    num_images: int
    seed: int
    with_layers: bool = False
    most_pixels: int | None = None

    @property
    def steps(self) -> int:
        """Denoising steps of all pictures together, if every retry is needed."""
        return self.num_images * self.settings.most_steps()


@dataclass(frozen=True)
class Picture:
    """A picture as a PNG file, its certificate, and its layers as PNG files by name.

    cut_out: the PNG file that several products make together, which the certificate takes as their photo.
    """

    png: bytes
    certificate: Json
    layers: dict[str, bytes] = field(default_factory=dict)
    cut_out: bytes | None = None


@dataclass
class Progress:
    """How far a turn on a device is. Everything here may be read and set from any thread."""

    steps: int
    steps_done: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def step(self) -> None:
        """Count a denoising step. Raises Cancelled when nobody waits any more."""
        self.steps_done += 1
        if self.cancelled.is_set():
            raise Cancelled


class Device(Protocol):
    """Draws one request at a time. All methods are called from one thread, except ``close``."""

    def load(self) -> bool:
        """Make the device ready. Returns whether its model reads the direction of light."""
        ...

    def draw(self, request: GenerationRequest, progress: Progress) -> list[Picture]: ...

    def close(self) -> None: ...


def reads_light(packshot: Packshot) -> bool:
    """Whether a ControlNet reads where light comes from."""
    return any("light" in control.inputs for control in packshot.models.controls)


def encoded(image: Image.Image) -> bytes:
    """A layer as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def with_products(packshot: Packshot, request: GenerationRequest) -> Packshot:
    """What draws the products of a request. Raises PackshotError: a photo or its mask is unusable."""
    if len(request.products) == 1:
        return packshot.set_product(request.products[0], request.masks[0] if request.masks else None)
    names = [f"product_file {number}" for number in range(1, len(request.products) + 1)]
    return packshot.set_group(request.products, request.masks, names, request.most_pixels)


def cut_out_of(packshot: Packshot) -> bytes:
    """The PNG file of the cut-out that several products make."""
    from packshot.generate.group import cut_out_file

    assert packshot.product is not None
    return cut_out_file(packshot.product)


def draw(packshot: Packshot, request: GenerationRequest, on_step: Callable[[], None]) -> Iterator[Picture]:
    """The pictures of a request, one by one, so that only one at a time is in memory with its layers.

    Raises:
        Refused: the photo has no usable product, or a setting cannot work with it.
        Exception: what ``on_step`` raises, and failures of the model.
    """
    try:
        tool = with_products(packshot, request)
    except PackshotError as error:
        raise Refused("unusable_product", error.args[0], error.hint) from error
    cut_out = cut_out_of(tool) if len(request.products) > 1 else None
    results = tool.stream(
        request.scene,
        num_images=request.num_images,
        seed=request.seed,
        reference=request.reference,
        settings=request.settings,
        on_step=on_step,
    )
    try:
        for result in results:
            layers = {}
            if request.with_layers:
                layers = {name: encoded(image) for name, image in result.layers.items()}
            yield Picture(result.png, result.certificate, layers, cut_out)
    except ConfigError as error:
        raise Refused("invalid_field", error.args[0], error.hint) from error


class LocalDevice:
    """Draws in this process, with a model that is loaded or a function that loads it."""

    def __init__(self, packshot: Packshot | Callable[[], Packshot]) -> None:
        self.source = packshot

    def load(self) -> bool:
        if callable(self.source):
            self.source = self.source()
        return reads_light(self.source)

    def draw(self, request: GenerationRequest, progress: Progress) -> list[Picture]:
        assert not callable(self.source)
        return list(draw(self.source, request, progress.step))

    def close(self) -> None:
        """A thread cannot be ended; its turn is cancelled, and the process does not wait for it."""


class ProcessDevice:
    """Draws in a worker process of its own. What happens there, also a crash, leaves the server answering.

    visible: the CUDA devices that the process sees, as in CUDA_VISIBLE_DEVICES; None: as the server's own.
    """

    def __init__(self, config: Serve, visible: str | None = None) -> None:
        self.config = config
        self.visible = visible
        self.process: multiprocessing.process.BaseProcess | None = None
        self.pipe: Connection | None = None
        self.turns = 0

    def load(self) -> bool:
        """Start the process and wait until its model is loaded.

        Raises:
            PackshotError: the model cannot be loaded.
        """
        # Not forked: a fork of a process with threads may inherit a lock that nobody releases.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.config, self.visible), daemon=True)
        process.start()
        self.process = process
        theirs.close()
        kind, value = self.receive()
        if kind != "loaded":
            raise value if isinstance(value, Exception) else PackshotError(f"The model cannot be loaded: {value}")
        return bool(value)

    def receive(self) -> tuple[str, object]:
        """The next message of the process. Raises DeviceLost when there will be none."""
        assert self.pipe is not None
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise DeviceLost from error

    def send(self, kind: str, value: object) -> None:
        assert self.pipe is not None
        try:
            self.pipe.send((kind, self.turns, value))
        except OSError as error:
            raise DeviceLost from error

    def draw(self, request: GenerationRequest, progress: Progress) -> list[Picture]:
        """Pictures of a request; a process that was lost is started again first.

        Raises:
            DeviceLost: the process ended while it drew this request.
        """
        if self.process is None or not self.process.is_alive():
            self.load()
        try:
            return self.draw_once(request, progress)
        except DeviceLost:
            if progress.steps_done:
                raise
            # It had ended before this request came, and the system had not noticed yet.
            self.load()
            return self.draw_once(request, progress)

    def draw_once(self, request: GenerationRequest, progress: Progress) -> list[Picture]:
        """Pictures of a request, by the process that is there."""
        assert self.pipe is not None
        self.turns += 1
        self.send("draw", request)
        pictures: list[Picture] = []
        told_to_stop = False
        while True:
            if progress.cancelled.is_set() and not told_to_stop:
                self.send("stop", None)
                told_to_stop = True
            if not self.pipe.poll(POLL_SECONDS):
                continue
            kind, value = self.receive()
            if kind == "step":
                progress.steps_done += 1
            elif kind == "picture":
                assert isinstance(value, Picture)
                pictures.append(value)
            elif kind == "done":
                return pictures
            else:
                raise value if isinstance(value, Exception) else RuntimeError(value)

    def close(self) -> None:
        """End the process at once, also in the middle of a step."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()


def work(pipe: Connection, config: Serve, visible: str | None) -> None:
    """The worker process: load the model, then draw what comes through the pipe until the server has gone.

    Messages to the server are (kind, value), and from the server (kind, number of the turn, value).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes of a terminal; the server decides
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible  # before anything imports torch
    start_process()
    try:
        packshot = load_packshot(config)
    except Exception as error:
        failure = error if isinstance(error, PackshotError) else traceback.format_exc()
        pipe.send(("failed", failure))
        return
    pipe.send(("loaded", reads_light(packshot)))
    while True:
        try:
            kind, turn, request = pipe.recv()
            if kind == "draw":  # a "stop" that comes here was late: its turn has ended
                draw_to(pipe, packshot, turn, request)
        except (EOFError, OSError):
            return  # the server has gone


def draw_to(pipe: Connection, packshot: Packshot, turn: int, request: GenerationRequest) -> None:
    """Draw a request and send its steps, its pictures and how it ended."""

    def on_step() -> None:
        while pipe.poll():
            kind, number, _ = pipe.recv()
            if kind == "stop" and number == turn:
                raise Cancelled
        pipe.send(("step", None))

    try:
        for picture in draw(packshot, request, on_step):
            pipe.send(("picture", picture))
        ending = ("done", None)
    except (Cancelled, Refused) as error:
        ending = ("ended", error)
    except (EOFError, BrokenPipeError):
        raise
    except Exception:
        ending = ("failed", traceback.format_exc())
    pipe.send(ending)


def load_packshot(config: Serve) -> Packshot:
    """The model of a server's config. Importing it takes seconds, and only worker processes need it."""
    from packshot.generate.adapters import check_adapters
    from packshot.generate.packshot import Packshot

    named = networks(config)
    check_adapters(config.adapters, named, config.generate)
    return Packshot.load(
        model=config.model,
        adapters=config.adapters,
        matte=config.matte,
        networks=named,
        inference=config.inference,
    )


def process_devices(config: Serve) -> list[ProcessDevice]:
    """The devices of ``serve.devices``."""
    if not config.serve.devices:
        return [ProcessDevice(config)]
    return [ProcessDevice(config, "" if name == "cpu" else name) for name in config.serve.devices]

"""From a form to a checked request: everything that strangers send is examined here."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastapi import Request, UploadFile

from packshot.config.checks import validate
from packshot.config.schema import Generate, GenerateSettings, Placement, SceneConfig, Serve
from packshot.errors import ConfigError, PackshotError
from packshot.generate.product import Photo, decode
from packshot.runs.files import sha256
from packshot.scene import SLOTS, Scene
from packshot.serve.devices import GenerationRequest
from packshot.serve.schemas import ApiError, SceneForm

FILES = ("product_file", "mask_file", "reference_file")
REPEATED = {name for name, row in SLOTS.items() if row.many}  # the fields that a form may have several times
CANVAS_PIXELS = 1024 * 1024
ABSOLUTE_PATH = re.compile(r"(?<![\w./])/(?:[^\s/:,;'\"]+/)+[^\s/:,;'\"]*")


def without_paths(text: str) -> str:
    """A message with the last part of every absolute path only: the rest would show strangers the machine."""
    return ABSOLUTE_PATH.sub(lambda found: PurePosixPath(found.group()).name, text)


def public_error(status: int, code: str, error: PackshotError) -> ApiError:
    """What a client may know of an error that its request caused."""
    return ApiError(status, code, without_paths(str(error.args[0])), without_paths(error.hint))


@dataclass(frozen=True)
class PromptSettings:
    """The checked fields of a form, without its files: the scene or prompt, and how it is drawn."""

    scene: Scene | str
    settings: GenerateSettings
    num_images: int
    seed: int

    @property
    def steps(self) -> int:
        """Denoising steps of all pictures together, if every retry is needed."""
        return self.num_images * self.settings.most_steps()


async def refuse_repeated(request: Request) -> None:
    """Raises ApiError 422 if a form has a field twice of which only one could count."""
    form = await request.form()
    names = [name for name, _ in form.multi_items()]
    for name in sorted(set(names)):
        if names.count(name) > 1 and name not in REPEATED:
            raise ApiError(422, "invalid_field", f"{name[:80]!r} is given {names.count(name)} times.", "Send it once.")


async def read_upload(name: str, upload: UploadFile, config: Serve) -> bytes:
    """The bytes of a file field; raises ApiError 413 where they are too many."""
    limit = config.serve.max_upload_mib
    if (upload.size or 0) > limit * 2**20:
        raise ApiError(413, "too_large", f"{name} is larger than {limit:g} MiB.", "Send a smaller file.")
    return await upload.read()


def open_photo(name: str, data: bytes, config: Serve) -> Photo:
    """The picture in a file, with the file's hash. Its content decides what it is, not its extension or declared type.

    Raises:
        ApiError: 413 too many pixels, 415 no usable image.
    """
    limit = config.serve.max_pixels
    try:
        image, steps = decode(data, name, limit)
    except PackshotError as error:
        if getattr(error, "reason", "") == "too_many_pixels":
            raise ApiError(413, "too_large", f"{name} has more than {limit} pixels.", "Scale it down.") from error
        raise public_error(415, "not_an_image", error) from error
    return Photo(image, sha256(data), tuple(steps))


def read_settings(form: SceneForm, config: Serve, reference: bool) -> PromptSettings:
    """The form over the server's defaults, checked by the rules of ``generate.py``. reference: whether one was sent.

    Raises:
        ApiError: 422, a value is out of range or contradicts another, or it would take too long.
    """
    slots = {field.name: getattr(form, field.name) for field in dataclasses.fields(SceneConfig)}
    given = {}
    for field in dataclasses.fields(GenerateSettings):
        value = getattr(form, field.name, None)
        # "background" is a slot of the scene in a form, and a group of keys in the settings
        if value is not None and field.name != "size" and field.name not in slots:
            given[field.name] = value
    if form.size:
        given["size"] = [int(side) for side in form.size.split("x")]
    if form.retries is not None:
        given["verify"] = dataclasses.replace(config.generate.verify, retries=form.retries)
    settings = dataclasses.replace(config.generate, **given)
    if form.size and settings.placement is Placement.original:
        message = f"size={form.size} has no effect with placement=original, which keeps the photo's size."
        raise ApiError(422, "invalid_field", message, "Add placement=center, or leave size out.")
    if form.prompt and any(slots.values()):
        raise ApiError(422, "invalid_field", "prompt and scene fields are both given.", "Use one of the two.")
    if reference and not config.adapters.ip_adapter:
        raise ApiError(
            422,
            "no_ip_adapter",
            "reference_file needs an IP-Adapter, which this server has not loaded.",
            "Leave it out, or start the server with adapters.ip_adapter=<export folder>.",
        )
    try:
        validate(Generate(**vars(settings), num_images=form.num_images))
    except ConfigError as error:
        raise public_error(422, "invalid_field", error) from error
    if settings.size and settings.size[0] * settings.size[1] > config.serve.max_pixels:
        raise ApiError(422, "invalid_field", f"size={form.size} has more than {config.serve.max_pixels} pixels.")
    refuse_work(form.num_images, settings, config)
    seed = config.run.seed if form.seed is None else form.seed
    return PromptSettings(form.prompt or Scene.from_dict(slots), settings, form.num_images, seed)


def max_steps(config: Serve, settings: GenerateSettings) -> int:
    """How many denoising steps all pictures of a request may take together.

    A canvas counts as 1 up to CANVAS_PIXELS, because the model's working copy is of about one size, and by its pixels
    beyond that, because every picture is composited at the canvas's size.
    """
    pixels = settings.size[0] * settings.size[1] if settings.size else 0
    return int(config.serve.max_work / max(1.0, pixels / CANVAS_PIXELS))


def refuse_work(num_images: int, settings: GenerateSettings, config: Serve) -> None:
    """Raises ApiError 422 if a request would hold a device for too long."""
    steps = num_images * settings.most_steps()
    allowed = max_steps(config, settings)
    if steps > allowed:
        factors = "num_inference_steps x num_images" + (" x (1 + retries)" if settings.verify.retries else "")
        raise ApiError(
            422,
            "too_much_work",
            f"{factors} is {steps}; this server allows {allowed} at this size.",
            "Ask for fewer steps, pictures or retries, or start the server with a larger serve.max_work.",
        )


def build_request(
    prompt: PromptSettings, files: dict[str, bytes], config: Serve, with_layers: bool = False
) -> GenerationRequest:
    """A request from the fields and the files of its form. It decodes the files, so it is not for the event loop."""
    photos: dict[str, Photo] = {}
    for name, data in files.items():
        photos[name] = open_photo(name, data, config)
    return GenerationRequest(
        product=photos["product_file"],
        mask=photos.get("mask_file"),
        reference=photos.get("reference_file"),
        scene=prompt.scene,
        settings=prompt.settings,
        num_images=prompt.num_images,
        seed=prompt.seed,
        with_layers=with_layers,
    )

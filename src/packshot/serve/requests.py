"""From a form to a checked request: everything that strangers send is examined here."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastapi import Request, UploadFile

from packshot.config import conditions
from packshot.config.checks import validate
from packshot.config.schema import Generate, GenerateSettings, Placement, Serve, Shadow
from packshot.config.unread import RULES
from packshot.errors import ConfigError, PackshotError
from packshot.generate.product import Photo, decode
from packshot.runs.files import sha256
from packshot.scene import SLOTS, Scene
from packshot.serve.devices import GenerationRequest
from packshot.serve.schemas import ApiError, SceneForm

FIELDS = SceneForm.model_fields
FILES = ("product_file", "mask_file", "reference_file")
REPEATED = {name for name, row in SLOTS.items() if row.many}  # the fields that a form may have several times
GROUPED = {"product_file", "mask_file"}  # those that it may have once for each product of a group
CANVAS_PIXELS = 1024 * 1024
CANVAS = ("size", "aspect_ratio", "position", "margin", "product_scale")  # settings without effect on the photo's frame
COLOR = "generate.background.color"
# fields that nothing reads where a server draws nothing; scene slots are others
UNDRAWN = [name for rule in RULES if rule.by == ("background.color",) for name in rule.keys if name in FIELDS]
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


async def refuse_repeated(request: Request, together: bool = False) -> None:
    """Raises ApiError 422 if a form has a field twice of which only one could count. together: several products do."""
    form = await request.form()
    names = [name for name, _ in form.multi_items()]
    allowed = REPEATED | GROUPED if together else REPEATED
    for name in sorted(set(names)):
        if names.count(name) > 1 and name not in allowed:
            way = "Send it once, or add together=true." if name in GROUPED else "Send it once."
            raise ApiError(422, "invalid_field", f"{name[:80]!r} is given {names.count(name)} times.", way)


def refuse_group(together: bool, products: int, masks: int) -> None:
    """Raises ApiError 422 if the files of a form do not make a group. products, masks: how many there are."""
    if not together:
        return
    if products < 2:
        message = f"together=true needs several products, and product_file is given {products} time."
        raise ApiError(422, "invalid_field", message, "Repeat product_file, or leave together out.")
    if masks not in (0, products):
        message = f"mask_file is given {masks} times for {products} products."
        raise ApiError(422, "invalid_field", message, "Send a mask for each product in their order, or none.")


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


def over_defaults(form: SceneForm, defaults: GenerateSettings) -> GenerateSettings:
    """The server's settings with those of a form in place of them.

    A form cannot take a setting back. So the server's own ones that have no effect beside the form's, such as the size
    of a canvas beside ``placement=original``, give way.
    """
    given: dict[str, object] = {}
    placement = defaults.placement if form.placement is None else form.placement
    if placement is Placement.original:
        given = {name: getattr(GenerateSettings(), name) for name in CANVAS}
    elif form.placement is not None:
        given["position"] = []
    for field in dataclasses.fields(GenerateSettings):
        value = getattr(form, field.name, None)
        # "background" is a slot of the scene in a form, and a group of keys in the settings
        if value is not None and field.name != "size" and field.name not in SLOTS:
            given[field.name] = value
    if form.size:
        given["size"] = [int(side) for side in form.size.split("x")]
        given["aspect_ratio"] = None
    if form.retries is not None:
        control = defaults.verify.control if form.retries else 0.0
        given["verify"] = dataclasses.replace(defaults.verify, retries=form.retries, control=control)
    return GenerateSettings(**{**vars(defaults), **given})


def refuse_contradictions(form: SceneForm, settings: GenerateSettings, config: Serve, reference: bool) -> None:
    """Raises ApiError 422 for what contradicts itself or has no effect, in the words of a form."""
    if form.size and settings.placement is Placement.original:
        message = f"size={form.size} has no effect with placement=original, which keeps the photo's size."
        raise ApiError(422, "invalid_field", message, "Add placement=center, or leave size out.")
    if settings.placement is not Placement.original and not settings.size and not settings.aspect_ratio:
        message = f"placement={settings.placement} needs the size of a canvas."
        raise ApiError(422, "invalid_field", message, "Add size=1024x1024, or leave placement out.")
    slots = [name for name in SLOTS if getattr(form, name)]
    if form.prompt and slots:
        raise ApiError(422, "invalid_field", "prompt and scene fields are both given.", "Use one of the two.")
    color = settings.background.color
    given = [*slots, *(name for name in UNDRAWN if getattr(form, name) is not None)]
    if reference:
        given.append("reference_file")
    if color and given:
        message = f"{given[0]} has no effect: this server puts products on the colour {color}, and draws nothing."
        raise ApiError(422, "invalid_field", message, f"Leave {given[0]} out, or use a server without {COLOR}.")
    read = set(conditions.settings()) if config.adapters.controlnets and not color else set()
    if settings.shadow is not Shadow.none:
        read.add("light")
    for name, setting in conditions.settings().items():
        value = getattr(form, setting.key)
        if value is not None and name not in read:
            message = f"{setting.key}={value:g} has no effect: this server adds no shadow, and no ControlNet reads it."
            way = f"Leave {setting.key} out and describe it in words, or start the server with generate.shadow=contact."
            raise ApiError(422, "invalid_field", message, way)


def read_settings(form: SceneForm, config: Serve, reference: bool) -> PromptSettings:
    """The form over the server's defaults, checked by the rules of ``generate.py``. reference: whether one was sent.

    Raises:
        ApiError: 422, a value is out of range or contradicts another, or it would take too long.
    """
    settings = over_defaults(form, config.generate)
    refuse_contradictions(form, settings, config, reference)
    if reference and not config.adapters.ip_adapter:
        raise ApiError(
            422,
            "no_ip_adapter",
            "reference_file needs an IP-Adapter, which this server has not loaded.",
            "Leave it out, or start the server with adapters.ip_adapter=<export folder>.",
        )
    try:
        validate(Generate(**vars(settings), adapters=config.adapters, num_images=form.num_images))
    except ConfigError as error:
        raise public_error(422, "invalid_field", error) from error
    if settings.size and settings.size[0] * settings.size[1] > config.serve.max_pixels:
        raise ApiError(422, "invalid_field", f"size={form.size} has more than {config.serve.max_pixels} pixels.")
    refuse_work(form.num_images, settings, config)
    seed = config.run.seed if form.seed is None else form.seed
    slots = {name: getattr(form, name) for name in SLOTS}
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
    limit = config.serve.max_pixels
    photos: dict[str, Photo] = {}
    for name, data in files.items():
        photos[name] = open_photo(name, data, config)
    products = numbered(photos, "product_file")
    pixels = sum(photo.image.width * photo.image.height for photo in products)
    if pixels > limit:
        message = f"The {len(products)} photos of the products have {pixels} pixels together; at most {limit} may be."
        raise ApiError(413, "too_large", message, "Scale them down, or send fewer.")
    return GenerationRequest(
        products=products,
        masks=numbered(photos, "mask_file"),
        reference=photos.get("reference_file"),
        scene=prompt.scene,
        settings=prompt.settings,
        num_images=prompt.num_images,
        seed=prompt.seed,
        with_layers=with_layers,
        most_pixels=limit,
    )


def numbered(photos: dict[str, Photo], field: str) -> tuple[Photo, ...]:
    """The pictures of a field in their order; the first one has the field's name, the next ones a number after it."""
    count = sum(name.partition(".")[0] == field for name in photos)
    return tuple(photos[file_name(field, number)] for number in range(count))


def file_name(field: str, number: int) -> str:
    """What the file of a field is called among the files of its form."""
    return f"{field}.{number}" if number else field

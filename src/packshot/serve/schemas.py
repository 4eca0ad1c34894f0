"""What travels over HTTP: the forms of requests, the answers, the errors. All of it is listed in ``/docs``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from fastapi import HTTPException, UploadFile
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, create_model

from packshot.config import conditions
from packshot.config.generate import POSITIONS
from packshot.config.keys import nearest
from packshot.config.schema import GenerateSettings, Placement
from packshot.config.verify import MOST_RETRIES, VerifyConfig
from packshot.scene import SLOTS
from packshot.scene.slots import Slot

MAX_IMAGES = 8
MOST_TOGETHER = 8  # products in one picture
RETRIES = next(field for field in dataclasses.fields(VerifyConfig) if field.name == "retries")
Json = dict[str, Any]


class ApiError(HTTPException):
    """An answer other than success. ``code`` is for programs, ``message`` and ``hint`` are for people."""

    def __init__(self, status: int, code: str, message: str, hint: str = "", headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.code = code
        self.hint = hint


def setting(name: str) -> Any:
    """An optional form field with help and range of the config key of that name."""
    metadata = next(f.metadata for f in dataclasses.fields(GenerateSettings) if f.name == name)
    text = f"{metadata['help']}; default: the server's generate.{name}"
    return Field(None, ge=metadata["min"], le=metadata["max"], description=text)


# coordinates are left out: a form has no field for the two numbers
PLACES = ["original", *POSITIONS]


def placement_of(value: object) -> object:
    """A placement by its name; the members' values are numbers that mean nothing outside."""
    if isinstance(value, str) and value not in PLACES:
        raise ValueError(f"takes {' or '.join(PLACES)}")
    return Placement[value] if isinstance(value, str) else value


PlacementName = Annotated[Placement, BeforeValidator(placement_of), WithJsonSchema({"type": "string", "enum": PLACES})]
Text = Annotated[str, Field(max_length=2000)]
OptionalText = Annotated[str | None, Field(max_length=2000)]


def slot_field(row: Slot) -> Any:
    """Type and field of a scene's slot in a form."""
    if row.many:
        return list[Text], Field([], max_length=16, description=f"{row.help}; repeat the field for more")
    if row.order == 0:
        return Text, Field("", description=row.help)
    return OptionalText, Field(None, description=row.help)


def row_fields() -> dict[str, Any]:
    """Type and field of every scene slot, and of every number that control maps are drawn from."""
    fields: dict[str, Any] = {name: slot_field(row) for name, row in SLOTS.items()}
    for row in conditions.settings().values():
        fields[row.key] = (float | None, setting(row.key))
    return fields


RowForm = create_model("RowForm", **row_fields())


class SceneForm(RowForm):
    """What to draw, without the files."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text | None = Field(None, description="free text")
    seed: int | None = Field(None, ge=0, lt=2**32, description="same seed, same answer; default: the server's run.seed")
    num_images: int = Field(1, ge=1, le=MAX_IMAGES)
    negative_prompt: Text | None = setting("negative_prompt")
    num_inference_steps: int | None = setting("num_inference_steps")
    guidance_scale: float | None = setting("guidance_scale")
    placement: PlacementName | None = setting("placement")
    retries: int | None = Field(
        None,
        ge=0,
        le=MOST_RETRIES,
        description=f"{RETRIES.metadata['help']}; default: the server's generate.verify.retries",
    )
    together: bool = Field(
        False,
        description="several products in one picture, side by side in the order of their product_file, each with its "
        f"own pixels; up to {MOST_TOGETHER}",
    )
    size: str | None = Field(None, pattern=r"^\d{1,5}x\d{1,5}$", description="width x height in px: 1024x768")


class GenerateForm(SceneForm):
    """The multipart fields of a request for pictures. Describe the scene by `prompt` or by its slots, not by both."""

    product_file: list[UploadFile] = Field(
        min_length=1,
        max_length=MOST_TOGETHER,
        description="photo of the product; with together=true repeat the field for each product",
    )
    mask_file: list[UploadFile] = Field(
        [],
        max_length=MOST_TOGETHER,
        description="white = product; default: found from alpha or segmentation; with together=true one for each "
        "product in their order, or none",
    )
    reference_file: UploadFile | None = Field(None, description="image whose look is taken (needs an IP-Adapter)")


class MaskForm(BaseModel):
    """The multipart field of a request for a mask."""

    model_config = ConfigDict(extra="forbid")

    product_file: UploadFile = Field(description="photo of the product")


class MaskResponse(BaseModel):
    mask: str = Field(description="base64 of a PNG file of the photo's size; white = product")
    width: int
    height: int
    method: str = Field(description="how the mask was found")
    confidence: float = Field(description="0 to 1")
    reasons: list[str] = Field(description="codes of what is in doubt; empty: nothing is")


class GeneratedImage(BaseModel):
    image: str = Field(description="base64 of the file")
    media_type: str = "image/png"
    seed: int = Field(
        description="the request's seed + k for its k-th picture; asked for alone it gives the same picture"
    )
    certificate: Json = Field(description="proof that the product's pixels are the upload's")


class Prediction(BaseModel):
    prompt: str = Field(description="text the model was prompted with")
    images: list[GeneratedImage]
    cut_out: str | None = Field(
        None,
        description="base64 of the PNG file that several products make, which certificates and `packshot verify` take "
        "as the photo; null for one product",
    )


class GenerateResponse(BaseModel):
    success: bool = True
    request_id: str
    prediction: Prediction
    processing_time_ms: float = Field(description="from the request's arrival, waiting included")
    model_version: str


class JobError(BaseModel):
    error: str
    error_code: str
    hint: str


class JobImage(BaseModel):
    seed: int
    image: str = Field(description="address of the PNG file")
    certificate: str = Field(description="address of its certificate, JSON")
    layers: dict[str, str] = Field(description="addresses of its layers, PNG files, by name")


class JobStatus(BaseModel):
    id: str
    state: str = Field(description="queued, running, done or failed")
    created_at: float = Field(description="seconds since 1970")
    queue_position: int = Field(description="turns that come before it; 0 while it runs and after")
    share_done: float = Field(description="0 to 1, in denoising steps")
    seconds_left: float | None = Field(description="estimate, waiting included; null once it has ended")
    images: list[JobImage] = Field(description="once it is done")
    error: JobError | None = Field(description="why it failed")


class JobList(BaseModel):
    jobs: list[JobStatus]


class ErrorResponse(BaseModel):
    success: bool = False
    error: str = Field(description="one sentence")
    error_code: str = Field(description="stable, for programs")
    request_id: str
    hint: str = Field(description="the way out; may be empty")


class Health(BaseModel):
    status: str = Field(description="ok, loading or failed")
    model_loaded: bool
    version: str
    uptime_seconds: float


class Info(BaseModel):
    name: str = "packshot"
    version: str
    model_version: str
    docs: str = "/docs"
    endpoints: list[str]


class Options(BaseModel):
    """What a form should offer."""

    references: bool = Field(description="whether an IP-Adapter reads `reference_file`")
    light: bool = Field(description="whether a ControlNet or a shadow reads `light_angle`")
    defaults: Json = Field(description="the server's generate.* and seed")
    max_upload_mib: float
    max_pixels: int
    max_steps: int = Field(description="denoising steps of all pictures together")
    vocabulary: dict[str, list[str]] = Field(description="suggestions by slot")
    presets: dict[str, Json] = Field(description="whole scenes by name")


def first_field_error(errors: list[Json], known: list[str]) -> tuple[str, str]:
    """Sentence and hint for pydantic's list of errors; values are never repeated (they may be whole files)."""
    sentences = []
    hint = ""
    for error in errors:
        name = str(error["loc"][1]) if len(error["loc"]) > 1 else "body"
        if error["type"] == "extra_forbidden":
            close = nearest(name, known)
            hint = hint or (f"Did you mean {close}?" if close else f"Fields: {', '.join(known)}.")
            sentences.append(f"There is no field {name[:80]!r}")
        elif error["type"] == "missing":
            hint = hint or "Send multipart/form-data; /docs lists the fields."
            sentences.append(f"{name} is missing")
        elif "UploadFile" in error["msg"]:
            sentences.append(f"{name} must be a file")
        else:
            sentences.append(f"{name}: {error['msg'].removeprefix('Value error, ')}")
    return "; ".join(sentences) + ".", hint

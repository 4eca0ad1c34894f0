"""What every certificate holds, as a schema that programs can read: ``packshot verify --schema`` prints it as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packshot.errors import PackshotError
from packshot.generate.certificate import VERSION

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Pair = Annotated[list[int], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    """A part of a certificate. Newer versions may add keys."""

    model_config = ConfigDict(extra="allow")


class Core(Part):
    definition: str = Field(description="which pixels are the core")
    pixels: Count
    product_pixels: Count | None = Field(None, description="with alpha of 1/2 and more; null: of an older version")
    share: float | None = Field(None, ge=0, le=1, description="of the product's pixels that the core is")
    max_abs_diff: int | None = Field(ge=0, le=255, description="largest difference to the photo; null: no core")
    sha256_input: Sha256 = Field(description="of the core's RGB bytes in the photo, in row order")
    sha256_output: Sha256 = Field(description="of the same pixels in the picture")


class Edge(Part):
    measure: str
    pixels: Count
    p50: float = Field(ge=0)
    p95: float = Field(ge=0)


class Input(Part):
    name: str
    sha256: Sha256 = Field(description="of the photo's file; of its pixels, when it came from memory")


class MaskSign(Part):
    """A number that speaks for or against the mask."""

    about: str
    measured: float
    limit: float
    passed: bool


class Mask(Part):
    sha256: Sha256 = Field(description="of the mask's pixels")
    file_sha256: Sha256 | None = Field(description="of the mask's file, if one was given")
    method: str = Field(description="where the mask came from")
    source: str | None = Field(None, description="the same in words; null: of an older version")
    evidence: dict[str, MaskSign] = Field({}, description="numbers behind the reasons that begin with mask_")
    confidence: float = Field(ge=0, le=1)
    edge: str


class Transform(Part):
    """How a pixel of the photo came to its place."""

    decoding: list[str] = Field(description="what was done to the file's own pixels before")
    placement: str
    size: Pair = Field(description="width and height of the picture")
    source_box: list[int] = Field(min_length=4, max_length=4, description="left, top, right, bottom in the photo")
    offset: Pair = Field(description="left and top of that box in the picture")
    scale: list[float] = Field(min_length=2, max_length=2)
    resampling: str
    placed_size: Pair | None = Field(
        None, description="width and height of the box in the picture, if it was resampled"
    )


class Request(Part):
    scene: dict[str, Any]
    prompt: str
    negative_prompt: str | None
    num_inference_steps: Count = Field(description="0 where nothing was drawn")
    guidance_scale: float
    seed: Count


class Difference(Part):
    """Steps of 255 by which a file's pixels differ from the PNG's."""

    max: int = Field(ge=0, le=255)
    mean: float = Field(ge=0)


class Differences(Part):
    core: Difference
    overall: Difference


class Check(Part):
    measured: float
    asked: float
    passed: bool


class Standard(Part):
    """The rules of a marketplace, measured on the file that is handed over."""

    name: str
    passed: bool
    checks: dict[str, Check]


class Delivery(Part):
    """The file that is handed over: the PNG itself, or one of another format next to it."""

    file: str
    sha256: Sha256
    bytes: Count
    media_type: str
    profile: str
    quality: int | None = Field(ge=1, le=100, description="null: a format without loss")
    difference: Differences
    standard: Standard | None = None


class Shadow(Part):
    """The layer that the background is multiplied by under the product."""

    asked: str
    applied: bool
    darkening: float | None = Field(None, description="share of its light that the drawn ground has lost at the foot")
    threshold: float | None = Field(None, description="from which on `auto` adds nothing")
    strength: float | None = Field(None, description="null: of an older version, or nothing was added")


class PictureCheck(Part):
    """A check of the picture, see ``packshot.config.verify``."""

    measured: float | None = Field(description="null: not defined here, which passes")
    limit: float
    passed: bool
    ignored: bool = Field(description="by verify.ignore: it sends no picture to review")


class Try(Part):
    """One drawing of the picture."""

    seed: Count
    control: float = Field(description="added to the weights of ControlNets")
    reasons: list[str]


class Certificate(Part):
    """What was asked for, what was used, and what was measured on the finished file."""

    version: int = Field(ge=1, le=VERSION, description="of this schema")
    packshot: str = Field(description="version of the program")
    status: Literal["accepted", "needs_review"]
    reasons: list[str] = Field(description="codes of what is in doubt; empty if the picture is accepted")
    core: Core
    edge: Edge
    output_sha256: Sha256 = Field(description="of the picture's file")
    input: Input
    mask: Mask
    transform: Transform
    working_size: Pair | None = Field(description="width and height at which it was drawn; null: nothing was drawn")
    request: Request
    model: dict[str, Any] = Field(description="the weights, by part")
    shadow: Shadow | None = Field(None, description="null: of an older version")
    refined: dict[str, Any] | None = Field(None, description="a second pass over the background, with its sharpness")
    delivery: Delivery | None = Field(None, description="null: only the PNG was made")
    checks: dict[str, PictureCheck] = Field({}, description="by reason code; empty: of an older version")
    tries: list[Try] = Field([], description="drawings that it took; empty where nothing was drawn")
    chosen: Count | None = Field(None, description="which of the tries the picture is, from 0")


def json_schema() -> dict[str, Any]:
    """The JSON schema of certificates."""
    return Certificate.model_json_schema()


def read_certificate(file: Path) -> Certificate:
    """A certificate that follows the schema.

    Raises:
        PackshotError: the file cannot be read, or its content is not a certificate; the first wrong key is named.
    """
    try:
        return Certificate.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise PackshotError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise PackshotError(
            f"{file} is not a certificate: {key or 'the file'}: {first['msg']}.",
            "`packshot verify --schema` prints what a certificate holds.",
        ) from error
    except ValueError as error:
        raise PackshotError(
            f"{file} is not a certificate: it is not JSON.", "Name the .json that was written beside the picture."
        ) from error

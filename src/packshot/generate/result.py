"""One finished picture: composed, encoded, measured, with the certificate that states all of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
from PIL import Image

from packshot.generate import certificate as certificates
from packshot.generate.canvas import Canvas, Working
from packshot.generate.composite import blend
from packshot.generate.grounding import NO_SHADOW, Grounding, shaded
from packshot.generate.json_types import Json
from packshot.generate.output import with_profile
from packshot.generate.product import MASK_ORIGINS, Product
from packshot.imaging.pixels import to_bytes
from packshot.lists import map_values


@dataclass(frozen=True)
class Result:
    """One picture.

    image: RGB at the output's size. certificate: JSON-able, see docs of ``packshot.generate.certificate``.
    layers: ``background`` RGB, ``product`` RGBA, ``mask`` L, ``raw`` RGB (the model's own drawing, working size); none
        where they are not asked for.
    png: the encoded image that the certificate was measured on. canvas: the product on the picture's grid.
    """

    image: Image.Image
    certificate: Json
    layers: dict[str, Image.Image]
    png: bytes = field(repr=False)
    canvas: Canvas = field(repr=False)


@dataclass(frozen=True)
class Background:
    """What lies behind the product, uint8 (H, W, 3) at the canvas's size.

    colour_fit: of the certificate. working: the working copy that it was drawn at, and raw_HW3 that drawing, float in
    [0, 1]; None where nothing was drawn. shadow: what it is multiplied by. refined: what was done to the drawing.
    """

    rgb_HW3: np.ndarray
    colour_fit: Json
    working: Working | None = None
    raw_HW3: np.ndarray | None = None
    shadow: Grounding = NO_SHADOW
    refined: Json = field(default_factory=dict)


def finish(
    product: Product,
    canvas: Canvas,
    background: Background,
    stated: Mapping[str, Any],
    with_layers: bool,
    expected: Collection[str] = (),
    ignored: Collection[str] = (),
) -> Result:
    """Compose, encode and measure one picture.

    stated: entries of the certificate that are known already: what was asked for, the words that were lost, and the
    models. with_layers: whether the result has its parts. expected: reason codes that are not a fault of this picture.
    ignored: those that are measured, and send no picture to review.
    """
    picture = blend(canvas.foreground_HW3, canvas.matte_HW, shaded(background.rgb_HW3, background.shadow.layer_HW))
    png = with_profile(certificates.encode_png(picture))
    measured = certificates.measure(png, canvas)
    frame = background.working.frame if background.working else None
    certificate = {
        "version": certificates.VERSION,
        "packshot": version("packshot"),
        **certificates.judge(picture, canvas, measured, expected, ignored),
        **measured,
        "input": {"name": product.name, "sha256": product.sha256},
        "mask": describe_mask(product),
        "transform": {"decoding": list(product.decoding), **canvas.transform},
        "working_size": [frame.width, frame.height] if frame else None,
        "colour_fit": background.colour_fit,
        "shadow": background.shadow.report,
        "refined": background.refined,
        **stated,
        "product_extension": None,  # needs a second segmentation; evaluate.py measures it
    }
    layers = make_layers(canvas, background) if with_layers else {}
    return Result(Image.fromarray(picture), certificate, layers, png, canvas)


def make_layers(canvas: Canvas, background: Background) -> dict[str, Image.Image]:
    """The parts of a result. ``blend(product's RGB, product's alpha, shaded(background, shadow))`` gives the picture
    again, exactly.

    background: RGB, colour-corrected. product: RGBA, colours un-mixed from the old background. mask: L, the alpha.
    raw: RGB, what the model drew (product included) at the working size, before any correction; only if it did.
    shadow: L, what the background is multiplied by; only if there is one.
    """
    layers = {
        "background": Image.fromarray(background.rgb_HW3),
        "product": Image.fromarray(cv2.merge([*cv2.split(canvas.foreground_HW3), canvas.matte_HW])),
        "mask": Image.fromarray(canvas.matte_HW),
    }
    if background.shadow.layer_HW is not None:
        layers["shadow"] = Image.fromarray(background.shadow.layer_HW)
    if background.working is not None and background.raw_HW3 is not None:
        layers["raw"] = Image.fromarray(to_bytes(background.raw_HW3[background.working.frame.content]))
    return layers


def describe_mask(product: Product) -> Json:
    """Where the mask of a product came from, for certificates."""
    return {
        "sha256": certificates.digest(product.alpha_HW),
        "file_sha256": product.mask_sha256,
        "method": product.method,
        "source": MASK_ORIGINS[product.method].about,
        "evidence": map_values(asdict, product.mask_signs),
        "confidence": round(product.confidence, 4),
        "edge": "as given" if product.matte_HW is product.alpha_HW else "hard mask, anti-aliased by 1 px",
    }

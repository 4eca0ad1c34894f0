"""One finished picture: composed, encoded, measured, with the certificate that states all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image

from packshot.generate import certificate as certificates
from packshot.generate.canvas import Canvas, Working
from packshot.generate.composite import compose, make_layers
from packshot.generate.json_types import Json
from packshot.generate.product import Product


@dataclass(frozen=True)
class Result:
    """One picture.

    image: RGB at the output's size. certificate: JSON-able, see docs of ``packshot.generate.certificate``.
    layers: ``background`` RGB, ``product`` RGBA, ``mask`` L, ``raw`` RGB (the model's own drawing, working size); none
        where they are not asked for.
    png: the encoded image that the certificate was measured on.
    """

    image: Image.Image
    certificate: Json
    layers: dict[str, Image.Image]
    png: bytes = field(repr=False)


def finish(
    product: Product,
    canvas: Canvas,
    working: Working,
    decoded_HW3: np.ndarray,
    stated: Mapping[str, Any],
    with_layers: bool,
) -> Result:
    """Compose, encode and measure one drawn picture.

    decoded_HW3: float in [0, 1] at the working size. stated: entries of the certificate that are known already: what
    was asked for, the words that were lost, and the models. with_layers: whether the result has its parts.
    """
    picture, background, fit = compose(canvas, working, decoded_HW3)
    image = Image.fromarray(picture)
    png = certificates.encode_png(picture)
    measured = certificates.measure(png, canvas)
    certificate = {
        "version": certificates.VERSION,
        "packshot": version("packshot"),
        **certificates.judge(picture, canvas, measured),
        **measured,
        "input": {"name": product.name, "sha256": product.sha256},
        "mask": describe_mask(product),
        "transform": {"decoding": list(product.decoding), **canvas.transform},
        "working_size": [working.frame.width, working.frame.height],
        "colour_fit": fit.report,
        **stated,
        "product_extension": None,  # needs a second segmentation; evaluate.py measures it
    }
    layers = make_layers(canvas, working, decoded_HW3, background) if with_layers else {}
    return Result(image, certificate, layers, png)


def describe_mask(product: Product) -> Json:
    """Where the mask of a product came from, for certificates."""
    return {
        "sha256": certificates.digest(product.alpha_HW),
        "file_sha256": product.mask_sha256,
        "method": product.method,
        "confidence": round(product.confidence, 4),
        "edge": "as given" if product.matte_HW is product.alpha_HW else "hard mask, anti-aliased by 1 px",
    }

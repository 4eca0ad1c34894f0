"""What a result proves about itself: measured on its encoded file, with a verdict and reason codes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

import cv2
import numpy as np

from packshot.errors import PackshotError
from packshot.generate.canvas import Canvas
from packshot.generate.checks import Shown, failed, run_checks
from packshot.generate.color import delta_e
from packshot.generate.json_types import Json

VERSION = 1
LAYERS = "layers"  # folder next to the pictures of a run


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in row order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file of a uint8 picture: (H, W), or (H, W, 3 or 4) in RGB order.

    OpenCV's fast level: Pillow's default takes 6 s for 12 megapixels and saves a tenth of the bytes.
    """
    if image.ndim == 3:
        code = cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
        image = cv2.cvtColor(image, code)
    done, encoded = cv2.imencode(".png", image, (cv2.IMWRITE_PNG_COMPRESSION, 1))
    if not done:
        raise PackshotError(f"a picture of {image.shape[1]}x{image.shape[0]} px cannot be written as PNG.")
    return encoded.tobytes()


def read_png(png: bytes) -> np.ndarray:
    """The pixels of an encoded picture: uint8 (H, W, 3)."""
    bgr = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None  # encode_png wrote it
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def measure(png: bytes, canvas: Canvas) -> Json:
    """Compare an encoded picture with the product on its canvas.

    ``core`` is the product where its alpha is full, less one pixel, and ``share`` what that is of the product
    (alpha >= 1/2). Its bytes are hashed in row order. ``edge`` is the
    rest of the product (alpha >= 1/2): CIEDE2000 to the photo, i.e. how much of the visible rim was recoloured when
    the old background was taken out of it.

    Raises:
        ValueError: the picture has another size than the canvas.
    """
    picture = read_png(png)
    if picture.shape != canvas.rgb_HW3.shape:
        raise ValueError(f"picture {picture.shape} and canvas {canvas.rgb_HW3.shape} differ in size")
    box = canvas.product_box  # all that is compared lies inside, and most of a large picture outside
    core = canvas.core_HW[box]
    picture = picture[box]
    photo = canvas.rgb_HW3[box]
    before = photo[core]
    after = picture[core]
    difference = cv2.absdiff(before, after) if core.any() else None
    product = canvas.matte_HW[box] >= 128
    edge = product & ~core
    shift = delta_e(picture[edge], photo[edge]) if edge.any() else np.zeros(1)
    return {
        "core": {
            "definition": "alpha 255, eroded by 1 px (3x3); RGB bytes in row order",
            "pixels": int(core.sum()),
            "product_pixels": int(product.sum()),
            "share": round(float(core.sum() / max(1, product.sum())), 4),
            "max_abs_diff": None if difference is None else int(difference.max()),
            "sha256_input": digest(before),
            "sha256_output": digest(after),
        },
        "edge": {
            "measure": "CIEDE2000 to the photo on product pixels (alpha >= 0.5) outside the core",
            "pixels": int(edge.sum()),
            "p50": round(float(np.percentile(shift, 50)), 3),
            "p95": round(float(np.percentile(shift, 95)), 3),
        },
        "output_sha256": hashlib.sha256(png).hexdigest(),
    }


def judge(
    picture_HW3: np.ndarray,
    canvas: Canvas,
    measured: Json,
    expected: Collection[str] = (),
    ignored: Collection[str] = (),
) -> Json:
    """``{"status": "accepted" | "needs_review", "reasons": [codes], "checks": {code: what was measured}}``.

    expected: codes that are not a fault here. ignored: those of ``verify.ignore``.
    """
    checks = run_checks(Shown(picture_HW3, canvas, measured), expected, ignored)
    return {**verdict([*canvas.mask_reasons, *failed(checks)]), "checks": checks}


def verdict(reasons: list[str]) -> Json:
    """The entries of a certificate that say whether anything is in doubt."""
    return {"status": "needs_review" if reasons else "accepted", "reasons": reasons}


def load_certificates(folder: Path) -> dict[str, Json]:
    """``<name>-<k>`` to certificate, for every finished picture of a run folder, ordered by name and number.

    Raises:
        PackshotError: a certificate is damaged.
    """
    stems = [match for file in folder.glob("*.json") if (match := re.fullmatch(r"(.+)-(\d+)", file.stem))]
    found = {}
    for stem in sorted(stems, key=lambda match: (match[1], int(match[2]))):
        file = folder / f"{stem[0]}.json"
        try:
            found[stem[0]] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PackshotError(f"{file} is not a certificate ({error}).", "Make the picture again.") from error
    return found

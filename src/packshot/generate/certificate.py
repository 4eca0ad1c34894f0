"""What a result proves about itself: measured on its encoded file, with a verdict and reason codes."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from packshot.errors import PackshotError
from packshot.generate.canvas import Canvas
from packshot.generate.color import delta_e

VERSION = 1
LAYERS = "layers"  # folder beside the pictures of a run
RIM = 3  # px inside the outline where a good matte may be soft
_SQUARE = np.ones((3, 3), np.uint8)


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in row order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def read_png(png: bytes) -> np.ndarray:
    """The pixels of an encoded picture: uint8 (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def measure(png: bytes, canvas: Canvas) -> dict[str, Any]:
    """Compare an encoded picture with the product on its canvas.

    ``core`` is the product where its alpha is full, less one pixel. Its bytes are hashed in row order. ``edge`` is the
    rest of the product (alpha >= 1/2): CIEDE2000 to the photo, i.e. how much of the visible rim was recoloured when
    the old background was taken out of it.

    Raises:
        ValueError: the picture has another size than the canvas.
    """
    picture = read_png(png)
    if picture.shape != canvas.rgb_HW3.shape:
        raise ValueError(f"picture {picture.shape} and canvas {canvas.rgb_HW3.shape} differ in size")
    core = canvas.core_HW
    before, after = canvas.rgb_HW3[core], picture[core]
    difference = np.abs(before.astype(np.int16) - after)
    edge = (canvas.matte_HW >= 128) & ~core
    shift = delta_e(picture[edge], canvas.rgb_HW3[edge]) if edge.any() else np.zeros(1)
    return {
        "core": {
            "definition": "alpha 255, eroded by 1 px (3x3); RGB bytes in row order",
            "pixels": int(core.sum()),
            "max_abs_diff": int(difference.max()) if core.any() else None,
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


def _background_pixels(picture_HW3: np.ndarray, canvas: Canvas) -> np.ndarray:
    return picture_HW3[cv2.dilate(canvas.matte_HW, _SQUARE) == 0]


def _flat(picture_HW3: np.ndarray, canvas: Canvas, measured: dict[str, Any]) -> bool:
    pixels = _background_pixels(picture_HW3, canvas)
    return len(pixels) > 0 and float(pixels.std(axis=0).max()) < 2.0


def _clipped(picture_HW3: np.ndarray, canvas: Canvas, measured: dict[str, Any]) -> bool:
    pixels = _background_pixels(picture_HW3, canvas)
    return len(pixels) > 0 and float(((pixels == 0) | (pixels == 255)).all(axis=-1).mean()) > 0.9


def _unchanged(picture_HW3: np.ndarray, canvas: Canvas, measured: dict[str, Any]) -> bool:
    before, after = (_background_pixels(image, canvas).astype(np.int16) for image in (canvas.rgb_HW3, picture_HW3))
    return len(before) > 0 and float(np.abs(before - after).mean()) < 2.0


def _cut(picture_HW3: np.ndarray, canvas: Canvas, measured: dict[str, Any]) -> bool:
    return canvas.transform["placement"] != "original" and bool(canvas.transform["touches_frame"])


def _see_through(picture_HW3: np.ndarray, canvas: Canvas, measured: dict[str, Any]) -> bool:
    """Whether most of the product away from its rim is not quite opaque: the new scene shines through it."""
    inside = cv2.erode((canvas.matte_HW >= 128).astype(np.uint8), _SQUARE, iterations=RIM) > 0
    return bool(inside.any()) and float((canvas.matte_HW[inside] == 255).mean()) < 0.5


# Reason code -> whether it holds for (picture, canvas, measure(...)). Any of them sends a result to review.
REASONS: dict[str, Callable[[np.ndarray, Canvas, dict[str, Any]], bool]] = {
    "core_changed": lambda picture, canvas, measured: bool(measured["core"]["max_abs_diff"]),
    "no_opaque_core": lambda picture, canvas, measured: measured["core"]["pixels"] == 0,
    "product_see_through": _see_through,
    "background_flat": _flat,
    "background_clipped": _clipped,
    "background_unchanged": _unchanged,
    "product_cut_by_photo_frame": _cut,
}


def judge(picture_HW3: np.ndarray, canvas: Canvas, measured: dict[str, Any]) -> dict[str, Any]:
    """``{"status": "accepted" | "needs_review", "reasons": [codes]}``."""
    reasons = [code for code, holds in REASONS.items() if holds(picture_HW3, canvas, measured)]
    reasons = [*canvas.mask_reasons, *reasons]
    return {"status": "needs_review" if reasons else "accepted", "reasons": reasons}


def load_certificates(folder: Path) -> dict[str, dict[str, Any]]:
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
            raise PackshotError(f"{file} is no certificate ({error}).", "Make the picture again.") from error
    return found

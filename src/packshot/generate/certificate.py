"""What a result proves about itself: measured on its encoded file, with a verdict and reason codes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import cv2
import numpy as np

from packshot.errors import PackshotError
from packshot.generate.canvas import Canvas
from packshot.generate.color import delta_e
from packshot.generate.json_types import Json

VERSION = 1
LAYERS = "layers"  # folder next to the pictures of a run
RIM = 3  # px inside the outline where a good matte may be soft
_SQUARE = np.ones((3, 3), np.uint8)


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
    before = canvas.rgb_HW3[core]
    after = picture[core]
    difference = cv2.absdiff(before, after) if core.any() else None
    edge = (canvas.matte_HW >= 128) & ~core
    shift = delta_e(picture[edge], canvas.rgb_HW3[edge]) if edge.any() else np.zeros(1)
    return {
        "core": {
            "definition": "alpha 255, eroded by 1 px (3x3); RGB bytes in row order",
            "pixels": int(core.sum()),
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


def is_flat(picture_HW3: np.ndarray, canvas: Canvas, measured: Json) -> bool:
    """Whether the background is one colour."""
    _, spread = cv2.meanStdDev(picture_HW3, mask=canvas.outside_HW)
    return bool(canvas.outside_HW.any()) and float(spread.max()) < 2.0


def is_clipped(picture_HW3: np.ndarray, canvas: Canvas, measured: Json) -> bool:
    """Whether nearly all of the background is at the ends of the range in every channel."""
    at_an_end = np.zeros(256, np.uint8)
    at_an_end[[0, 255]] = 255
    clipped_HW = canvas.outside_HW
    for channel_HW in cv2.split(cv2.LUT(picture_HW3, at_an_end)):
        clipped_HW = cv2.min(clipped_HW, channel_HW)
    total = cv2.countNonZero(canvas.outside_HW)
    return total > 0 and cv2.countNonZero(clipped_HW) > 0.9 * total


def is_unchanged(picture_HW3: np.ndarray, canvas: Canvas, measured: Json) -> bool:
    """Whether the background is still the photo's."""
    change = cv2.mean(cv2.absdiff(canvas.rgb_HW3, picture_HW3), mask=canvas.outside_HW)
    return bool(canvas.outside_HW.any()) and float(np.mean(change[:3])) < 2.0


def is_cut(picture_HW3: np.ndarray, canvas: Canvas, measured: Json) -> bool:
    return canvas.transform["placement"] != "original" and bool(canvas.transform["touches_frame"])


def is_see_through(picture_HW3: np.ndarray, canvas: Canvas, measured: Json) -> bool:
    """Whether most of the product away from its rim is not quite opaque: the new scene shines through it."""
    inside = cv2.erode((canvas.matte_HW >= 128).astype(np.uint8), _SQUARE, iterations=RIM) > 0
    return bool(inside.any()) and float((canvas.matte_HW[inside] == 255).mean()) < 0.5


# Reason code -> whether it holds for (picture, canvas, measure(...)). Any of them sends a result to review.
REASONS: dict[str, Callable[[np.ndarray, Canvas, Json], bool]] = {
    "core_changed": lambda picture, canvas, measured: bool(measured["core"]["max_abs_diff"]),
    "no_opaque_core": lambda picture, canvas, measured: measured["core"]["pixels"] == 0,
    "product_see_through": is_see_through,
    "background_flat": is_flat,
    "background_clipped": is_clipped,
    "background_unchanged": is_unchanged,
    "product_cut_by_photo_frame": is_cut,
}


def judge(picture_HW3: np.ndarray, canvas: Canvas, measured: Json, expected: Collection[str] = ()) -> Json:
    """``{"status": "accepted" | "needs_review", "reasons": [codes]}``. expected: codes that are no fault here."""
    reasons = list(canvas.mask_reasons)
    for code, holds in REASONS.items():
        if code not in expected and holds(picture_HW3, canvas, measured):
            reasons.append(code)
    return verdict(reasons)


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
            raise PackshotError(f"{file} is no certificate ({error}).", "Make the picture again.") from error
    return found

"""The file that is handed over: in the format and size that were asked for, with what that cost in exactness."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image, ImageCms

from packshot.config.output import BEST_QUALITY, FORMATS, LOWEST_QUALITY, STANDARDS, OutputConfig
from packshot.errors import PackshotError
from packshot.generate.canvas import Canvas
from packshot.generate.json_types import Json
from packshot.generate.standards import check_standard

_HEADER = 33  # bytes of a PNG file up to the end of its first chunk
_DATE = slice(24, 36)  # of an ICC profile's header (ICC.1:2022, 7.2)
_SMALLEST = 9  # PNG's highest level of compression
NO_DIFFERENCE: Json = {"core": {"max": 0, "mean": 0.0}, "overall": {"max": 0, "mean": 0.0}}  # of a file without loss


@dataclass(frozen=True)
class Delivery:
    """The file that is handed over. master: the PNG next to it, which has the same bytes where that is the file.

    report: for the certificate.
    """

    name: str
    data: bytes
    master: bytes
    report: Json


@lru_cache
def srgb_profile() -> bytes:
    """An ICC profile of sRGB. Its date is left out, so that the same picture has the same bytes on any day."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[_DATE] = bytes(12)
    return bytes(profile)


def with_profile(png: bytes) -> bytes:
    """A PNG file with the sRGB profile in an iCCP chunk (PNG, third edition, 11.3.2.3)."""
    content = b"iCCPsRGB\0\0" + zlib.compress(srgb_profile(), 9)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return png[:_HEADER] + chunk + png[_HEADER:]


def encode_jpg(picture_HW3: np.ndarray, quality: int) -> bytes:
    """JPEG with colours at full resolution: labels have fine coloured text."""
    file = io.BytesIO()
    image = Image.fromarray(picture_HW3)
    image.save(file, "JPEG", quality=quality, subsampling=0, icc_profile=srgb_profile())
    return file.getvalue()


def encode_webp(picture_HW3: np.ndarray, quality: int) -> bytes:
    """WebP with loss; its colours have half the resolution, as the format has it."""
    file = io.BytesIO()
    Image.fromarray(picture_HW3).save(file, "WEBP", quality=quality, method=4, icc_profile=srgb_profile())
    return file.getvalue()


ENCODERS: dict[str, Callable[[np.ndarray, int], bytes]] = {"jpg": encode_jpg, "webp": encode_webp}


def best_quality(encode: Callable[[int], bytes], highest: int, max_bytes: int | None) -> tuple[int, bytes] | None:
    """The highest quality whose file is small enough, by bisection, and that file; None if the lowest is too large.

    encode: a file of a quality. A file grows with its quality but for a few bytes, and what is returned does fit.
    """
    data = encode(highest)
    if max_bytes is None or len(data) <= max_bytes:
        return highest, data
    fitting = LOWEST_QUALITY
    data = encode(fitting)
    if len(data) > max_bytes:
        return None
    too_large = highest
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        candidate = encode(middle)
        if len(candidate) <= max_bytes:
            fitting = middle
            data = candidate
        else:
            too_large = middle
    return fitting, data


def smaller_png(picture_HW3: np.ndarray) -> bytes:
    """A PNG file at the highest compression, in RGB with its profile."""
    bgr = cv2.cvtColor(picture_HW3, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".png", bgr, (cv2.IMWRITE_PNG_COMPRESSION, _SMALLEST))
    return with_profile(encoded.tobytes())


def differences(picture_HW3: np.ndarray, delivered_HW3: np.ndarray, canvas: Canvas) -> Json:
    """How far the delivered pixels are from the master's, in steps of 255."""
    difference = cv2.absdiff(picture_HW3, delivered_HW3)
    core = difference[canvas.core_HW]
    return {
        "core": {"max": int(core.max(initial=0)), "mean": round(float(core.mean()) if core.size else 0.0, 4)},
        "overall": {"max": int(difference.max()), "mean": round(float(difference.mean()), 4)},
    }


def asked_output(output: OutputConfig) -> Json:
    """What was asked for, for certificates."""
    return {
        "format": output.format.name,
        "quality": output.quality,
        "max_bytes": output.max_bytes,
        "standard": output.standard.name,
    }


def too_large(output: OutputConfig, smallest: int, size: tuple[int, int]) -> PackshotError:
    """The error for a largest file that cannot be kept."""
    way = "Allow more bytes, or a smaller canvas (size with placement)"
    lossy = FORMATS[output.format.name].has_quality
    return PackshotError(
        f"output.max_bytes={output.max_bytes} cannot be kept: a {output.format} of {size[0]}x{size[1]} px has "
        f"{smallest} bytes{f' at quality {LOWEST_QUALITY}' if lossy else ''}.",
        f"{way}." if lossy else f"{way}, or set output.format=jpg.",
    )


def deliver(stem: str, picture: Image.Image, master: bytes, canvas: Canvas, output: OutputConfig) -> Delivery:
    """Encode a finished picture as it is handed over, and measure that file.

    master: its PNG file. stem: name of the files.

    Raises:
        PackshotError: the file cannot be as small as asked for.
    """
    picture_HW3 = np.asarray(picture)
    name = output.format.name
    quality = None
    data = master
    if name in ENCODERS:
        found = best_quality(
            lambda level: ENCODERS[name](picture_HW3, level), output.quality or BEST_QUALITY, output.max_bytes
        )
        if found is None:
            raise too_large(output, len(ENCODERS[name](picture_HW3, LOWEST_QUALITY)), picture.size)
        quality, data = found
    elif output.max_bytes is not None and len(master) > output.max_bytes:
        master = data = smaller_png(picture_HW3)
        if len(data) > output.max_bytes:
            raise too_large(output, len(data), picture.size)
    standard = STANDARDS.get(output.standard.name)
    # the PNG was decoded and measured a moment ago, and a second time takes a second of 12 megapixels
    delivered_HW3 = picture_HW3
    if quality is not None or standard is not None:
        delivered_HW3 = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    report: Json = {
        "file": f"{stem}.{name}",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "media_type": FORMATS[name].media_type,
        "profile": "sRGB",
        "quality": quality,
        "difference": NO_DIFFERENCE if quality is None else differences(picture_HW3, delivered_HW3, canvas),
        "standard": None,
        "asked": asked_output(output),
    }
    if standard is not None:
        report["standard"] = check_standard(output.standard.name, delivered_HW3, canvas)
    return Delivery(f"{stem}.{name}", data, master, report)

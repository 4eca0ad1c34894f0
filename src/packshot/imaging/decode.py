"""Image files as people really have them -> 8-bit RGB or RGBA in sRGB, upright; or an error that names the cause."""

from __future__ import annotations

import io
import threading
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from packshot.errors import PackshotError
from packshot.imaging import profiles
from packshot.runs.folder import log

# Content decides, never the extension. Formats that run code (EPS), have no signature (TGA) or hold no photograph
# (ICO, fonts) stay out: every decoder that can be reached is one that a stranger's file can attack.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 120_000_000
_OPENING = threading.Lock()
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


class DecodeError(PackshotError):
    """A file is not a usable image.

    reason: short code for tables (``empty_file``, ``truncated``, ``not_an_image``, …).
    measure: the value that decided, as text.
    """

    def __init__(self, message: str, reason: str, measure: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason
        self.measure = measure


def decode_image(source: Path | bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of :func:`decode` alone."""
    return decode(source, name, max_pixels)[0]


def decode(source: Path | bytes, name: str, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, list[str]]:
    """Decode a file or its bytes.

    EXIF orientation is applied, embedded colour profiles other than sRGB (and CMYK) are converted to sRGB, 16-bit
    samples are scaled to 8 bits, palettes and colour keys are resolved, animations give their first frame.

    source: a path, or the content of a file.
    name: how messages call it.
    max_pixels: larger pictures are refused before their pixels are decompressed.
    Returns: RGB, or RGBA when at least one pixel is not opaque, uint8; and what was done to the file's own pixels, in
        words, nothing for a plain 8-bit sRGB picture.
    Raises:
        DecodeError: empty, unreadable, no image, an unsupported format, too large, truncated or damaged.
    """
    data = _read(source, name)
    image = _open(data, name, max_pixels)
    width, height = image.size
    if width * height > max_pixels:
        raise DecodeError(
            f"{name} has {width}x{height} pixels, more than {max_pixels}.",
            "too_many_pixels",
            f"{width}x{height}",
            "Scale it down.",
        )
    try:
        image.load()
        return normalize(image, name, data)
    except DecodeError:
        raise
    except Exception as error:  # decoders answer damaged input with a dozen exception types
        reason = "truncated" if "truncated" in str(error).lower() or isinstance(error, EOFError) else "damaged"
        raise DecodeError(f"{name} is {reason}: {error}.", reason, str(error), "Export the image again.") from error


def normalize(image: Image.Image, name: str, data: bytes = b"") -> tuple[Image.Image, list[str]]:
    """What :func:`decode` does to an open picture of any mode. data: of its file, for what Pillow does not tell.

    Raises:
        DecodeError: its samples have no black and white.
    """
    steps: list[str] = []
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        steps.append(f"turned upright (EXIF orientation {orientation})")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        steps.append(f"the first of {frames} frames")
    encoding = profiles.own_encoding(image, data)
    plain = frames == 1 and orientation not in range(
        2, 9
    )  # a copy of 12 megapixels takes as long as a tenth of decoding
    upright = image if plain else ImageOps.exif_transpose(image)
    return _to_eight_bit(upright, name, steps, encoding), steps


def open_up_to(max_pixels: int | None, data: bytes, formats: tuple[str, ...] | None = None) -> Image.Image:
    """``Image.open`` with a limit of one's own (None: none) in place of Pillow's, which is the process's and no larger
    than 179 megapixels: beyond twice ``max_pixels`` it raises ``Image.DecompressionBombError``."""
    with _OPENING:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            return Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: itself where it is, which ``convert`` would copy."""
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_smaller(image: Image.Image, covering: tuple[int, int]) -> tuple[int, int]:
    """Let an opened JPEG be decoded at 1/2, 1/4 or 1/8 of its size, if it still covers (height, width) then.

    libjpeg leaves out the high frequencies of each block, so what would be averaged away is not decoded. Sides must be
    divisible: half of an odd one would shift the picture against its mask. Other formats stay whole.

    Returns: the whole picture's (height, width), upright.
    """
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
    width, height = image.size[::-1] if turned else image.size
    whole = (height, width)
    room = min(whole[0] / covering[0], whole[1] / covering[1])
    for part in (8, 4, 2):
        if image.format == "JPEG" and part <= room and not (whole[0] % part or whole[1] % part):
            image.draft(None, (image.width // part, image.height // part))
            break
    return whole


def flatten(image: Image.Image) -> Image.Image:
    """RGB over white. Opaque pixels keep their bytes; colours hidden under alpha 0 vanish."""
    if image.mode != "RGBA":
        return as_rgb(image)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _read(source: Path | bytes, name: str) -> bytes:
    if isinstance(source, Path):
        try:
            source = source.read_bytes()
        except OSError as error:
            raise DecodeError(f"{name} cannot be read: {error.strerror}.", "unreadable", str(error.strerror)) from error
    if not source:
        raise DecodeError(f"{name} is empty (0 bytes).", "empty_file", "0 bytes", "Copy or export it again.")
    return source


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    heif = data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS
    if heif and not _reads_heif():
        raise DecodeError(
            f"{name} is a HEIC/HEIF image, which needs the package pillow-heif.",
            "unsupported_format",
            "HEIC",
            "pip install 'packshot[heic]', or convert it to JPEG or PNG (heif-convert).",
        )
    try:
        return open_up_to(max_pixels, data, ("HEIF",) if heif else FORMATS)
    except Image.DecompressionBombError as error:
        raise DecodeError(
            f"{name} has more than {max_pixels} pixels.", "too_many_pixels", str(error), "Scale it down."
        ) from error
    except Exception as error:  # an unknown signature, or a known one before a broken header
        raise DecodeError(
            f"{name} is not an image in a known format (it starts with {data[:12]!r}).",
            "not_an_image",
            repr(data[:12]),
            f"Supported: {', '.join(FORMATS)}.",
        ) from error


@cache
def _reads_heif() -> bool:
    """Whether the extra for HEIC is installed; it registers itself with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _to_eight_bit(
    image: Image.Image, name: str, steps: list[str], encoding: profiles.Encoding | str | None
) -> Image.Image:
    """RGB or RGBA; appends to ``steps`` what was done."""
    if is_high_depth(image):
        steps.append("16 bits to 8 per channel")
        return Image.fromarray(high_depth_to_uint8(image, name)).convert("RGB")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        grey = profile is not None and profiles.profile_mode(profile) == "L"
        colour = _to_srgb(rgba.convert("L" if grey and image.mode == "LA" else "RGB"), profile, name, steps, encoding)
        if alpha.getextrema() == (255, 255):
            return colour
        colour.putalpha(alpha)
        return colour
    return _to_srgb(image if image.mode in ("CMYK", "L") else as_rgb(image), profile, name, steps, encoding)


def is_high_depth(image: Image.Image) -> bool:
    """Whether its samples have more than 8 bits. Pillow's own conversion of them clips at 255."""
    return image.mode.startswith("I") or image.mode == "F"


def high_depth_to_uint8(image: Image.Image, name: str) -> np.ndarray:
    """(H, W) grey samples of 16 bits (in any integer mode of Pillow) as uint8.

    Raises:
        DecodeError: samples that are not whole numbers from 0 to 65535.
    """
    grey_HW = np.asarray(image)
    if image.mode == "F" or grey_HW.min() < 0 or grey_HW.max() > 65535:
        span = f"{image.mode}: {grey_HW.min():g} to {grey_HW.max():g}"
        raise DecodeError(
            f"{name} has samples that no rule maps to black and white ({span}).",
            "unsupported_depth",
            span,
            "Export it with 8 or 16 bits per channel.",
        )
    return np.round(grey_HW.astype(np.float32) / 257.0).astype(np.uint8)


def _to_srgb(
    image: Image.Image, profile: bytes | None, name: str, steps: list[str], encoding: profiles.Encoding | str | None
) -> Image.Image:
    """RGB in sRGB: by the file's other notes on colour, else through its profile, else by the plain conversion.

    A profile that does nothing to colours leaves the picture's bytes alone. One for another number of channels (a grey
    one left in an RGB file) does not describe these pixels.
    """
    if isinstance(encoding, str):
        steps.append(encoding)
        return as_rgb(image)
    if encoding is not None:
        steps.append(f"from {encoding.name} to sRGB")
        return profiles.from_encoding(as_rgb(image), encoding)
    try:
        if profile and profiles.profile_mode(profile) == image.mode and profiles.changes_colors(profile, image.mode):
            converted = profiles.through_profile(image, profile)
            steps.append(f"from {profiles.description(profile)} to sRGB")
            return converted
    except (OSError, ImageCms.PyCMSError) as error:
        steps.append(f"colour profile damaged, {profiles.READ_AS_SRGB}")
        log.warning("%s: its colour profile is damaged (%s); read as sRGB", name, error)
        return as_rgb(image)
    if image.mode == "CMYK":
        steps.append("CMYK to RGB without a colour profile")
    return as_rgb(image)

"""From a file's own colours to sRGB: by its ICC profile, cICP chunk, gamma or Exif note, judged by what it does."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms

# 255ths: profiles of sRGB by several makers differ by less. What stays below changes no picture, and keeps its bytes.
SAME = 3
READ_AS_SRGB = "read as sRGB"  # how remarks end on colours that are left as they are
UNCALIBRATED = 0xFFFF  # Exif ColorSpace: some space that a profile should name
_SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # the data colour space of an ICC header (ICC.1:2022, 7.2.8)
# Chromaticities (x, y) of red, green, blue and white, by their number in ITU-T H.273.
_D65 = (0.3127, 0.3290)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
_PRIMARIES = {
    1: _SRGB,
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
}
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), _D65)
_ADOBE_GAMMA = 563 / 256
# Transfer functions of the same table that are a power of the signal, by their exponent; 0 stands for sRGB's curve.
_EXPONENTS = {1: 0.0, 4: 2.2, 5: 2.8, 6: 0.0, 8: 1.0, 13: 0.0, 14: 0.0, 15: 0.0}


@dataclass(frozen=True)
class Encoding:
    """Colours of a file without a profile. exponent: signal to light; 0: sRGB's curve."""

    name: str
    primaries: tuple[tuple[float, float], ...]
    exponent: float


def own_encoding(image: Image.Image, data: bytes = b"") -> Encoding | str | None:
    """The colour encoding that a file states without an ICC profile; a text where it cannot be converted; None: sRGB.

    A PNG's cICP chunk comes first; gAMA and cHRM count only where nothing else does, as the PNG standard has it.
    """
    if chunk := png_chunk(data, b"cICP"):
        primaries, transfer = chunk[0], chunk[1]
        if primaries not in _PRIMARIES or transfer not in _EXPONENTS:
            return f"cICP colours {primaries}/{transfer} (HDR or rare), {READ_AS_SRGB}"
        return encoding_unless_srgb("cICP", _PRIMARIES[primaries], _EXPONENTS[transfer])
    if image.info.get("icc_profile") or "srgb" in image.info:
        return None
    if image.format == "PNG" and image.info.get("gamma"):
        exponent = 1 / float(image.info["gamma"])
        known = image.info.get("chromaticity")
        primaries = _SRGB
        if known:
            white, red, green, blue = zip(known[:8:2], known[1:8:2], strict=True)
            primaries = (red, green, blue, white)
        close = abs(exponent - 2.2) < 0.05  # the gamma that stands for sRGB's curve
        return encoding_unless_srgb("gAMA", primaries, 0.0 if close else exponent)
    exif = image.getexif()
    if exif.get_ifd(ExifTags.IFD.Interop).get(1) == "R03":
        return Encoding("Exif R03 (Adobe RGB)", _ADOBE, _ADOBE_GAMMA)
    if exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace) == UNCALIBRATED:
        return f"Exif calls its colours uncalibrated, {READ_AS_SRGB}"
    return None


def encoding_unless_srgb(name: str, primaries: tuple[tuple[float, float], ...], exponent: float) -> Encoding | None:
    """The encoding, or None where it is sRGB within rounding."""
    same = np.abs(np.array(primaries) - np.array(_SRGB)).max() < 0.002
    return None if same and exponent == 0 else Encoding(name, primaries, exponent)


def png_chunk(data: bytes, name: bytes) -> bytes | None:
    """The content of the first chunk of that name in front of the pixels of a PNG."""
    position = 8
    while data.startswith(b"\x89PNG") and position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind == name:
            return data[position + 8 : position + 8 + length]
        if kind == b"IDAT":
            return None
        position += 12 + length
    return None


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """(3, 3) from linear RGB of these primaries to XYZ, white at Y = 1."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    weights = np.linalg.solve(columns[:, :3], columns[:, 3])
    return columns[:, :3] * weights


def from_encoding(image: Image.Image, encoding: Encoding) -> Image.Image:
    """An RGB image in another encoding, as sRGB."""
    signal = np.arange(256, dtype=np.float64) / 255
    light = srgb_light(signal) if encoding.exponent == 0 else signal**encoding.exponent
    linear_HWC = light.astype(np.float32)[np.asarray(image)]
    matrix = np.linalg.solve(to_xyz(_SRGB), to_xyz(encoding.primaries))
    linear_HWC = np.clip(cv2.transform(linear_HWC, matrix.astype(np.float32)), 0, 1)
    low_HWC = linear_HWC * 12.92
    high_HWC = 1.055 * np.power(linear_HWC, 1 / 2.4, dtype=np.float32) - 0.055
    return Image.fromarray(np.rint(np.where(linear_HWC <= 0.0031308, low_HWC, high_HWC) * 255).astype(np.uint8))


def srgb_light(signal: np.ndarray) -> np.ndarray:
    """Linear light of sRGB signals in [0, 1] (IEC 61966-2-1)."""
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def profile_mode(profile: bytes) -> str | None:
    """The mode of the pictures that a profile is for: RGB, L or CMYK."""
    return _SPACES.get(profile[16:20])


def probe(mode: str) -> Image.Image:
    """A few colours of a mode: the corners, edges and inside of its cube, or a ramp of grey."""
    if mode == "L":
        return Image.fromarray(np.arange(0, 256, 5, dtype=np.uint8)[None])
    steps = np.array([0, 8, 26, 51, 102, 153, 204, 255], np.uint8)  # dark ones too: there gamma 2.2 leaves sRGB
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    return Image.fromarray(np.ascontiguousarray(grid))


@lru_cache(maxsize=32)
def changes_colors(profile: bytes, mode: str) -> bool:
    """Whether a profile makes other colours of a few than sRGB does. Its name does not count.

    Raises:
        OSError, ImageCms.PyCMSError: the profile is damaged.
    """
    if mode == "CMYK":
        return True
    colors = probe(mode)
    seen = np.asarray(through_profile(colors, profile), np.int16)
    return bool(np.abs(seen - np.asarray(colors.convert("RGB"), np.int16)).max() > SAME)


def through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """The image as sRGB, RGB, by its profile.

    Raises:
        OSError, ImageCms.PyCMSError: the profile is damaged.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # only None for inPlace=True
    return converted


def description(profile: bytes) -> str:
    """The name that a profile gives itself, for messages."""
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).strip()
    except (OSError, ImageCms.PyCMSError):
        return "its profile"

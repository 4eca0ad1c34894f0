"""A product photo made ready: decoded, its mask found and checked, its edge un-mixed from the old background."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

import cv2
import numpy as np
from PIL import Image

from packshot.config.conditions import INPUTS
from packshot.config.schema import MatteConfig
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.decode import decode, flatten, normalize
from packshot.imaging.mask_doubt import Measured
from packshot.imaging.masks import find_mask
from packshot.imaging.matte import soften_hard_edge, unmix
from packshot.imaging.pixels import to_bytes
from packshot.lists import map_values, without
from packshot.runs.files import file_sha256, readable

MIN_SIDE = 32
_SQUARE = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Photo:
    """A decoded picture (RGB or RGBA), the SHA-256 of its file (of its pixels, when it came from memory), and what
    decoding did to its pixels, in words."""

    image: Image.Image
    sha256: str
    decoding: tuple[str, ...] = ()


Source = str | Path | Image.Image | Photo


@dataclass(frozen=True)
class MaskOrigin:
    """Where a mask came from.

    about: in words, for certificates. given: by a person, so a fault of it is a wrong input. cut_out: it is the
    photograph's own alpha. Then what lies under it is the photograph's, and glass may be clear everywhere.
    """

    about: str
    given: bool = False
    cut_out: bool = False


# By the method of a mask.
MASK_ORIGINS = {
    "file": MaskOrigin("a mask file that was given", given=True),
    "alpha": MaskOrigin("the photograph's own alpha channel", cut_out=True),
    "onnx": MaskOrigin("the network of matte.model alone"),
    "network": MaskOrigin("the shipped network, its outline refined by the colours"),
    "grabcut": MaskOrigin("the colours alone, from what stands out of the picture"),
}


@dataclass(frozen=True)
class Product:
    """A photo with its product told apart.

    rgb_HW3: the photo, uint8. alpha_HW: the mask as given or found, uint8, 255 = product.
    matte_HW: the alpha that compositing uses: alpha_HW, with a one-pixel soft edge where the mask had none.
    foreground_HW3: the product's own colours, uint8; equals the photo wherever matte_HW is 255.
    method, confidence: where the mask came from, a key of ``MASK_ORIGINS``, and how sure that is.
    mask_reasons: codes of what speaks against the mask, see ``imaging.mask_doubt``.
    mask_signs, mask_ways: the numbers behind them, and other masks that were found, see ``imaging.masks.Mask``.
    sha256, mask_sha256: of the files of the photo and, where one was given, of the mask (see :func:`open_image`).
    decoding: what was done to the file's own pixels before, in words.
    inputs: what else control maps are drawn from, uint8 (H, W), by name (see ``config.conditions.INPUTS``).
    """

    name: str
    rgb_HW3: np.ndarray
    alpha_HW: np.ndarray
    matte_HW: np.ndarray
    foreground_HW3: np.ndarray
    method: str
    confidence: float
    sha256: str
    mask_reasons: tuple[str, ...] = ()
    decoding: tuple[str, ...] = ()
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    mask_sha256: str | None = None
    mask_signs: Mapping[str, Measured] = field(default_factory=dict)
    mask_ways: Mapping[str, np.ndarray] = field(default_factory=dict)


def open_image(key: str, source: Source) -> Photo:
    """Decode a file, or bring a picture in memory to the same form; a Photo is returned as it is.

    Raises:
        ConfigError: names ``key`` when the file is missing, not readable or not an image.
    """
    if isinstance(source, Photo):
        return source
    try:
        if isinstance(source, Image.Image):
            image, steps = normalize(source.copy(), "the picture")  # the caller's own is theirs to change
            return Photo(image, hashlib.sha256(np.ascontiguousarray(source).tobytes()).hexdigest(), tuple(steps))
        path = readable(key, source)
        if path.is_dir():
            raise ConfigError(f"{key}={source} is a folder, an image file is needed.")
        image, steps = decode(path, str(source))
        return Photo(image, file_sha256(path), tuple(steps))
    except ConfigError:
        raise
    except PackshotError as error:
        named = key if isinstance(source, Image.Image) else f"{key}={source}"
        raise ConfigError(f"{named} is not a usable image: {error.args[0]}", error.hint) from error


def prepare(
    image: Source,
    mask: Source | None = None,
    matte: MatteConfig | None = None,
    name: str = "product",
    inputs: Mapping[str, Source] | None = None,
    networks: Mapping[str, str] | None = None,
) -> Product:
    """Decode, find or check the mask, un-mix the edge.

    inputs: pictures of the photo's size that control maps are drawn from, by name (``depth``: near is bright).
    networks: those that estimate an input where it is not given, by the input's name.

    Raises:
        ConfigError: a file is missing or not an image; the mask has another size, is empty or leaves no background.
        PackshotError: no mask was given and no product is found.
    """
    opened = open_image("product", image)
    photo = opened.image
    if min(photo.size) < MIN_SIDE:
        raise ConfigError(
            f"product: {name} is {photo.width}x{photo.height} px.", f"Each side needs at least {MIN_SIDE} px."
        )
    given = None if mask is None else open_alike("mask", mask, photo, name)
    pictures = {key: open_alike(key, source, photo, name).image for key, source in (inputs or {}).items()}
    found = find_mask(photo, matte or MatteConfig(), given and given.image, name)
    alpha = to_bytes(found.alpha_HW)
    check_alpha(alpha, name, found.method)
    # Under a cut-out's own alpha lies what it was cut out of, which shows how its edge was mixed. Under a mask from
    # elsewhere transparent pixels may count as product, and those have no colour but the white they are shown over.
    rgb = np.ascontiguousarray(photo.convert("RGB") if MASK_ORIGINS[found.method].cut_out else flatten(photo))
    soft = soften_hard_edge(alpha)
    pictures |= estimated(rgb, without(networks or {}, *pictures))
    return Product(
        name=name,
        rgb_HW3=rgb,
        alpha_HW=alpha,
        matte_HW=soft,
        foreground_HW3=unmix(rgb, soft),
        method=found.method,
        confidence=float(found.confidence),
        mask_reasons=found.reasons,
        mask_signs=found.signs,
        mask_ways=found.ways,
        sha256=opened.sha256,
        mask_sha256=given.sha256 if given else None,
        decoding=opened.decoding,
        inputs=map_values(lambda picture: np.asarray(picture.convert("L")), pictures),
    )


def estimated(rgb_HW3: np.ndarray, networks: Mapping[str, str]) -> dict[str, Image.Image]:
    """The inputs of control maps that networks estimate from a photo. networks: by the input's name."""
    found: dict[str, Image.Image] = {}
    for key, path in networks.items():
        network = INPUTS[key].network
        if network is not None:
            found[key] = resolve_name(network.estimate)(Image.fromarray(rgb_HW3), path)
    return found


def open_alike(key: str, source: Source, photo: Image.Image, name: str) -> Photo:
    """A picture that belongs to the photo, pixel by pixel."""
    opened = open_image(key, source)
    picture = opened.image
    if picture.size != photo.size:
        raise ConfigError(
            f"{key} is {picture.width}x{picture.height} px, the photo {name} is {photo.width}x{photo.height} px.",
            f"Give a {key} of the photo's size; it is not resized, because that would move its edge.",
        )
    return opened


def check_alpha(alpha_HW: np.ndarray, name: str, method: str) -> None:
    """Raises an error where a mask marks nothing, or everything: a ConfigError if a person gave it."""
    origin = MASK_ORIGINS[method]
    kind = ConfigError if origin.given else PackshotError
    source = "the given mask" if origin.given else f"the mask found ({method})"
    share = float((alpha_HW >= 128).mean())
    marked = alpha_HW.any() if origin.cut_out else share > 0
    if not marked:
        raise kind(f"product: {source} of {name} is empty (all black).", "White marks the product.")
    if share > 0.995:
        raise kind(
            f"product: {source} of {name} covers the whole picture.",
            "White marks the product, black the background that is replaced.",
        )


def core_of(alpha_HW: np.ndarray) -> np.ndarray:
    """Bool (H, W): pixels with alpha 255 whose eight neighbours have it too. The picture's border does not erode."""
    return cv2.erode((alpha_HW == 255).astype(np.uint8), _SQUARE).astype(bool)

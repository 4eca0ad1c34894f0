"""Several products in one picture: their cut-outs side by side on one line, each with its own pixels."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from packshot.config.schema import MatteConfig
from packshot.errors import ConfigError, PackshotError
from packshot.generate.certificate import digest, encode_png
from packshot.generate.product import Photo, Product, prepare
from packshot.imaging.matte import covered_box
from packshot.runs.files import replacing_file, sha256

GAP = 0.06  # of the tallest product's height, between two products
ROOM = 0.25  # of that height, around all of them
_MADE: dict[str, Group] = {}


@dataclass(frozen=True)
class CutOut:
    """Several products side by side.

    picture_HW4: uint8, RGBA. reasons: what speaks against the masks of the products. parts: where each product comes
    from, in words, for certificates.
    """

    picture_HW4: np.ndarray
    reasons: tuple[str, ...]
    parts: tuple[str, ...]

    @property
    def photo(self) -> Photo:
        """The cut-out as a photograph of one product, with the hash of its PNG file."""
        return Photo(Image.fromarray(self.picture_HW4), sha256(encode_png(self.picture_HW4)))


@dataclass(frozen=True)
class Group:
    """A cut-out as a file, which lasts as long as this process. reasons, parts: as of :class:`CutOut`."""

    file: Path
    reasons: tuple[str, ...]
    parts: tuple[str, ...]


def as_group(product: Product, group: CutOut | Group) -> Product:
    """What was prepared from a cut-out, with the doubts about its parts, and with where they come from."""
    return replace(product, mask_reasons=(*group.reasons, *product.mask_reasons), decoding=group.parts)


def cut_out_file(product: Product) -> bytes:
    """The PNG file of the cut-out that a group was prepared from; its certificate's ``input.sha256`` is that file's."""
    return encode_png(np.dstack([product.rgb_HW3, product.alpha_HW]))


def side_by_side(products: list[Product], most_pixels: int | None) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The products in a row, their feet on one line: uint8 (H, W, 4), and left, top of each one's box in px.

    No pixel is resampled, so the products have the sizes to each other that their photographs give them.

    Raises:
        PackshotError: the picture would have more than ``most_pixels``.
    """
    boxes = [product.matte_HW[covered_box(product.matte_HW)].shape for product in products]
    tallest = max(height for height, _ in boxes)
    gap = max(2, round(GAP * tallest))
    room = max(2, round(ROOM * tallest))
    width = sum(width for _, width in boxes) + gap * (len(boxes) - 1) + 2 * room
    height = tallest + 2 * room
    if most_pixels is not None and width * height > most_pixels:
        raise PackshotError(
            f"together=true: the products make a picture of {width}x{height} px; at most {most_pixels} pixels are "
            "allowed.",
            "Send smaller photos, or fewer products.",
        )
    picture = np.zeros((height, width, 4), np.uint8)
    corners = []
    left = room
    for product, (box_height, box_width) in zip(products, boxes, strict=True):
        box = covered_box(product.matte_HW)
        top = room + tallest - box_height
        place = picture[top : top + box_height, left : left + box_width]
        place[..., :3] = product.foreground_HW3[box]
        place[..., 3] = product.matte_HW[box]
        corners.append((left, top))
        left += box_width + gap
    return picture, corners


def cut_out(products: list[Product], most_pixels: int | None = None) -> CutOut:
    """Prepared products as one; the same ones give the same bytes. Raises PackshotError: see :func:`side_by_side`."""
    picture, corners = side_by_side(products, most_pixels)
    parts = []
    for product, (left, top) in zip(products, corners, strict=True):
        parts.append(f"{product.name} (SHA-256 {product.sha256}) with its own pixels at {left},{top}")
    reasons = chain.from_iterable(product.mask_reasons for product in products)
    return CutOut(picture, tuple(dict.fromkeys(reasons)), tuple(parts))


@lru_cache
def group_folder() -> Path:
    """The folder for pictures of groups; it is deleted at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="packshot-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def make_group(files: list[Path], masks: dict[Path, Path | None], matte: MatteConfig) -> Group:
    """All products as one. The same photographs and masks give the same bytes.

    Raises:
        ConfigError: there is only one product, or a photo or its mask cannot be used.
        PackshotError: no product is found on one of them.
    """
    if len(files) < 2:
        raise ConfigError(
            f"together=true needs several products, and product={files[0]} is one.",
            "Name a folder with a photo of each, or leave out together.",
        )
    pairs = [(file, masks[file]) for file in files]
    asked = repr((pairs, matte))
    if asked not in _MADE:  # rows of a campaign ask for the same group
        _MADE[asked] = write_group(pairs, matte)
    return _MADE[asked]


def write_group(pairs: list[tuple[Path, Path | None]], matte: MatteConfig) -> Group:
    """:func:`make_group`. pairs: the photo of each product and its mask."""
    whole = cut_out([prepare(file, mask, matte, file.name) for file, mask in pairs])
    target = group_folder() / f"{digest(whole.picture_HW4)[:16]}.png"
    with replacing_file(target) as temporary:
        temporary.write_bytes(encode_png(whole.picture_HW4))
    return Group(target, whole.reasons, whole.parts)

"""Several products in one picture: their cut-outs side by side on one line, each with its own pixels."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from packshot.config.schema import MatteConfig
from packshot.errors import ConfigError
from packshot.generate.certificate import digest, encode_png
from packshot.generate.product import Product, prepare
from packshot.imaging.matte import covered_box
from packshot.runs.files import replacing_file

GAP = 0.06  # of the tallest product's height, between two products
ROOM = 0.25  # of that height, around all of them
_MADE: dict[str, Group] = {}


@dataclass(frozen=True)
class Group:
    """A cut-out of several products.

    file: the picture, RGBA; it lasts as long as this process. reasons: what speaks against the masks of the products.
    parts: where each product comes from, in words, for certificates.
    """

    file: Path
    reasons: tuple[str, ...]
    parts: tuple[str, ...]


def side_by_side(products: list[Product]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The products in a row, their feet on one line: uint8 (H, W, 4), and left, top of each one's box in px.

    No pixel is resampled, so the products have the sizes to each other that their photographs give them.
    """
    boxes = [product.matte_HW[covered_box(product.matte_HW)].shape for product in products]
    tallest = max(height for height, _ in boxes)
    gap = max(2, round(GAP * tallest))
    room = max(2, round(ROOM * tallest))
    width = sum(width for _, width in boxes) + gap * (len(boxes) - 1) + 2 * room
    picture = np.zeros((tallest + 2 * room, width, 4), np.uint8)
    corners = []
    left = room
    for product, (height, box_width) in zip(products, boxes, strict=True):
        box = covered_box(product.matte_HW)
        top = room + tallest - height
        place = picture[top : top + height, left : left + box_width]
        place[..., :3] = product.foreground_HW3[box]
        place[..., 3] = product.matte_HW[box]
        corners.append((left, top))
        left += box_width + gap
    return picture, corners


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
    products = [prepare(file, mask, matte, file.stem) for file, mask in pairs]
    picture, corners = side_by_side(products)
    target = group_folder() / f"{digest(picture)[:16]}.png"
    with replacing_file(target) as temporary:
        temporary.write_bytes(encode_png(picture))
    parts = []
    for (file, _), product, (left, top) in zip(pairs, products, corners, strict=True):
        parts.append(f"{file.name} (SHA-256 {product.sha256}) with its own pixels at {left},{top}")
    reasons = [reason for product in products for reason in product.mask_reasons]
    return Group(target, tuple(dict.fromkeys(reasons)), tuple(parts))

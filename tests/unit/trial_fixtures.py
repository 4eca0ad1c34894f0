"""Items and pictures with known faults for tests of evaluate.py items=..."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from packshot.evaluate.items import Item, Unpacked, write_items
from packshot.generate.composite import blend

SIDE = 160


def pattern(seed, low, high, grain=6):
    """A textured picture between two grey levels, uint8 (SIDE, SIDE, 3)."""
    coarse = np.random.default_rng(seed).integers(low, high, (SIDE // grain, SIDE // grain, 3)).astype(np.uint8)
    return cv2.resize(coarse, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


@dataclass
class Made:
    """One item with the layers that it was composed from."""

    mask_HW: np.ndarray
    product_HW3: np.ndarray
    plate_HW3: np.ndarray
    shadow_HW: np.ndarray

    def compose(self, dx=0, shadow=True):
        """The product, moved by dx px, in its scene."""
        mask = np.roll(self.mask_HW, dx, 1)
        product = np.roll(self.product_HW3, dx, 1)
        shade = np.roll(self.shadow_HW, dx, 1) if shadow else np.full_like(self.shadow_HW, 255)
        ground = np.rint(self.plate_HW3 * (shade[..., None] / 255.0)).astype(np.uint8)
        return blend(product, mask, ground)

    def photo(self):
        return blend(self.product_HW3, self.mask_HW, np.full_like(self.product_HW3, 240))


def made(seed=0):
    """A product with a soft edge, on a textured ground, with a shadow to its right."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.rectangle(mask, (58, 40), (98, 110), 255, -1)
    cv2.ellipse(mask, (78, 110), (20, 8), 0, 0, 360, 255, -1)
    mask = cv2.GaussianBlur(mask, (3, 3), 0)
    product = pattern(seed, 30, 90)
    product[..., 0] += 120
    plate = pattern(seed + 100, 150, 215, grain=12)
    plate[..., 0] -= 70
    dark = np.zeros((SIDE, SIDE), np.float32)
    cv2.ellipse(dark, (92, 114), (36, 10), 0, 0, 360, 0.7, -1)
    shadow = np.rint(255 * (1 - cv2.GaussianBlur(dark, (0, 0), 3))).astype(np.uint8)
    return Made(mask, product, plate, shadow)


def with_label(item):
    """A round part of the product's core has another colour."""
    picture = item.compose()
    depth = cv2.distanceTransform(np.uint8(item.mask_HW == 255), cv2.DIST_L2, 5)
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    y_HW, x_HW = np.indices(depth.shape)
    label = np.hypot(y_HW - y, x_HW - x) < max(2, 0.7 * depth.max())
    picture[label] = picture[label][:, [2, 0, 1]] // 2 + 60
    return picture


def with_handle(item):
    """The product has grown on its left side, in its own colours."""
    rows, columns = np.nonzero(item.mask_HW >= 128)
    height = int(np.ptp(rows)) + 1
    y = int(rows.min()) + height // 3
    x = int(columns[rows == y].min())
    handle = np.zeros_like(item.mask_HW)
    cv2.ellipse(handle, (x, y), (max(4, height // 4), max(4, height // 5)), 0, 0, 360, 255, -1)
    grain = np.random.default_rng(0).normal(0, 6, item.product_HW3.shape)
    colours = np.clip(item.product_HW3[item.mask_HW >= 200].mean(axis=0) + grain, 0, 255).astype(np.uint8)
    behind = np.where((handle > 0)[..., None], colours, item.compose())
    return blend(item.product_HW3, item.mask_HW, behind)


def moved(item):
    """The product stands an eighth of its height further left, with its shadow."""
    rows, columns = np.nonzero(item.mask_HW >= 128)
    distance = max(4, (int(np.ptp(rows)) + 1) // 8)
    return item.compose(dx=-distance if columns.min() >= distance else distance)


# Edit -> (the picture, the measure that is its own)
EDITS = {
    "recoloured label": (with_label, "core_delta_e"),
    "grown handle": (with_handle, "growth"),
    "moved product": (moved, "shift"),
    "removed shadow": (lambda item: item.compose(shadow=False), "shadow_error"),
}


def write_made(folder: Path, count: int) -> tuple[list[Item], list[Made]]:
    """Items on the disk, and what they are made of."""
    several = [made(seed) for seed in range(count)]
    unpacked = []
    for number, item in enumerate(several):
        pictures = {
            "photo": item.photo(),
            "mask": item.mask_HW,
            "truth": item.compose(),
            "plate": item.plate_HW3,
            "shadow": item.shadow_HW,
            "reference": item.plate_HW3,
        }
        images = {name: Image.fromarray(array) for name, array in pictures.items()}
        unpacked.append(Unpacked(f"item{number}", "an object on a white marble table", images))
    return write_items(unpacked, folder), several


def write_pictures(folder: Path, pictures: dict[str, np.ndarray], ending="png", **options) -> Path:
    """Pictures as files named after their items."""
    folder.mkdir(parents=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.{ending}", **options)
    return folder

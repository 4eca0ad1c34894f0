"""What systems were asked for: photograph, mask and, where they are known, the words and the true picture."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from packshot.dataset.rows import Rows, load_rows
from packshot.dataset.text_files import read_records
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.decode import decode_image, flatten

TABLE = "items.csv"
# Columns of a table that name pictures, with what each is for. The first two are needed.
PICTURES = {
    "photo": "the photograph of the product",
    "mask": "where the product is (white)",
    "truth": "the picture that was wanted, such as a render",
    "plate": "the wanted scene without the product",
    "shadow": "what the product's shadow leaves of the plate's light (white: no shadow)",
    "reference": "the picture whose look was asked for",
}
NEEDED = ("photo", "mask")


@dataclass(frozen=True)
class Item:
    """One product that every system puts into a scene. pictures: files by the names of :data:`PICTURES`."""

    id: str
    text: str
    pictures: Mapping[str, Path]

    def read(self, name: str, mode: str = "RGB") -> np.ndarray | None:
        """A picture as uint8 (H, W[, 3]), or None where the item has none of this name.

        Raises:
            PackshotError: the file is missing or damaged.
        """
        if name not in self.pictures:
            return None
        image = decode_image(self.pictures[name], f"{self.id}: {name}")
        if mode == "L" and image.mode == "RGBA" and not np.ptp(np.asarray(image.convert("L"))):
            return np.asarray(image.getchannel("A"))  # a mask that lies in the alpha of an even picture
        return np.asarray((flatten(image) if image.mode == "RGBA" else image).convert(mode))

    def read_alike(self, name: str, mode: str = "RGB") -> np.ndarray | None:
        """:meth:`read`, of a picture that has the photograph's size. Raises PackshotError where it has another one."""
        found = self.read(name, mode)
        photo_HW3 = self.read("photo")
        if found is not None and photo_HW3 is not None and found.shape[:2] != photo_HW3.shape[:2]:
            raise PackshotError(
                f"items: {name} of {self.id} has another size than its photo.", "Bring them to one size."
            )
        return found

    def photo_and_mask(self) -> tuple[np.ndarray, np.ndarray]:
        """The photograph, uint8 (H, W, 3), and its mask, uint8 (H, W).

        Raises:
            PackshotError: a file is missing or damaged, the two differ in size, or the mask is empty.
        """
        photo_HW3 = self.read("photo")
        mask_HW = self.read("mask", "L")
        assert photo_HW3 is not None  # open_items() has seen both
        assert mask_HW is not None
        if photo_HW3.shape[:2] != mask_HW.shape:
            raise PackshotError(
                f"items: the mask of {self.id} has another size than its photo.", "Give a mask of the photo's size."
            )
        if mask_HW.max() < 128:
            raise PackshotError(
                f"items: the mask of {self.id} is empty: its largest value is {mask_HW.max()} of 255.",
                "White (255) marks the product.",
            )
        return photo_HW3, mask_HW


def open_items(path: Path, unpacked: Path) -> list[Item]:
    """The items of a table (.csv, .jsonl), or of a product set (a folder of shards), ordered by id.

    unpacked: folder into which a product set's pictures are written, because systems and reports read files.

    Raises:
        ConfigError: a column or a file is missing, or an id stands twice.
    """
    if path.is_dir() and not (path / TABLE).exists():
        rows = load_rows("items", str(path))
        rows.refuse_without("items", ("mask",))
        return write_items(set_items(rows), unpacked)
    table = path / TABLE if path.is_dir() else path
    items: dict[str, Item] = {}
    for number, record in enumerate(read_records(table, "items"), 1):
        item = read_item(record, number, table)
        if item.id in items:
            raise ConfigError(
                f"items: {table} has the id {item.id} more than once.", "Give every item an id of its own."
            )
        items[item.id] = item
    if not items:
        raise ConfigError(f"items: {table} has no rows.", f"Each row names {', '.join(NEEDED)} under an id.")
    return [items[name] for name in sorted(items)]


def read_item(record: Mapping[str, object], number: int, table: Path) -> Item:
    """A row of a table, by its number; paths are relative to the table.

    Raises:
        ConfigError: a column or a file is missing.
    """
    given = {name: str(value).strip() for name, value in record.items() if value not in (None, "")}
    for name in ("id", *NEEDED):
        if name not in given:
            raise ConfigError(
                f"items: row {number} of {table} has no {name}.",
                f"The columns id, {', '.join(NEEDED)} must be filled in. The table has {', '.join(record)}.",
            )
    pictures = {name: table.parent / given[name] for name in PICTURES if name in given}
    for name, file in pictures.items():
        if not file.is_file():
            raise ConfigError(f"items: {table} names {file} as {name}, and there is no such file.", "Check the path.")
    return Item(unicodedata.normalize("NFC", given["id"]), given.get("text") or given.get("prompt", ""), pictures)


@dataclass(frozen=True)
class Unpacked:
    """An item whose pictures are still in memory."""

    id: str
    text: str
    pictures: Mapping[str, Image.Image]


def set_items(rows: Rows) -> Iterable[Unpacked]:
    """The rows of a product set. Their pictures are the photographs; what should come of them is not known."""
    for index in range(len(rows)):
        row = rows.read(index, ("image", "mask"))
        yield Unpacked(row["id"], row["text"] or "", {"photo": row["image"], "mask": row["mask"]})


def by_ids(items: Iterable[Item]) -> dict[str, Item]:
    """The items by their ids."""
    return {item.id: item for item in items}


def write_items(items: Iterable[Unpacked], folder: Path) -> list[Item]:
    """Write items as PNG files with their table, and return them ordered by id."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for item in sorted(items, key=lambda one: one.id):
        pictures = {}
        for name, image in item.pictures.items():
            pictures[name] = folder / name / f"{item.id}.png"
            pictures[name].parent.mkdir(exist_ok=True)
            image.save(pictures[name])
        written.append(Item(item.id, item.text, pictures))
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", *PICTURES])
        for item in written:
            files = [str(item.pictures[name].relative_to(folder)) if name in item.pictures else "" for name in PICTURES]
            writer.writerow([item.id, item.text, *files])
    return written

"""The pictures of any system: a folder of files named after the items, or a table that names them."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from packshot.dataset.text_files import read_records
from packshot.errors import ConfigError, first_line
from packshot.evaluate.items import Item, by_ids
from packshot.evaluate.samples import distinct_names
from packshot.imaging.decode import decode_image, flatten
from packshot.runs.files import readable
from packshot.runs.folder import log, read_metrics

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff"}
LARGEST = 50_000  # px, a side of a box
# Columns of a table of results that hold a cost, as they are called in reports.
COSTS = ("seconds", "peak_memory_gib")


@dataclass(frozen=True)
class Picture:
    """One result.

    box: left, top, width and height of the whole photograph in the picture, where the system states them.
    costs: what it took, by the names of :data:`COSTS`.
    """

    file: Path
    box: tuple[float, float, float, float] | None = None
    costs: dict[str, float] = field(default_factory=dict)

    def read(self) -> np.ndarray:
        """Uint8 (H, W, 3). Raises PackshotError where the file is damaged."""
        image = decode_image(self.file, str(self.file))
        return np.asarray((flatten(image) if image.mode == "RGBA" else image).convert("RGB"))


@dataclass(frozen=True)
class System:
    """One system's pictures, by the id of their item. An item may have several."""

    name: str
    path: Path
    pictures: dict[str, list[Picture]]


def open_systems(paths: list[str], items: list[Item]) -> list[System]:
    """The systems that ``runs`` names, with what was left out of each on the screen.

    Raises:
        ConfigError: a folder or a table cannot be read, or has no picture of any item.
    """
    if not paths:
        raise ConfigError("items is given, and runs is empty.", "Name the folders or tables that have the pictures.")
    places = list(map(partial(readable, "runs"), paths))
    ids = list(by_ids(items))
    systems = []
    for name, place in zip(distinct_names(places), places, strict=True):
        found = pictures_in_folder(place, ids) if place.is_dir() else pictures_in_table(place, ids)
        if not found:
            hint = f"Name the files after the ids of items, such as {ids[0]}.png or {ids[0]}-0.png."
            if not place.is_dir():
                hint = f"A row of a table has the id of an item, such as {ids[0]}, and its picture."
            raise ConfigError(f"runs: {place} has no picture of any item.", hint)
        missing = sorted(set(ids) - set(found))
        if missing:
            log.warning(
                "%s has pictures of %d of %d items; missing: %s ...",
                place,
                len(found),
                len(ids),
                ", ".join(missing[:3]),
            )
        systems.append(System(name, place, found))
    return systems


def pictures_in_folder(folder: Path, ids: Collection[str]) -> dict[str, list[Picture]]:
    """Files ``<id>.<ending>`` and ``<id>-<number>.<ending>``; others are counted on the screen."""
    seconds = run_seconds(folder)
    numbered: dict[str, list[tuple[int, Picture]]] = {}
    others = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in ENDINGS or not file.is_file():
            continue
        owner, number = owner_of(file, ids)
        if owner is None:
            others.append(file.name)
            continue
        if number in map(itemgetter(0), numbered.get(owner, [])):
            raise ConfigError(
                f"runs: {folder} has two pictures of {owner} with the number {number}, one of them {file.name}.",
                "Keep one, or number them <id>-<number>.",
            )
        costs = {"seconds": seconds[file.stem]} if file.stem in seconds else {}
        numbered.setdefault(owner, []).append((number, Picture(file, costs=costs)))
    if others:
        log.warning("%s: %d pictures belong to no item, such as %s", folder, len(others), others[0])
    found = {}
    for owner, pictures in numbered.items():
        found[owner] = list(map(itemgetter(1), sorted(pictures, key=itemgetter(0))))
    return found


def owner_of(file: Path, ids: Collection[str]) -> tuple[str | None, int]:
    """(id of the item, number of the picture) that a file's name states; no id where it names none.

    ``shoe-1`` may be the second picture of ``shoe`` or the only one of ``shoe-1``; a certificate beside it decides.

    Raises:
        ConfigError: both are items, and there is no certificate.
    """
    stem = unicodedata.normalize("NFC", file.stem)
    numbered = re.fullmatch(r"(.+)-(\d+)", stem)
    other = numbered[1] if numbered and numbered[1] in ids else None
    if stem in ids and other:
        certificate = file.with_suffix(".json")
        if not certificate.exists():
            raise ConfigError(
                f"runs: {file.name} may be the picture of {stem}, or another one of {other}.",
                "Name the pictures in a table with the columns id and picture.",
            )
        drawn = product_of(certificate)
        return (other, int(numbered[2])) if numbered and drawn == other else (stem, 0)
    if stem in ids:
        return stem, 0
    return (other, int(numbered[2])) if numbered and other else (None, 0)


def product_of(certificate: Path) -> str | None:
    """The product that a certificate names. Raises ConfigError: the file is damaged, or is another thing."""
    try:
        name = json.loads(certificate.read_text(encoding="utf-8"))["input"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"runs: {certificate} is no certificate of a picture ({first_line(error)}).",
            "Copy it again, or name the pictures in a table with the columns id and picture.",
        ) from error
    return unicodedata.normalize("NFC", str(name))


def run_seconds(folder: Path) -> dict[str, float]:
    """What each picture took, by its stem, where generate.py wrote the folder."""
    found = {}
    for entry in read_metrics(folder):
        if isinstance(entry, dict) and isinstance(entry.get("picture"), str) and "seconds" in entry:
            with suppress(TypeError, ValueError):  # somebody else's file
                found[entry["picture"]] = read_cost(entry["seconds"])
    return found


def pictures_in_table(table: Path, ids: Collection[str]) -> dict[str, list[Picture]]:
    """Rows with ``id`` and ``picture``, a path relative to the table; and, if known, ``box`` and costs.

    Raises:
        ConfigError: a row has no picture, names a file that is not there, or a number that is none.
    """
    found: dict[str, list[Picture]] = {}
    others = []
    for number, row in enumerate(read_records(table, "runs"), 1):
        given = {name: str(value).strip() for name, value in row.items() if value not in (None, "")}
        if "id" not in given or "picture" not in given:
            raise ConfigError(
                f"runs: row {number} of {table} has no id or no picture.",
                f"Fill in both columns. The table has {', '.join(row)}.",
            )
        file = table.parent / given["picture"]
        given["id"] = unicodedata.normalize("NFC", given["id"])
        if given["id"] not in ids:
            others.append(given["id"])
            continue
        if not file.is_file():
            raise ConfigError(f"runs: {table} names {file}, and there is no such file.", "Check the path.")
        if file in (picture.file for picture in found.get(given["id"], [])):
            raise ConfigError(f"runs: {table} names {file} twice for {given['id']}.", "Delete one of the rows.")
        try:
            costs = {name: read_cost(given[name]) for name in COSTS if name in given}
            box = read_box(given["box"]) if "box" in given else None
        except ValueError as error:
            raise ConfigError(
                f"runs: the row of {given['id']} in {table} has a wrong number ({error}).",
                "box is left,top,width,height in px; seconds and peak_memory_gib are numbers.",
            ) from error
        found.setdefault(given["id"], []).append(Picture(file, box, costs))
    if others:
        log.warning("%s: %d rows belong to no item, such as %s", table, len(others), others[0])
    return found


def read_box(text: str) -> tuple[float, float, float, float]:
    """``left,top,width,height`` as numbers. Raises ValueError where it is anything else."""
    left, top, width, height = map(float, re.split(r"[,; ]+", text.strip("[]() ")))
    if not all(map(math.isfinite, (left, top, width, height))) or not 0 < width < LARGEST or not 0 < height < LARGEST:
        raise ValueError(f"{text} is not a box in a picture")
    return left, top, width, height


def read_cost(text: str | float) -> float:
    """A number of at least 0. Raises ValueError where it is anything else."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text} is not a cost")
    return value

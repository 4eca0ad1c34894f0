"""The pictures of a finished generate.py run, with everything that is known about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.errors import ConfigError, PackshotError
from packshot.generate.certificate import LAYERS, load_certificates
from packshot.generate.product import core_of
from packshot.imaging.decode import decode_image
from packshot.lists import map_values
from packshot.runs.files import readable

Json = dict[str, Any]

# Rows of the tables that are not runs.
HARD_PASTE = "hard paste"
NOISE_FLOOR = "noise floor"


@dataclass(frozen=True)
class Sample:
    """One picture. All arrays are uint8 on the picture's pixel grid (H, W[, 3]), except raw_HW3, the model's drawing.

    photo_HW3: the input photo, placed by the transform in the certificate (zero outside).
    matte_HW, foreground_HW3, background_HW3: the layers. core_HW: bool, where the matte is 255, eroded by one pixel.
    """

    stem: str
    certificate: Json
    picture_HW3: np.ndarray
    photo_HW3: np.ndarray
    matte_HW: np.ndarray
    foreground_HW3: np.ndarray
    background_HW3: np.ndarray
    raw_HW3: np.ndarray
    core_HW: np.ndarray


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its name for tables, its folder, and its certificates by ``<product>-<k>``."""

    name: str
    path: Path
    certificates: dict[str, Json]


def open_runs(paths: list[str]) -> list[FinishedRun]:
    """One or two finished runs.

    Raises:
        ConfigError: there are too many folders, one is named twice, or generate.py did not write one of them.
    """
    if len(paths) > 2:
        raise ConfigError(f"runs has {len(paths)} folders.", "At most two runs can be compared.")
    folders = list(map(partial(readable, "runs"), paths))
    runs = []
    for name, folder in zip(distinct_names(folders), folders, strict=True):
        run = FinishedRun(name, folder, load_certificates(folder))
        if not run.certificates or not (folder / LAYERS).is_dir():
            raise ConfigError(f"runs: {folder} has no finished pictures.", "Name a folder that generate.py wrote.")
        runs.append(run)
    return runs


def distinct_names(folders: list[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to tell the runs and the other rows of the tables apart.

    Raises:
        ConfigError: a folder is named twice.
    """
    paths = list(map(Path.resolve, folders))
    if len(set(paths)) < len(paths):
        raise ConfigError(f"runs names {paths[0]} twice.", "Name two different runs, or only one.")
    for depth in count(1):  # whole paths differ, so this ends
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({HARD_PASTE, NOISE_FLOOR, *names}) == 2 + len(names):
            return names
    raise AssertionError


def load_sample(run: FinishedRun, stem: str) -> Sample:
    """Read one picture and its layers.

    Raises:
        PackshotError: a file of the run is missing or damaged.
    """
    certificate = run.certificates[stem]
    layers = run.path / LAYERS
    photo = decode_image(input_file(layers, stem), stem).convert("RGB")
    product = read_pixels(layers / f"{stem}-product.png", "RGBA")
    matte = product[..., 3]
    return Sample(
        stem=stem,
        certificate=certificate,
        picture_HW3=read_pixels(run.path / f"{stem}.png", "RGB"),
        photo_HW3=place_photo(photo, certificate["transform"]),
        matte_HW=matte,
        foreground_HW3=product[..., :3],
        background_HW3=read_pixels(layers / f"{stem}-background.png", "RGB"),
        raw_HW3=read_pixels(layers / f"{stem}-raw.png", "RGB"),
        core_HW=core_of(matte),
    )


def input_file(layers: Path, stem: str) -> Path:
    """The run's own copy of the product photo that the picture ``stem`` was made from."""
    name = stem.rsplit("-", 1)[0]
    for file in layers.iterdir():
        if file.stem == f"{name}-input":  # the extension is the photo's own
            return file
    raise PackshotError(f"{layers} has no {name}-input picture.", "Make the run again.")


def picture_and_matte(run: FinishedRun, stem: str) -> tuple[Image.Image, Image.Image]:
    """One picture (RGB) and its product's matte (L).

    Raises:
        PackshotError: a file of the run is missing or damaged.
    """
    picture = read_pixels(run.path / f"{stem}.png", "RGB")
    product = read_pixels(run.path / LAYERS / f"{stem}-product.png", "RGBA")
    return Image.fromarray(picture), Image.fromarray(product[..., 3])


def read_pixels(file: Path, mode: str) -> np.ndarray:
    """A picture file as uint8 (H, W[, C]) in a Pillow mode; raises PackshotError where it cannot be read."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert(mode))
    except OSError as error:
        raise PackshotError(f"{file} cannot be read ({error}).", "Make the run again.") from error


def place_photo(photo: Image.Image, transform: Json) -> np.ndarray:
    """The photo on the output's grid. Only the certificate's transform is used, so this checks the certificate."""
    if transform["resampling"] == "none":
        return np.asarray(photo)
    method = Image.Resampling[transform["resampling"].removeprefix("pillow ").upper()]
    placed = photo.resize(tuple(transform["placed_size"]), method, box=tuple(transform["source_box"]))
    canvas = Image.new("RGB", tuple(transform["size"]))
    canvas.paste(placed, tuple(transform["offset"]))
    return np.asarray(canvas)


def without_nan(value: Any) -> Any:
    """The value with null in place of every undefined number, because JSON has no NaN."""
    if isinstance(value, dict):
        return map_values(without_nan, value)
    return None if isinstance(value, float) and not math.isfinite(value) else value

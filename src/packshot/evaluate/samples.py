"""Pictures of a generate.py run with everything that is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.errors import ConfigError, PackshotError
from packshot.generate.certificate import LAYERS, load_certificates
from packshot.generate.product import core_of
from packshot.imaging.decode import decode_image
from packshot.runs.files import readable

# Rows of the tables beside the runs' own.
HARD_PASTE, NOISE_FLOOR = "hard paste", "noise floor"


@dataclass(frozen=True)
class Sample:
    """One picture. All arrays uint8 on the picture's pixel grid (H, W[, 3]), but raw_HW3, the model's own drawing.

    photo_HW3: the input photo, brought here by the transform that the certificate states (zero outside).
    matte_HW, foreground_HW3, background_HW3: the layers. core_HW: bool, matte 255 less one pixel.
    """

    stem: str
    certificate: dict[str, Any]
    picture_HW3: np.ndarray
    photo_HW3: np.ndarray
    matte_HW: np.ndarray
    foreground_HW3: np.ndarray
    background_HW3: np.ndarray
    raw_HW3: np.ndarray
    core_HW: np.ndarray


@dataclass(frozen=True)
class RunFolder:
    """A finished run: its name for tables, its folder, and certificates by ``<product>-<k>``."""

    name: str
    path: Path
    certificates: dict[str, dict[str, Any]]


def open_runs(paths: list[str]) -> list[RunFolder]:
    """One or two run folders.

    Raises:
        ConfigError: too many, the same one twice, or a folder that generate.py did not write.
    """
    if len(paths) > 2:
        raise ConfigError(f"runs has {len(paths)} folders.", "Two can be laid side by side.")
    folders = [readable("runs", path) for path in paths]
    named = zip(_names(folders), folders, strict=True)
    runs = [RunFolder(name, folder, load_certificates(folder)) for name, folder in named]
    for run in runs:
        if not run.certificates or not (run.path / LAYERS).is_dir():
            raise ConfigError(f"runs: {run.path} has no finished pictures.", "Name a folder that generate.py wrote.")
    return runs


def _names(folders: list[Path]) -> list[str]:
    """As many of the last parts of each path as it takes to tell them apart, and from the other rows of the tables.

    Raises:
        ConfigError: a folder is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"runs names {paths[0]} twice.", "Name two runs, or one alone.")
    names: list[str] = []
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({HARD_PASTE, NOISE_FLOOR, *names}) == 2 + len(names):
            break
    return names


def load_sample(run: RunFolder, stem: str) -> Sample:
    """Read one picture and its layers.

    Raises:
        PackshotError: a file of the run is missing or damaged.
    """
    certificate, layers = run.certificates[stem], run.path / LAYERS
    name = stem.rsplit("-", 1)[0]
    inputs = [file for file in layers.iterdir() if file.stem == f"{name}-input"]
    if not inputs:
        raise PackshotError(f"{layers} has no {name}-input picture.", "Make the run again.")
    product = _pixels(layers / f"{stem}-product.png", "RGBA")
    matte = product[..., 3]
    return Sample(
        stem=stem,
        certificate=certificate,
        picture_HW3=_pixels(run.path / f"{stem}.png", "RGB"),
        photo_HW3=place_photo(decode_image(inputs[0], inputs[0].name).convert("RGB"), certificate["transform"]),
        matte_HW=matte,
        foreground_HW3=product[..., :3],
        background_HW3=_pixels(layers / f"{stem}-background.png", "RGB"),
        raw_HW3=_pixels(layers / f"{stem}-raw.png", "RGB"),
        core_HW=core_of(matte),
    )


def picture_and_matte(run: RunFolder, stem: str) -> tuple[Image.Image, Image.Image]:
    """One picture (RGB) and its product's matte (L).

    Raises:
        PackshotError: a file of the run is missing or damaged.
    """
    picture = _pixels(run.path / f"{stem}.png", "RGB")
    product = _pixels(run.path / LAYERS / f"{stem}-product.png", "RGBA")
    return Image.fromarray(picture), Image.fromarray(product[..., 3])


def _pixels(file: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert(mode))
    except OSError as error:
        raise PackshotError(f"{file} cannot be read ({error}).", "Make the run again.") from error


def place_photo(photo: Image.Image, transform: dict[str, Any]) -> np.ndarray:
    """The photo on the output's grid, from the certificate's words alone: this is what makes it checkable."""
    if transform["resampling"] == "none":
        return np.asarray(photo)
    method = Image.Resampling[transform["resampling"].removeprefix("pillow ").upper()]
    placed = photo.resize(tuple(transform["placed_size"]), method, box=tuple(transform["source_box"]))
    canvas = Image.new("RGB", tuple(transform["size"]))
    canvas.paste(placed, tuple(transform["offset"]))
    return np.asarray(canvas)

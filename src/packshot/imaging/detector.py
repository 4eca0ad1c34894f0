"""How sure an object detector is of faces or nudity in a picture: ONNX files of Ultralytics' YOLO, v8 and later.

Such a file names its classes itself. NudeNet's detector, which the extra ``safety`` installs, is one of them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from packshot.errors import ConfigError
from packshot.imaging.onnx import load_session
from packshot.runs.files import readable

KEY = "curation.detector"
PACKAGE, PACKAGED = "nudenet", "320n.onnx"
# px, where a file takes any size. At 320, a face of 200 px in one of 1,500 px has a confidence of .09, at 640 .66.
SIDE = 640
# What counts, by the names of classes. A man's bare chest does not.
FACES = re.compile(r"(^|[^a-z])(face|head)", re.IGNORECASE)
NUDITY = re.compile(r"(genitalia|female_breast|buttocks|anus)_exposed|porn|nude|nudity|nsfw|hentai", re.IGNORECASE)

_WANTED = (
    "Name a detector that Ultralytics' YOLO (v8 or later) exported as ONNX: names in its metadata, 4 + classes rows."
)


@dataclass(frozen=True)
class Detector:
    """session: takes RGB in [0, 1], (1, 3, side, side); gives (1, 4 + classes, boxes). classes: their names."""

    session: Any
    side: int
    classes: list[str]

    def places(self, wanted: re.Pattern[str]) -> list[int]:
        """The classes whose name matches."""
        return [place for place, name in enumerate(self.classes) if wanted.search(name)]


def detector_file(path: str | None) -> Path:
    """The file that the config names, or NudeNet's where it names none. Raises ConfigError: there is none."""
    if path is not None:
        return readable(KEY, path)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "curation.max_face and curation.max_nudity need a detector, and the package nudenet is not installed.",
            f"pip install 'packshot[safety]', or name an ONNX file: {KEY}=<file.onnx>.",
        )
    return readable(KEY, Path(spec.origin).parent / PACKAGED)


@lru_cache(maxsize=1)
def load_detector(path: str) -> Detector:
    """The detector of a file, once per process. Raises ConfigError: it is none, or does not name its classes."""
    session = load_session(KEY, path)
    try:
        names = ast.literal_eval(session.get_modelmeta().custom_metadata_map.get("names", "{}"))
        classes = [str(names[number]) for number in range(len(names))]
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise ConfigError(f"{KEY}={path}: the names of its classes cannot be read ({error}).", _WANTED) from error
    node = session.get_inputs()[0]
    side = node.shape[2] if isinstance(node.shape[2], int) else SIDE
    # a file may declare free sizes, so what it gives for a black picture counts
    shape = session.run(None, {node.name: np.zeros((1, 3, side, side), np.float32)})[0].shape
    if not classes or shape[:-1] != (1, 4 + len(classes)):
        raise ConfigError(f"{KEY}={path} names {len(classes)} classes and gives an output of shape {shape}.", _WANTED)
    return Detector(session, side, classes)


def require_classes(path: Path, wanted: re.Pattern[str], key: str) -> None:
    """Raises ConfigError where no class of a detector's file is one of those that ``key`` asks for."""
    detector = load_detector(str(path))
    if not detector.places(wanted):
        known = ", ".join(detector.classes)
        raise ConfigError(
            f"{key} needs a detector of {key.rpartition('_')[2]}, and {KEY}={path} knows {known}.",
            f"Name another file, or leave {key} out.",
        )


def surest(image: Image.Image, path: Path, wanted: re.Pattern[str]) -> float:
    """Confidence of the surest box of the wanted classes, in [0, 1]. image: RGB of any size and shape."""
    detector = load_detector(str(path))
    factor = detector.side / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)
    pixels_HWC = np.zeros((detector.side, detector.side, 3), np.float32)
    pixels_HWC[: size[1], : size[0]] = np.asarray(small, np.float32) / 255
    name = detector.session.get_inputs()[0].name
    output_BCN = detector.session.run(None, {name: np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1)[None])})[0]
    rows = [4 + place for place in detector.places(wanted)]  # the first four are the boxes
    return float(output_BCN[0, rows].max(initial=0))

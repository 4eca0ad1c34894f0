"""Reading datasets: Parquet shards as a map-style list of samples."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow.compute as pc
from PIL import Image, ImageOps

from packshot.config.conditions import column_hint, picture_columns
from packshot.config.schema import LicenseConfig
from packshot.dataset import corrections
from packshot.dataset.arrow_copy import read_tables
from packshot.errors import ConfigError, PackshotError
from packshot.imaging.decode import DecodeError, flatten, high_depth_to_uint8, is_high_depth
from packshot.runs.files import readable
from packshot.runs.folder import log
from packshot.runs.licenses import refuse_rows
from packshot.scene import Scene

_DIGEST = re.compile("[0-9a-f]{64}")
UNKNOWN_LICENSE = "unknown"  # as source.license has it where nothing is said
_IMAGES = {"image": "RGB", "plate": "RGB", "cutout": "RGBA", "mask": "L"} | dict.fromkeys(picture_columns(), "L")


def license_names(table: Any) -> list[str]:
    """The licences of a table's rows; ``UNKNOWN_LICENSE`` where nothing is said."""
    named = table.column("license").to_pylist() if "license" in table.column_names else [None]
    return sorted({str(name or UNKNOWN_LICENSE) for name in named})


class Rows(Sequence[dict[str, Any]]):
    """Samples of a dataset folder; ``rows[i]`` decodes one.

    Each is a dict with ``image`` (PIL RGB), ``mask`` (PIL L, or None when the set has none), ``text``, ``scene``
    (Scene), ``id`` and every other column as it is (``plate``: PIL RGB, ``cutout``: RGBA, ``shadow`` and ``depth``: L).
    """

    def __init__(self, path: str, files: list[str], table: Any, pictures: Any, places: list[int]) -> None:
        """table: everything but pictures. places: the row of each sample in ``pictures``."""
        self.path, self.files = path, files
        self._table, self._pictures, self._places = table, pictures, places
        self._digests: dict[int, str] = {}  # asked for at every access, and a large picture is read for it
        self.ids: list[str] = table.column("id").to_pylist()
        self.texts: list[str] = table.column("text").to_pylist()
        self.licenses = license_names(table)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.read(index, tuple(_IMAGES))

    def read(self, index: int, images: Sequence[str]) -> dict[str, Any]:
        """One sample of which only these images are decoded, and the others left out."""
        row = {name: self._table.column(name)[index].as_py() for name in self._table.column_names}
        for name in self._pictures.column_names:
            if name in images or name not in _IMAGES:
                row[name] = self._picture(name, index)
        for name in images:
            if row.get(name) is not None:
                row[name] = self._decode(row, name)
        row.setdefault("mask", None)
        row["scene"] = Scene.from_dict(row["scene"]) if row.get("scene") else Scene.parse(row["text"] or "").scene
        return row

    def _picture(self, name: str, index: int) -> dict[str, Any] | None:
        """A picture as its file is, under ``bytes``."""
        return self._pictures.column(name)[self._places[index]].as_py()

    def _decode(self, row: dict[str, Any], name: str) -> Image.Image:
        mode = _IMAGES[name]
        try:
            image = Image.open(io.BytesIO(row[name]["bytes"]))
            ImageOps.exif_transpose(image, in_place=True)  # pictures that build_data.py did not turn upright
            if is_high_depth(image):
                image = Image.fromarray(high_depth_to_uint8(image, name))
            # over white: a plain conversion would show the colours that transparency hides
            return flatten(image.convert("RGBA")) if mode == "RGB" and "A" in image.mode else image.convert(mode)
        except (OSError, KeyError, TypeError, DecodeError, Image.DecompressionBombError) as error:
            reason, _, _ = str(error).partition("\n")
            raise PackshotError(
                f"{self.path}: sample {row['id']} has a broken {name} ({reason}).",
                "Build the dataset again.",
            ) from error

    def refuse_without(self, key: str, pictures: Sequence[str]) -> None:
        """Raises ConfigError when the set has no column of one of these pictures; before hours of encoding."""
        absent = [name for name in pictures if name not in self._pictures.column_names]
        if absent:
            raise ConfigError(
                f"{key}={self.path} has no column {', '.join(absent)}, which the method reads.",
                " ".join(column_hint(name) for name in absent),
            )

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image, in px."""
        if {"width", "height"} <= set(self._table.column_names):
            pairs = (self._table.column(name).to_pylist() for name in ("height", "width"))
            return list(zip(*pairs, strict=True))
        return [self.read(index, ("image",))["image"].size[::-1] for index in range(len(self))]

    def digest(self, index: int) -> str:
        """Identity of a sample's picture and mask, without decoding either.

        An id of 64 hex digits is taken for the digest of the picture, as build_data.py writes it; any other is only a
        name, and the picture's own bytes are read.
        """
        if index not in self._digests:
            self._digests[index] = self._digest(index)
        return self._digests[index]

    def _digest(self, index: int) -> str:
        sample_id, digest = self.ids[index], hashlib.sha256()
        parts = ["mask"] if _DIGEST.fullmatch(sample_id) else ["image", "mask"]
        digest.update(sample_id.encode())
        for name in parts:
            found = self._picture(name, index) if name in self._pictures.column_names else None
            digest.update(hashlib.sha256(found["bytes"] if found else b"").digest())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Digest over ids, texts, scenes, pictures and masks, in order: the identity of what a run was trained on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        columns = self._table.column_names
        scenes = self._table.column("scene").to_pylist() if "scene" in columns else [None] * len(self)
        whole = hashlib.sha256()
        for index, (sample_id, text, scene) in enumerate(zip(self.ids, self.texts, scenes, strict=True)):
            parts = (sample_id, text, json.dumps(scene, sort_keys=True), self.digest(index))
            whole.update("\t".join(map(str, parts)).encode() + b"\n")
        return whole.hexdigest()


def load_rows(
    key: str,
    path: str,
    *,
    captions: bool = True,
    pictures: Sequence[str] | None = None,
    cache: str | None = None,
    licenses: LicenseConfig | None = None,
) -> Rows:
    """Open a dataset folder (or one Parquet file) that the config names under ``key``.

    captions: refuse a set in which a sample has no text. pictures: read only these of the picture columns; default:
    all. cache: folder in which a copy of the pictures may lie for access by memory map; default: in memory.
    licenses: refuse a set with rows that this profile does not let in.

    Raises:
        ConfigError: nothing there, no Parquet, missing columns, no rows, missing captions, a refused licence.
    """
    folder = readable(key, path)
    files = sorted(folder.glob("part-*.parquet")) or sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    files = [file for file in files if file.name != "rejected.parquet"]
    if not files:
        raise ConfigError(f"{key}={path} holds no part-*.parquet.", "build_data.py writes such folders.")
    try:
        table, shown = read_tables(files, pictures, cache)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}={path} cannot be read as Parquet ({reason}).", "Build the dataset again.") from error
    missing = {"id", "image", "text"} - {*table.column_names, *shown.column_names}
    if missing:
        raise ConfigError(
            f"{key}={path} lacks the column {', '.join(sorted(missing))}.",
            f"This prepares it: python build_data.py dataset=background source.path={path} run.dir=<new folder>",
        )
    table = corrections.apply(table, corrections.read(folder))
    places = list(range(table.num_rows))
    if captions and "caption_error" in table.column_names:
        errors = table.column("caption_error")
        places = [place for place, error in enumerate(errors.to_pylist()) if error is None]
        if len(places) < table.num_rows:
            failed = table.num_rows - len(places)
            log.warning("%s=%s: %d samples without a usable caption are left out (caption_error)", key, path, failed)
            table = table.filter(pc.is_null(errors))
    if table.num_rows == 0:
        raise ConfigError(f"{key}={path} has no rows.", "Its rejected.parquet says why images were left out.")
    rows = Rows(path, [file.name for file in files], table, shown, places)
    if licenses:
        refuse_rows(licenses, key, path, rows.licenses)
    bare = sum(not text for text in rows.texts)
    if captions and bare:
        raise ConfigError(
            f"{key}={path}: {bare} of {len(rows)} samples have no caption.",
            f"python caption_vlm.py task=caption data.input={path} writes them.",
        )
    return rows

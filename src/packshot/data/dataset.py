"""Reading datasets: Parquet shards as a map-style list of samples."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from packshot.core.errors import ConfigError, PackshotError
from packshot.core.run import log
from packshot.core.storage import readable
from packshot.data.decode import flatten
from packshot.scene import Scene

_IMAGES = {"image": "RGB", "plate": "RGB", "cutout": "RGBA", "mask": "L", "shadow": "L"}


class Rows(Sequence[dict[str, Any]]):
    """Samples of a dataset folder; ``rows[i]`` decodes one.

    Each is a dict with ``image`` (PIL RGB), ``mask`` (PIL L, or None when the set has none), ``text``, ``scene``
    (Scene), ``id`` and every other column as it is (``plate``: PIL RGB, ``cutout``: RGBA, ``shadow``: L).
    """

    def __init__(self, path: str, files: list[str], table: Any) -> None:
        self.path, self.files, self._table = path, files, table
        self.ids: list[str] = table.column("id").to_pylist()
        self.texts: list[str] = table.column("text").to_pylist()
        self.licenses = sorted(set(table.column("license").to_pylist())) if "license" in table.column_names else []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.read(index, tuple(_IMAGES))

    def read(self, index: int, images: Sequence[str]) -> dict[str, Any]:
        """One sample of which only these images are decoded, and the others left out."""
        names = [name for name in self._table.column_names if name not in _IMAGES or name in images]
        row = {name: self._table.column(name)[index].as_py() for name in names}
        for name in images:
            if row.get(name) is not None:
                row[name] = self._decode(row, name)
        row.setdefault("mask", None)
        row["scene"] = Scene.from_dict(row["scene"]) if row.get("scene") else Scene.parse(row["text"]).scene
        return row

    def _decode(self, row: dict[str, Any], name: str) -> Image.Image:
        mode = _IMAGES[name]
        try:
            image = Image.open(io.BytesIO(row[name]["bytes"]))
            # over white: a plain conversion would show the colours that transparency hides
            return flatten(image.convert("RGBA")) if mode == "RGB" and "A" in image.mode else image.convert(mode)
        except (OSError, KeyError, TypeError) as error:
            raise PackshotError(
                f"{self.path}: sample {row['id']} has a broken {name} ({error}).", "Build the dataset again."
            ) from error

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image, in px."""
        if {"width", "height"} <= set(self._table.column_names):
            pairs = (self._table.column(name).to_pylist() for name in ("height", "width"))
            return list(zip(*pairs, strict=True))
        return [self.read(index, ("image",))["image"].size[::-1] for index in range(len(self))]

    def digest(self, index: int) -> str:
        """Identity of a sample's picture and mask, without decoding either."""
        mask = self._table.column("mask")[index].as_py() if "mask" in self._table.column_names else None
        return hashlib.sha256(self.ids[index].encode() + (mask["bytes"] if mask else b"")).hexdigest()

    def fingerprint(self) -> str:
        """Digest over sample ids and texts, in order: the identity of what a run was trained on."""
        return hashlib.sha256(
            "\n".join(f"{i}\t{t}" for i, t in zip(self.ids, self.texts, strict=True)).encode()
        ).hexdigest()


def _table(file: Any, pictures: Sequence[str] | None) -> Any:
    parquet = pq.ParquetFile(file)
    fields = [
        field for field in parquet.schema_arrow if pictures is None or field.name in pictures or not _shows(field)
    ]
    return parquet.read([field.name for field in fields])


def _shows(field: Any) -> bool:
    """Whether a column holds encoded pictures."""
    return pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0


def load_rows(key: str, path: str, *, captions: bool = True, pictures: Sequence[str] | None = None) -> Rows:
    """Open a dataset folder (or one Parquet file) that the config names under ``key``.

    captions: refuse a set in which a sample has no text. pictures: leave all other pictures on disk; default: none.

    Raises:
        ConfigError: nothing there, no Parquet, missing columns, no rows, missing captions.
    """
    folder = readable(key, path)
    files = sorted(folder.glob("part-*.parquet")) or sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    files = [file for file in files if file.name != "rejected.parquet"]
    if not files:
        raise ConfigError(f"{key}={path} holds no part-*.parquet.", "build_data.py writes such folders.")
    try:
        # file by file: pq.read_table imports pandas
        table = pa.concat_tables([_table(file, pictures) for file in files], promote_options="default")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}={path} cannot be read as Parquet ({reason}).", "Build the dataset again.") from error
    missing = {"id", "image", "text"} - set(table.column_names)
    if missing:
        raise ConfigError(f"{key}={path} lacks the column {', '.join(sorted(missing))}.", "build_data.py writes them.")
    if "caption_error" in table.column_names:
        failed = table.num_rows - table.filter(pc.is_null(table.column("caption_error"))).num_rows
        if captions and failed:
            log.warning("%s=%s: %d samples without a usable caption are left out (caption_error)", key, path, failed)
            table = table.filter(pc.is_null(table.column("caption_error")))
    if table.num_rows == 0:
        raise ConfigError(f"{key}={path} has no rows.", "Its rejected.parquet says why images were left out.")
    rows = Rows(path, [file.name for file in files], table)
    bare = sum(not text for text in rows.texts)
    if captions and bare:
        raise ConfigError(
            f"{key}={path}: {bare} of {len(rows)} samples have no caption.",
            f"python caption_vlm.py task=caption data.input={path} writes them.",
        )
    return rows

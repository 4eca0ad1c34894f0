"""Reading datasets: Parquet shards as a map-style list of samples."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
from PIL import Image, ImageOps

from packshot.config.conditions import column_hint, picture_columns
from packshot.config.schema import LicenseConfig
from packshot.dataset import corrections
from packshot.dataset.arrow_copy import REPAIR, first_damaged, read_tables
from packshot.errors import ConfigError, PackshotError, first_line
from packshot.imaging.decode import DecodeError, decode_smaller, flatten, high_depth_to_uint8, is_high_depth
from packshot.runs.files import readable
from packshot.runs.folder import log
from packshot.runs.licenses import refuse_rows
from packshot.scene import Scene

Row = dict[str, Any]  # a sample; see :class:`Rows`
_DIGEST = re.compile("[0-9a-f]{64}")
CAPTIONS = "captions"  # the column of all captions of a picture, of which ``text`` is the first
UNKNOWN_LICENSE = "unknown"  # as source.license has it where none is given
_IMAGES = {"image": "RGB", "plate": "RGB", "cutout": "RGBA", "mask": "L"} | dict.fromkeys(picture_columns(), "L")


def license_names(table: pa.Table) -> list[str]:
    """The licences of a table's rows; ``UNKNOWN_LICENSE`` where none is given."""
    named = table.column("license").to_pylist() if "license" in table.column_names else [None]
    return sorted({str(name or UNKNOWN_LICENSE) for name in named})


class Rows(Sequence[Row]):
    """Samples of a dataset folder; ``rows[i]`` decodes one.

    Each is a dict with ``image`` (PIL RGB), ``mask`` (PIL L, or None when the set has none), ``text``, ``scene``
    (Scene), ``id`` and every other column as it is (``plate``: PIL RGB, ``cutout``: RGBA, ``shadow`` and ``depth``: L).
    """

    def __init__(self, path: str, files: list[str], table: pa.Table, pictures: pa.Table, places: list[int]) -> None:
        """table: everything but pictures. places: the row of each sample in ``pictures``."""
        self.path = path
        self.files = files
        self.table: pa.Table = table
        self.pictures: pa.Table = pictures
        self.places = places
        # asked for at every access, and large pictures are read for them
        self._digests: dict[int, str] = {}
        self._column_digests: dict[tuple[str, int], str] = {}
        self.ids: list[str] = table.column("id").to_pylist()
        self.texts: list[str] = table.column("text").to_pylist()
        several = CAPTIONS in table.column_names and is_list(table.schema.field(CAPTIONS).type)
        self.captions: list[list[str] | None] | None = self.column(CAPTIONS) if several else None
        self.licenses = license_names(table)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.read(index, tuple(_IMAGES))

    def read(self, index: int, images: Sequence[str], covering: tuple[int, int] | None = None) -> Row:
        """One sample of which only these images are decoded, and the others left out.

        covering: (height, width) that the picture is to cover later. A large JPEG is then decoded at a fraction of its
        size, and ``full_size`` has its own (height, width).
        """
        row = {name: self.table.column(name)[index].as_py() for name in self.table.column_names}
        for name in self.pictures.column_names:
            if name in images or name not in _IMAGES:
                row[name] = self._picture(name, index)
        for name in images:
            if row.get(name) is not None:
                row[name] = self._decode(row, name, covering if name == "image" else None)
        row.setdefault("mask", None)
        row["scene"] = Scene.from_dict(row["scene"]) if row.get("scene") else Scene.parse(row["text"] or "").scene
        return row

    def _picture(self, name: str, index: int) -> dict[str, bytes] | None:
        """A picture as its file is, under ``bytes``."""
        return self.pictures.column(name)[self.places[index]].as_py()

    def _decode(self, row: Row, name: str, covering: tuple[int, int] | None = None) -> Image.Image:
        mode = _IMAGES[name]
        try:
            image = Image.open(io.BytesIO(row[name]["bytes"]))
            if covering:
                row["full_size"] = decode_smaller(image, covering)
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
        absent = [name for name in pictures if name not in self.pictures.column_names]
        if absent:
            raise ConfigError(
                f"{key}={self.path} has no column {', '.join(absent)}, which the method reads.",
                " ".join(map(column_hint, absent)),
            )

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image, in px."""
        count = len(self)
        heights = self.column("height") or [None] * count
        widths = self.column("width") or [None] * count
        found = []
        for index, (height, width) in enumerate(zip(heights, widths, strict=True)):
            known = height is not None and width is not None
            found.append((height, width) if known else self.read(index, ("image",))["image"].size[::-1])
        return found

    def column(self, name: str) -> list[Any] | None:
        """The values of a column that holds no pictures; None if the set has none of that name."""
        return self.table.column(name).to_pylist() if name in self.table.column_names else None

    def encoded(self, name: str, index: int) -> bytes:
        """The file of a picture; empty where there is none."""
        found = self._picture(name, index) if name in self.pictures.column_names else None
        return (found or {}).get("bytes") or b""

    def picture_digest(self, index: int) -> str:
        """Identity of a sample's picture alone."""
        sample_id = self.ids[index]
        return sample_id if _DIGEST.fullmatch(sample_id) else hashlib.sha256(self.encoded("image", index)).hexdigest()

    def digest(self, index: int) -> str:
        """Identity of a sample's picture and mask, without decoding either.

        An id of 64 hex digits is taken for the digest of the picture, as build_data.py writes it; any other is only a
        name, and the picture's own bytes are read.
        """
        if index not in self._digests:
            self._digests[index] = self._digest(index)
        return self._digests[index]

    def _digest(self, index: int) -> str:
        sample_id = self.ids[index]
        digest = hashlib.sha256()
        parts = ["mask"] if _DIGEST.fullmatch(sample_id) else ["image", "mask"]
        digest.update(sample_id.encode())
        for name in parts:
            digest.update(hashlib.sha256(self.encoded(name, index)).digest())
        return digest.hexdigest()

    def column_digest(self, name: str, index: int) -> str:
        """Identity of one further picture of a sample, without decoding it."""
        place = (name, index)
        if place not in self._column_digests:
            self._column_digests[place] = hashlib.sha256(self.encoded(name, index)).hexdigest()
        return self._column_digests[place]

    def take_digests(self, other: Rows, indices: Iterable[int], first: int = 0) -> None:
        """Use what is known of these samples of another set, which are here from ``first`` on, in this order."""
        for index, place in enumerate(indices, first):
            if place in other._digests:
                self._digests[index] = other._digests[place]

    def fingerprint(self) -> str:
        """Digest over ids, texts, scenes, pictures and masks, in order: the identity of what a run was trained on."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        columns = self.table.column_names
        scenes = self.table.column("scene").to_pylist() if "scene" in columns else [None] * len(self)
        whole = hashlib.sha256()
        for index, (sample_id, text, scene) in enumerate(zip(self.ids, self.texts, scenes, strict=True)):
            parts = [sample_id, text, json.dumps(scene, sort_keys=True), self.digest(index)]
            if self.captions:
                parts.append(json.dumps(self.captions[index]))
            whole.update("\t".join(map(str, parts)).encode() + b"\n")
        return whole.hexdigest()


def read_whole(
    files: Sequence[Path], pictures: Sequence[str] | None, cache: str | None, needed: set[str], named: str
) -> tuple[pa.Table, pa.Table]:
    """:func:`read_tables`, of files that are whole and have the columns ``needed``. named: the set in messages.

    Raises:
        ConfigError: a file is no Parquet, or a column is missing.
    """
    way_out = preparing(named.partition("=")[2])
    try:
        table, shown = read_tables(files, pictures, cache)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        damaged = first_damaged(files)
        if damaged and damaged.suffix == ".parquet":
            raise ConfigError(f"{named}: {damaged.name} is not a whole Parquet file ({reason}).", REPAIR) from error
        raise ConfigError(f"{named} cannot be read as Parquet ({reason}).", way_out) from error
    missing = needed - {*table.column_names, *shown.column_names}
    if missing:
        raise ConfigError(f"{named} lacks the column {', '.join(sorted(missing))}.", way_out)
    return table, shown


def load_rows(
    key: str,
    path: str,
    *,
    captions: bool = True,
    pictures: Sequence[str] | None = None,
    cache: str | None = None,
    licenses: LicenseConfig | None = None,
    prefix: str = "",
    needs_review: bool = True,
    empty_captions: bool = False,
) -> Rows:
    """Open a dataset folder (or one Parquet file) that the config names under ``key``.

    captions: refuse a set in which a sample has no text. pictures: read only these of the picture columns; default:
    all. cache: folder in which a copy of the pictures may lie for access by memory map; default: in memory.
    licenses: refuse a set with rows that this profile does not let in. prefix: put before every caption.
    needs_review: whether rows whose ``status`` is not "accepted" are read; what is left out is logged. empty_captions:
    whether samples without a text are let in, as empty texts; they are counted.

    Without a column ``id`` the digest of a picture is its id.

    Raises:
        ConfigError: nothing there, no Parquet, missing columns, no rows, missing captions, a refused licence.
    """
    named = f"{key}={path}"
    folder = readable(key, path)
    files = shards_of(folder, named)
    needed = {"image"} if empty_captions else {"image", "text"}
    table, shown = read_whole(files, pictures, cache, needed, named)
    table = with_ids(table, shown, named)
    table = with_first_captions(table)
    if empty_captions:
        table = with_texts(table)
    table = corrections.apply(table, corrections.read(folder))
    if table.num_rows == 0:
        raise ConfigError(f"{named} has no rows.", "Its rejected.parquet says why images were left out.")
    places = list(range(table.num_rows))
    if not needs_review:
        places = accepted_places(table, places, named)
    if captions:
        places = captioned_places(table, places, named)
    if len(places) < table.num_rows:
        table = table.take(places)
    rows = Rows(path, [file.name for file in files], with_prefix(table, prefix), shown, places)
    if licenses:
        refuse_rows(licenses, key, path, rows.licenses)
    if captions:
        refuse_bare(rows, key, empty_captions)
    return rows


def preparing(path: str) -> str:
    """The way out for pictures that are not yet a dataset."""
    return f"This prepares it: python build_data.py dataset=background source.path={path} run.dir=<new folder>"


def with_ids(table: pa.Table, shown: pa.Table, named: str) -> pa.Table:
    """The table with a column ``id``: the digest of each picture where there is none, as build_data.py has it."""
    if "id" in table.column_names:
        return table
    ids = []
    for cell in shown.column("image"):
        ids.append(hashlib.sha256((cell.as_py() or {}).get("bytes") or b"").hexdigest())
    log.info("%s has no column id: the digest of each picture is its id", named)
    return table.append_column("id", pa.array(ids, pa.string()))


def with_texts(table: pa.Table) -> pa.Table:
    """The table with a text in every row, "" where there is none."""
    if "text" not in table.column_names:
        return table.append_column("text", pa.array([""] * table.num_rows, pa.string()))
    texts = [text or "" for text in table.column("text").to_pylist()]
    return table.set_column(table.column_names.index("text"), "text", pa.array(texts, pa.string()))


def refuse_bare(rows: Rows, key: str, allowed: bool) -> None:
    """Raises ConfigError for samples without a caption, unless they are ``allowed``: then they are counted."""
    bare = sum(not text for text in rows.texts)
    if not bare:
        return
    if not allowed:
        raise ConfigError(
            f"{key}={rows.path}: {bare} of {len(rows)} samples have no caption.",
            f"python caption_vlm.py task=caption data.input={rows.path} writes them; data.allow_empty_captions=true "
            "trains them as unconditional.",
        )
    log.warning(
        "%s=%s: %d of %d samples have no caption and are trained as unconditional (data.allow_empty_captions=true)",
        key, rows.path, bare, len(rows),
    )  # fmt: skip


def shards_of(folder: Path, named: str) -> list[Path]:
    """The Parquet files of a dataset folder, or the one file that was named. named: the key and its value.

    Raises:
        ConfigError: there is none.
    """
    files = [folder]
    if folder.is_dir():
        files = sorted(folder.glob("part-*.parquet")) or sorted(folder.glob("*.parquet"))
    files = [file for file in files if file.name != "rejected.parquet"]
    if not files:
        raise ConfigError(f"{named} holds no part-*.parquet.", preparing(str(folder)))
    return files


def accepted_places(table: pa.Table, places: list[int], named: str) -> list[int]:
    """Those rows whose ``status`` is "accepted"; rows without a status count as accepted.

    Raises:
        ConfigError: there is none.
    """
    if "status" not in table.column_names:
        return places
    status = table.column("status").to_pylist()
    kept = [place for place in places if status[place] in (None, "accepted")]
    lost = len(places) - len(kept)
    if lost:
        log.warning(
            "%s: %d of %d rows are left out because their status is not accepted (data.needs_review=true keeps them)",
            named, lost, len(places),
        )  # fmt: skip
    if not kept:
        raise ConfigError(
            f"{named}: none of its {lost} rows has the status accepted.",
            "data.needs_review=true keeps them; build_data.py task=review_masks shows what is in doubt.",
        )
    return kept


def captioned_places(table: pa.Table, places: list[int], named: str) -> list[int]:
    """Those rows whose captioning did not fail, or that kept the caption they had.

    Raises:
        ConfigError: there is none.
    """
    if "caption_error" not in table.column_names:
        return places
    errors = table.column("caption_error").to_pylist()
    texts = table.column("text").to_pylist() if "text" in table.column_names else [None] * len(errors)
    kept = [place for place in places if errors[place] is None or (texts[place] or "").strip()]
    lost = len(places) - len(kept)
    if lost:
        log.warning("%s: %d samples without a usable caption are left out (caption_error)", named, lost)
    if not kept:
        raise ConfigError(f"{named} has no rows with a usable caption.", "Its column caption_error has the reasons.")
    return kept


def with_prefix(table: pa.Table, prefix: str) -> pa.Table:
    """The table with words put before each text, and a space between them. A text that is empty stays empty."""
    if not prefix:
        return table
    lists = CAPTIONS in table.column_names and is_list(table.schema.field(CAPTIONS).type)
    for name in ("text", CAPTIONS) if lists else ("text",):
        field = pa.field(name, pa.string() if name == "text" else pa.list_(pa.string()))
        cells = [prefixed(prefix, cell) for cell in table.column(name).to_pylist()]
        table = table.set_column(table.column_names.index(name), field, pa.array(cells, field.type))
    return table


def prefixed(prefix: str, cell: Any) -> Any:
    """A text, or each of several, with words before it; an empty one as it is."""
    if isinstance(cell, list):
        return [prefixed(prefix, text) for text in cell]
    return f"{prefix} {cell}" if cell else cell


def with_first_captions(table: pa.Table) -> pa.Table:
    """The table with a text in ``text`` where it held a list: the first of them, and all in ``captions``."""
    if "text" not in table.column_names or not is_list(table.schema.field("text").type):
        return table
    several: list[list[str]] = []
    for cell in table.column("text").to_pylist():
        several.append([text.strip() for text in cell or () if text and text.strip()])
    first = [texts[0] if texts else "" for texts in several]
    table = table.set_column(table.column_names.index("text"), "text", pa.array(first, pa.string()))
    if CAPTIONS in table.column_names:
        table = table.drop_columns([CAPTIONS])
    return table.append_column(CAPTIONS, pa.array(several, pa.list_(pa.string())))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def select(rows: Rows, indices: Sequence[int]) -> Rows:
    """Some samples of a set, in this order."""
    places = [rows.places[index] for index in indices]
    chosen = Rows(rows.path, rows.files, rows.table.take(list(indices)), rows.pictures, places)
    chosen.take_digests(rows, indices)
    return chosen


def concatenate(key: str, sets: Sequence[Rows]) -> Rows:
    """The samples of several sets one after the other; a column that a set lacks is empty in its rows.

    Raises:
        ConfigError: a column has different types in two sets.
    """
    if len(sets) == 1:
        return sets[0]
    path = ", ".join(rows.path for rows in sets)
    try:
        table = pa.concat_tables([rows.table for rows in sets], promote_options="permissive")
        pictures = pa.concat_tables([rows.pictures for rows in sets], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"{key}: the columns of {path} do not fit together ({reason}).",
            "Build the sets with the same dataset=…, or train on one of them.",
        ) from error
    places: list[int] = []
    files: list[str] = []
    offset = 0
    for rows in sets:
        places += [offset + place for place in rows.places]
        files += [f"{rows.path}/{name}" for name in rows.files]
        offset += rows.pictures.num_rows
    whole = Rows(path, files, table, pictures, places)
    first = 0
    for rows in sets:
        whole.take_digests(rows, range(len(rows)), first)
        first += len(rows)
    return whole

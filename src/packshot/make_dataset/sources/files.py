"""Image files: captions lie next to them or in a table of the folder, masks in a folder of their own."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from packshot.config.schema import SourceConfig
from packshot.dataset.rows import CAPTIONS
from packshot.dataset.text_files import EncodingError, decode_text
from packshot.dataset.walk import hidden
from packshot.errors import ConfigError
from packshot.imaging.files import IMAGE_SUFFIXES, is_image, pair_masks
from packshot.lists import in_words, map_values
from packshot.make_dataset.sources.base import (
    FILE_COLUMNS,
    Item,
    Listing,
    Raw,
    caption_count,
    check_caption_column,
    described_row,
    first_of,
    no_captions,
    read_place,
    with_captions,
)
from packshot.make_dataset.sources.names import Names, fold
from packshot.make_dataset.sources.reviewed import looked_at
from packshot.make_dataset.sources.tabular import columns_of, is_table_file, read_rows
from packshot.make_dataset.sources.walk import open_path

CAPTION_SUFFIXES = (".txt", ".caption")
TABLE_NAMES = ("metadata", "_metadata", "captions")
_BY_CONTENT = (".json", ".csv", ".tsv", ".jsonl", ".ndjson")  # tables under any other name
_REPEATS = re.compile(r"([1-9]\d{0,2})_.+")  # kohya's folders: "10_sks bottle"; a year has four digits


def claims(listing: Listing) -> list[str]:
    """Files with the name of an image, or the one file that the source is."""
    return [path for path in listing.paths if is_image(path) or path == listing.root]


def list_items(listing: Listing, paths: list[str], source: SourceConfig) -> list[Item]:
    """An item per image file. Raises ConfigError for masks or columns that cannot be used."""
    given = mask_files(source)
    own = set(given.values())
    if given:
        given = looked_at(source, given, listing.notes)
    images = [path for path in paths if listing.place(path) not in own]
    if not images:
        raise ConfigError(f"source.path={source.path} holds masks alone.", f"Known are {' '.join(IMAGE_SUFFIXES)}.")
    names = list(map(listing.inside, images))
    masks = masks_of(source, names, given, listing.notes) if source.masks else {}
    known = set(listing.paths)
    if not listing.whole:  # behind a glob or a lone file, what lies next to the images was not listed
        known |= neighbours(listing, images)
    tables = metadata_rows(listing, known, images, source)
    texts = CaptionFiles(known, images)
    used: set[str] = {*images, *tables.files}
    items = []
    for path, name in zip(images, names, strict=True):
        item = file_item(listing, path, known, texts.of(path), source)
        item["described"] = tables.rows.get(path, {})
        item["mask"] = masks.get(name)
        if item["json"] and item["json"].startswith("/"):
            describe_by_json(listing, item)
        used.update(filter(None, (item.pop("text_path"), item.pop("json_path"))))
        items.append(item)
    if source.folder_repeats:
        repeat_by_folder(listing, names, items)
    for path in listing.paths:
        if path not in used and listing.place(path) not in own:
            listing.unread.add(unread_reason(path), listing.inside(path))
    listing.notes.append(caption_count(sum(map(has_text, items)), len(items)))
    return items


def neighbours(listing: Listing, images: Sequence[str]) -> set[str]:
    """The files in the folders of the images."""
    found: set[str] = set()
    for folder in sorted({path.rpartition("/")[0] for path in images}):
        found |= set(listing.fs.ls(folder, detail=False))
    return found


class Metadata:
    """Rows of the tables that describe images, by the image's path. files: the tables that were read."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, object]] = {}
        self.files: list[str] = []


def metadata_rows(listing: Listing, known: set[str], images: Sequence[str], source: SourceConfig) -> Metadata:
    """The rows of the tables that describe images; file names are relative to the table's folder.

    Tables are every ``metadata.jsonl``, ``.csv`` or ``.parquet`` (:data:`TABLE_NAMES`), and each .json, .csv, .tsv or
    .jsonl that names an image and lies next to none of its name. Of an image that several describe, a row of
    ``metadata`` counts most.

    Raises:
        ConfigError: a table is damaged, or has no column of file names or none named ``source.caption_column``.
    """
    found = Metadata()
    names = Names(images)
    stems = {os.path.splitext(path)[0] for path in images}
    tables = []
    for path in sorted(known):
        stem, suffix = os.path.splitext(path)
        meant = PurePosixPath(stem).name in TABLE_NAMES
        if (meant and is_table_file(path)) or (meant and suffix == ".txt" and stem not in stems):
            tables.append(path)
        elif stem not in stems and suffix.lower() in _BY_CONTENT:
            add_document(found, listing, path, names, source)
    for path in tables:
        add_table(found, listing, path, names, source)
    return found


def add_table(found: Metadata, listing: Listing, path: str, names: Names, source: SourceConfig) -> None:
    """The rows of one table; those that name no image are counted. A .txt without a column of files is none."""
    rows, notes = read_rows(listing.place(path))
    key = first_of(FILE_COLUMNS, rows[0]) if rows else None
    if path.endswith(".txt") and key is None:
        return
    found.files.append(path)
    listing.notes.extend(notes)
    if not rows:
        return
    if key is None:
        raise ConfigError(f"source.path: {path} has no column file_name.", f"Its columns: {', '.join(rows[0])}.")
    check_caption_column(source.caption_column, list(rows[0]), listing.named(path))
    listing.notes.extend(no_captions(listing.named(path), list(rows[0]), source.caption_column))
    described, absent = described_images(rows, path, names, source)
    found.rows |= described
    note_absent(listing, path, absent if listing.whole else [], len(rows))


def described_images(
    rows: Sequence[Mapping[str, object]], path: str, names: Names, source: SourceConfig
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What a table says, by image, and the names that no image has. Rows of one image join their captions."""
    folder = path.rpartition("/")[0]
    described: dict[str, dict[str, Any]] = {}
    absent: list[str] = []
    for row in rows:
        name = str(row.get(first_of(FILE_COLUMNS, row) or "") or "")
        image = names.find(folder, name)
        if image is None:
            absent.append(name)
            continue
        told = described_row(row, source.caption_column)
        described[image] = with_captions(described[image], told) if image in described else told
    return described, absent


def note_absent(listing: Listing, path: str, absent: Sequence[str], rows: int) -> None:
    """A line on the rows of a table whose file is not in the source. absent: their names."""
    if absent:
        first = f"{absent[0]!r}{' and the like' if len(absent) > 1 else ''}"
        listing.notes.append(
            f"{listing.named(path)}: {len(absent)} of {rows} rows name a file that is not there: {first}"
        )


def add_document(found: Metadata, listing: Listing, path: str, names: Names, source: SourceConfig) -> None:
    """The rows of one .json, .csv, .tsv or .jsonl of any name, if it describes images."""
    meant = PurePosixPath(path).stem in TABLE_NAMES
    try:
        rows, notes = read_rows(listing.place(path))
    except ConfigError:
        if meant:
            raise
        return
    described, absent = described_images(rows, path, names, source)
    if described or meant:
        check_caption_column(source.caption_column, columns_of(rows), listing.named(path))
        notes += no_captions(listing.named(path), columns_of(rows), source.caption_column)
        listing.notes.extend(notes)
        found.files.append(path)
        found.rows |= described
        note_absent(listing, path, absent, len(rows))


class CaptionFiles:
    """The text files next to images: of the same name, or where no other image claims it of the same but for case."""

    def __init__(self, known: set[str], images: Sequence[str]) -> None:
        self._known = known
        self._folded = {fold(path): path for path in known if path.lower().endswith(CAPTION_SUFFIXES)}
        self._images = Counter(fold(os.path.splitext(path)[0]) for path in images)

    def of(self, image: str) -> str | None:
        """The caption file of an image."""
        stem = os.path.splitext(image)[0]
        candidates = [f"{name}{suffix}" for suffix in CAPTION_SUFFIXES for name in (image, stem)]
        exact = next(filter(self._known.__contains__, candidates), None)
        if exact or self._images[fold(stem)] > 1:
            return exact
        return next(filter(None, map(self._folded.get, map(fold, candidates))), None)


def file_item(listing: Listing, path: str, known: set[str], text: str | None, source: SourceConfig) -> Item:
    """Where the parts of one image's sample lie. text: its caption file."""
    stem = str(PurePosixPath(path).with_suffix(""))
    described = f"{stem}.json" if f"{stem}.json" in known else None
    return {
        "name": listing.named(path),
        "place": listing.place(path),
        "text": text and listing.place(text),
        "json": described and listing.place(described),
        "caption_column": source.caption_column,
        "repeats": 1,
        "text_path": text,
        "json_path": described,
    }


def repeat_by_folder(listing: Listing, names: Sequence[str], items: Sequence[Item]) -> None:
    """Read repeats from folder names where every image lies in a folder named <N>_<name>, as kohya's tools want it."""
    folders = [name.rpartition("/")[0].rpartition("/")[2] for name in names]
    repeats: dict[str, int] = {}
    for folder in sorted(set(folders)):
        match = _REPEATS.fullmatch(folder)
        if match is None:
            return
        repeats[folder] = int(match[1])
    for item, folder in zip(items, folders, strict=True):
        item["repeats"] = repeats[folder]
    shown = in_words(repeats, "{!r} {} times")
    listing.notes.append(f"training repeats the images of {shown}; source.folder_repeats=false: once")


def describe_by_json(listing: Listing, item: Item) -> None:
    """Read the .json next to an image where nothing else has its caption; without a caption in it, it is not read."""
    if item["text"] or item["described"].get("text"):
        return
    fields = json_fields(item)
    if fields.get("text"):
        item["described"] = {**fields, "license": item["described"].get("license") or fields["license"]}
    elif not fields.get("license"):
        listing.unread.add(".json next to an image, without a caption", listing.inside(item["json_path"]))
    item["json"] = None


def has_text(item: Item) -> bool:
    """Whether an image has a caption; the content of local files decides, a remote one is taken to have some."""
    if item["described"].get("text"):
        return True
    if item["text"]:
        return not item["text"].startswith("/") or os.path.getsize(item["text"]) > 0
    return bool(item["json"])


def is_archive(path: str) -> bool:
    """Whether a file has the name of an archive that is not read."""
    return path.lower().endswith((".zip", ".rar", ".7z"))


def unread_reason(path: str) -> str:
    """Why nothing reads a file of the folder."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in (".jxl", ".psd", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".exr", ".eps", ".pdf"):
        return f"{suffix} is a format that is not supported"
    if is_archive(path):
        return f"{suffix} is an archive: unpack it"
    if suffix in CAPTION_SUFFIXES:
        return "captions without an image of their name"
    return f"{suffix or 'no ending'}: neither an image nor its caption"


def read_item(item: Item) -> Raw:
    """The bytes of an image file and its caption: from its text file, else from the table, else from its .json."""
    try:
        data = read_place(item["place"])
        mask = read_place(item["mask"]) if item["mask"] else None
        text, encoding = decode_text(read_place(item["text"])) if item["text"] else ("", "")
        described = item["described"] or (json_fields(item) if item["json"] else {})
    except EncodingError as error:
        return Raw(item["name"], None, error=f"its caption is {error}")
    several = tuple(described.get(CAPTIONS) or ()) if not text else ()
    text = text or str(described.get("text") or "")
    return Raw(
        item["name"],
        data,
        text,
        encoding,
        mask,
        described.get("license") or None,
        repeats=item["repeats"],
        captions=several,
    )


def json_fields(item: Item) -> dict[str, Any]:
    """Captions and licence of the .json next to an image, as img2dataset and booru tools write it."""
    try:
        values = json.loads(decode_text(read_place(item["json"]))[0] or "{}")
    except (ValueError, RecursionError):  # not a caption's JSON; tools keep all sorts of things there
        return {}
    return described_row(values, item["caption_column"]) if isinstance(values, dict) else {}


# --- masks


def mask_files(source: SourceConfig) -> dict[str, str]:
    """Places of the mask files by their path inside ``source.masks``."""
    if not source.masks:
        return {}
    fs, root = open_path(source.masks)
    if not fs.isdir(root):
        raise ConfigError(f"source.masks={source.masks} is not a folder.", f"Looked for {root}.")
    masks: dict[str, str] = {}
    for path in sorted(fs.find(root)):
        inside = path[len(root) :].lstrip("/")
        if is_image(inside) and not hidden(inside):
            masks[inside] = path if path.startswith("/") and "://" not in source.masks else fs.unstrip_protocol(path)
    if not masks:
        raise ConfigError(f"source.masks={source.masks} holds no image.", "One mask per image, with its file name.")
    return masks


def masks_of(source: SourceConfig, images: Sequence[str], given: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Place of the mask of every image that has one; images and masks by their path inside their folders."""
    pairs = pair_masks(f"source.masks={source.masks}", images, given)
    if not pairs:
        raise ConfigError(
            f"source.masks={source.masks} has a mask for none of the {len(images)} images of source.path.",
            f"Looked for {mask_pattern(images[0])} and the like; it holds {next(iter(given))} and the like.",
        )
    if len(pairs) < len(images):
        notes.append(f"source.masks={source.masks} has no mask for {len(images) - len(pairs)} images")
    return map_values(given.__getitem__, pairs)


def mask_pattern(image: str) -> str:
    """What is looked for in ``source.masks``, for an image by its path inside the source."""
    return f"{PurePosixPath(image).with_suffix('')}.*"

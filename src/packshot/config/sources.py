"""The kinds of sources that ``build_data.py`` reads: one row each.

A row's module has ``claims`` (which files of a listing it reads), ``list_items`` (one item per picture) and
``read_item`` (the bytes of one item). The first row that claims a file reads the source.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceKind:
    """help: the conventions in words, for ``--help`` and messages. module: the code that lists and reads."""

    help: str
    module: str


_ROOM = "packshot.make_dataset.sources"

SOURCES: dict[str, SourceKind] = {
    "saved": SourceKind("a folder of datasets' save_to_disk", f"{_ROOM}.saved"),
    "table": SourceKind(
        "Parquet with a column of pictures (image, img, jpg, png, webp) and columns for captions, mask, license",
        f"{_ROOM}.tables",
    ),
    "tar": SourceKind(
        "tar shards, plain or compressed (WebDataset, img2dataset): <key>.jpg, .txt, .json, .mask.png", f"{_ROOM}.tars"
    ),
    "list": SourceKind(
        "a .csv, .tsv, .jsonl, .json or .parquet list whose rows name files or URLs (downloaded once)", f"{_ROOM}.lists"
    ),
    "files": SourceKind(
        "image files, each with <name>.txt, <name>.caption or a row of metadata.jsonl, .csv or .parquet (file_name) or "
        "of any .json that names images; folders named <N>_<name> repeat their images N times (kohya)",
        f"{_ROOM}.files",
    ),
}


def conventions() -> str:
    """Every kind in one sentence, for ``--help``."""
    return "; ".join(row.help for row in SOURCES.values())

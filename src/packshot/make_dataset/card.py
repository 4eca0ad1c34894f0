"""The dataset card and the contact sheet: what a person looks at before training."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import starmap
from operator import attrgetter

import numpy as np
from PIL import Image, ImageOps

from packshot.runs.markdown import markdown_table

_TILE = 192  # px
_COLUMNS = 8
# Names that the hub knows; anything else is "other" there, and named in full in the table.
_HUB_LICENSES = ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "mit", "apache-2.0")


def card(
    dataset: str,
    licenses: Mapping[str, int],
    reasons: Mapping[str, int],
    remarks: Mapping[str, int],
    columns: Mapping[str, str],
    settings: object,
) -> str:
    """``README.md`` of a dataset: hub metadata, counts, licences, what was left out, columns, settings.

    licenses: rows per licence. reasons: rejected samples per reason. remarks: the same of kept ones. columns: meaning
    by name.
    """
    rows = sum(licenses.values())
    hub = {name if name in _HUB_LICENSES else "other" for name in map(str.lower, licenses)}
    lines = [
        "---",
        f"license: {hub.pop() if len(hub) == 1 else 'other'}",
        f"size_categories: {_size_category(rows)}",
        "configs:",
        "- config_name: default",
        "  data_files: part-*.parquet",
        "---",
        f"# Packshot {dataset} set\n",
        f"Images: {rows}. `rejected.parquet` names what was left out, with the reason and the value that decided, and",
        "(`kept`) images that are in the set with a remark;",
        "`report.html` and `contact_sheet.png` show images; `ledger.jsonl` records how each shard was made.\n",
        *markdown_table(("licence", "images"), licenses.items()),
        *(markdown_table(("left out because", "images"), reasons.items()) if reasons else ["Nothing was left out.\n"]),
        *(markdown_table(("kept with the remark", "images"), remarks.items()) if remarks else []),
        *markdown_table(("column", "meaning"), columns.items()),
        "Settings:\n",
        "```json",
        json.dumps(settings, indent=2, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _size_category(rows: int) -> str:
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "n>1M")
    return names[bisect_right((1_000, 10_000, 100_000, 1_000_000), rows)]


def count(values: Iterable[str]) -> dict[str, int]:
    """Occurrences by value, most frequent first, ties by name."""
    return dict(sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0])))


def contact_sheet(pairs: Iterable[tuple[Image.Image, Image.Image | None]]) -> Image.Image | None:
    """Tiles of (image | image with everything but the product tinted), or of images alone where there is no mask.

    None without any pair. One pair is held at a time.
    """
    tiles = list(starmap(_tile, pairs))
    if not tiles:
        return None
    width = max(map(attrgetter("width"), tiles))
    columns = min(_COLUMNS if width == _TILE else _COLUMNS // 2, len(tiles))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * _TILE), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * _TILE))
    return sheet


def _tile(image: Image.Image, mask: Image.Image | None) -> Image.Image:
    image.draft("RGB", (2 * _TILE, 2 * _TILE))  # large JPEGs are decoded at a fraction of their size
    views = [ImageOps.contain(ImageOps.exif_transpose(image).convert("RGB"), (_TILE - 4, _TILE - 4))]
    if mask is not None:
        small = mask.convert("L").resize(views[0].size, Image.Resampling.BOX)
        alpha_HW1 = np.asarray(small, np.float32)[..., None] / 255
        pixels_HWC = np.asarray(views[0], np.float32)
        tinted_HWC = 0.3 * pixels_HWC + 0.7 * np.array([255, 0, 255], np.float32)
        mixed_HWC = alpha_HW1 * pixels_HWC + (1 - alpha_HW1) * tinted_HWC
        views.append(Image.fromarray(np.round(mixed_HWC).astype(np.uint8)))
    tile = Image.new("RGB", (_TILE * len(views), _TILE), "white")
    for number, view in enumerate(views):
        tile.paste(view, (number * _TILE + (_TILE - view.width) // 2, (_TILE - view.height) // 2))
    return tile

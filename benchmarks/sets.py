"""Small datasets that several benchmarks train on, taken from the shipped renders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from packshot.dataset.rows import Rows
from packshot.render.rows import encode
from packshot.runs.files import replacing_folder, sha256

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "data" / "models" / "sdxl"
Pictures: TypeAlias = list[np.ndarray]  # uint8 (height, width, 3)


def spread(rows: Rows, count: int, first: int = 0) -> list[int]:
    """Indices evenly over a set; another ``first`` (0 or 1) gives others, up to half of the set."""
    return [int(place) + first for place in np.linspace(0, len(rows) - 2, count)]


def write_set(
    folder: Path, rows: Rows, indices: list[int], change: Callable[[np.ndarray], np.ndarray] | None = None
) -> None:
    """A dataset of these rows, with their captions and masks. change: is applied to each picture, uint8 (H, W, 3)."""
    if folder.exists():
        return
    lines = []
    for index in indices:
        row = rows.read(index, ("image", "mask"))
        image = Image.fromarray(change(np.asarray(row["image"]))) if change else row["image"]
        picture = encode(image, None)
        lines.append(
            {
                "image": picture,
                "mask": encode(row["mask"], None),
                "text": row["text"],
                "id": sha256(picture["bytes"]),
                "license": row["license"],
                "source": f"{rows.path}, sample {row['id']}",
                "width": image.width,
                "height": image.height,
            }
        )
    with replacing_folder(folder) as temporary:
        pq.write_table(pa.Table.from_pylist(lines), temporary / "part-00000.parquet")

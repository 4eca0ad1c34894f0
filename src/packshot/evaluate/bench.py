"""PackshotBench: held-out renders whose mask, shadow and scene are known, for any system that places products.

Each item is a product before a plain backdrop, its true mask, and the words of a scene. The wanted picture is the
render of this product in this scene, so that the plate, the shadow and the product's place are known. The rules are in
docs/bench.md.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from packshot.config.compose import compose
from packshot.dataset.rows import Rows, load_rows
from packshot.errors import ConfigError
from packshot.evaluate.items import TABLE, Item, Unpacked, by_ids, open_items, write_items
from packshot.evaluate.samples import Json
from packshot.evaluate.trial import evaluate_items
from packshot.generate.composite import blend
from packshot.runs.arguments import Arguments
from packshot.runs.files import resolve
from packshot.runs.folder import discard_refused

HELD_OUT = "data/bench"  # its parquet files are links to data/rendered/heldout
ID_LENGTH = 16  # of an item's id: the beginning of its row's
FROZEN = "data/bench/heldout.csv"  # the rows by id, with the digest of picture and mask (Rows.digest)
BACKDROP = (236, 236, 236)  # the studio wall behind the product
REFERENCE_STEP = 7  # an item's reference is the plate of the item this far on
# The row of the table, by heading: the measure, how it is printed.
COLUMNS = {
    "core identical": ("core_identical_share", "{:.1%}"),
    "core ΔE": ("core_delta_e", "{:.2f}"),
    "edge ΔE": ("edge_delta_e", "{:.2f}"),
    "halo": ("halo", "{:.3f}"),
    "growth": ("growth", "{:.3f}"),
    "moved": ("shift", "{:.3f}"),
    "shadow strength": ("shadow_strength", "{:.2f}"),
    "shadow error": ("shadow_error", "{:.3f}"),
    "slots": ("slot_adherence", "{:.2f}"),
    "CMMD, plain": ("cmmd, plain", "{:.3f}"),
    "CMMD, base encoder": ("cmmd, base encoder", "{:.3f}"),
    "seconds": ("seconds", "{:.1f}"),
}


def bench_rows(rows: Rows) -> list[int]:
    """The rows that the benchmark takes, in the order of its table.

    Raises:
        ConfigError: a row is missing, or has another picture or mask than the benchmark was published with.
    """
    places = {sample_id: index for index, sample_id in enumerate(rows.ids)}
    with resolve(FROZEN).open(encoding="utf-8", newline="") as file:
        frozen = list(csv.DictReader(file))
    for row in frozen:
        index = places.get(row["id"])
        if index is None or rows.digest(index) != row["sha256"]:
            raise ConfigError(
                f"{HELD_OUT} {'lacks' if index is None else 'has another picture or mask for'} {row['id']}.",
                f"{FROZEN} names the rows of the benchmark; check data/ out as it was released.",
            )
    return [places[row["id"]] for row in frozen]


def bench_items(rows: Rows) -> Iterator[Unpacked]:
    """The items, with every picture that is known of them."""
    indices = bench_rows(rows)
    for number, index in enumerate(indices):
        row = rows.read(index, ("image", "mask", "cutout", "plate", "shadow"))
        other = rows.read(indices[(number + REFERENCE_STEP) % len(indices)], ("plate",))
        pictures = {
            "photo": studio_photo(row["image"], row["mask"], row["cutout"]),
            "mask": row["mask"],
            "truth": row["image"],
            "plate": row["plate"],
            "shadow": row["shadow"],
            "reference": other["plate"],
        }
        yield Unpacked(row["id"][:ID_LENGTH], row["text"], pictures)


def studio_photo(image: Image.Image, mask: Image.Image, cutout: Image.Image) -> Image.Image:
    """The product before the backdrop, with the render's own pixels where the mask is full."""
    matte_HW = np.asarray(mask)
    colours_HW3 = np.asarray(cutout.convert("RGBA"))[..., :3]
    wall_HW3 = np.full_like(colours_HW3, BACKDROP)
    photo_HW3 = blend(np.ascontiguousarray(colours_HW3), matte_HW, wall_HW3)
    return Image.fromarray(np.where((matte_HW == 255)[..., None], np.asarray(image), photo_HW3))


def export(folder: Path) -> list[Item]:
    """Write the items for a system to read. Raises ConfigError: the folder is not empty, or the renders are missing."""
    refuse_used("--export", folder)
    rows = load_rows("bench", HELD_OUT)
    rows.refuse_without("bench", ("mask", "cutout", "plate", "shadow"))
    return write_items(bench_items(rows), folder)


def score(pictures: list[str], out: Path, overrides: Sequence[str]) -> Json:
    """Measure folders or tables of pictures; returns what report.json has.

    Raises:
        ConfigError: ``out`` is not a new folder, the pictures are of no item, or the items beside ``out`` are others.
    """
    refuse_used("--out", out)
    items = out.with_name(f"{out.name}-items")
    if not (items / TABLE).exists():
        export(items)
    elif not has_items(items):
        raise ConfigError(f"{items} has other items than the benchmark.", "Delete the folder; it is written again.")
    # The captioner that is shipped writes no scenes before it is trained.
    captioner = [] if any(map(names_captioner, overrides)) else ["captioner=none"]
    config = compose("evaluate", ["tracking=none", *captioner, *overrides])
    # paths are set here, because they may have characters that overrides read otherwise
    config = replace(config, items=str(items / TABLE), runs=pictures, run=replace(config.run, dir=str(out)))
    try:
        evaluate_items(config)
    except ConfigError:
        discard_refused()
        raise
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def refuse_used(flag: str, folder: Path) -> None:
    """Raises ConfigError where a new folder cannot be made because there is something of that name."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{flag} {folder} is a file.", "Name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{flag} {folder} is not empty.", "Name a new folder.")


def has_items(folder: Path) -> bool:
    """Whether a folder of exported items has those of the benchmark."""
    try:
        return list(by_ids(open_items(folder, folder))) == bench_ids()
    except ConfigError:  # a table that is cut, or of another version
        return False


def names_captioner(override: str) -> bool:
    """Whether an override chooses or sets the captioner."""
    return override.startswith("captioner")


def bench_ids() -> list[str]:
    """The ids of the benchmark's items, in their order."""
    rows = load_rows("bench", HELD_OUT)
    return sorted(rows.ids[index][:ID_LENGTH] for index in bench_rows(rows))


def table(report: Json) -> str:
    """The systems of a report as rows of the benchmark's table, in Markdown."""
    lines = ["| system | items | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for name, found in report["systems"].items():
        cells = [cell(found, measure, form) for measure, form in COLUMNS.values()]
        complete = report["items"]["count"] - len(found["missing"])
        several = "" if found["pictures"] == complete else f", {found['pictures']} pictures"
        lines.append(f"| {name} | {complete} of {report['items']['count']}{several} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(found: Json, measure: str, form: str) -> str:
    """A figure with its interval, or a dash where it was not measured."""
    known = found["measures"].get(measure)
    if known is None:
        value = found["set"].get(measure)
        return "–" if value is None else form.format(value)
    edges = f"{form.format(known['low'])} to {form.format(known['high'])}"
    return f"{form.format(known['mean'])} ({edges})"


def main(arguments: Sequence[str]) -> None:
    """``packshot bench``. Raises ConfigError where the arguments do not fit."""
    parser = Arguments(prog="packshot bench", description=__doc__)
    parser.add_argument("pictures", nargs="*", help="folders of <id>.png, or tables with id, picture, seconds")
    parser.add_argument("--export", type=Path, help="write the photographs, masks and words to a new folder, and stop")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="new folder of the report")
    parser.add_argument("--set", action="append", default=[], help="a key of evaluate.py, such as suite=preservation")
    given = parser.parse_args(list(arguments))
    if given.export:
        items = export(given.export)
        print(f"{len(items)} items: {given.export / TABLE}; name your pictures <id>.png, then: packshot bench <folder>")
    elif given.pictures:
        print(table(score(given.pictures, given.out, given.set)))
    else:
        raise ConfigError("packshot bench names no pictures.", "packshot bench --export <folder> writes the items.")

"""Campaigns: a table whose rows are jobs, or whose columns are combined with each other."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TypeAlias, get_args, get_origin

from packshot.config.checks import validate
from packshot.config.keys import Hint, describe, fields, nearest
from packshot.config.schema import Generate, GenerateSettings
from packshot.config.unread import refuse_unread
from packshot.dataset.text_files import EncodingError, csv_rows, decode_text, json_rows
from packshot.errors import ConfigError, PackshotError
from packshot.generate.certificate import LAYERS, load_certificates
from packshot.generate.jobs import Job, folder_of, group_job, mask_files, product_files
from packshot.runs.files import file_sha256, readable, replacing_file
from packshot.runs.folder import log

Scalar: TypeAlias = str | int | float | bool | Enum
Cell: TypeAlias = Scalar | list[Scalar]
NOTE = "note."  # columns that begin so are the person's own; the run's campaign.csv repeats them
REPLACED = "replaced"  # folder for pictures that the campaign no longer asks for
INDEX = "campaign.csv"
# names of a job's files: a picture or its certificate, one of its layers, or the product's photo
_MADE = re.compile(r"(?P<name>.+-[0-9a-f]{10})-(?:input|doubt|(?P<number>\d+)(?:-[a-z]+)?)")

# Short names of columns, besides the config keys themselves.
_SHORT = {"seed": "run.seed"}
_OTHERS = (
    "product",
    "mask",
    "together",
    "prompt",
    "reference",
    "references",
    "reference_weights",
    "num_images",
    "run.seed",
)
# Columns that belong together: campaign_cross combines what stands in one row of them as one value.
_TOGETHER = {
    "product": ("product", "mask", "together"),
    "words": ("prompt", "negative_prompt", "scene."),
    "canvas": ("size", "aspect_ratio", "placement", "product_scale", "margin", "position"),
    "reference": ("reference",),
}
_PATHS = ("product", "mask", "reference", "references")


@dataclass(frozen=True)
class Row:
    """What a row sets. where: names it in messages. values: by config key. notes: the person's own columns."""

    where: str
    values: dict[str, Cell]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Campaign:
    """The jobs of a campaign file. rows: for each job, by its name, the row that asked for it first."""

    jobs: list[Job]
    rows: dict[str, Row]


def allowed_keys() -> dict[str, tuple[dataclasses.Field[Cell], Hint]]:
    """The config keys that a campaign may set for each row."""
    known = {key: (entry, hint) for key, entry, hint in fields(Generate)}
    wanted = {key for key, _, _ in fields(GenerateSettings)} | set(_OTHERS)
    wanted |= {key for key in known if key.startswith(("scene.", "output."))}
    return {key: known[key] for key in known if key in wanted}


def plan_campaign(config: Generate) -> Campaign:
    """The jobs of ``campaign``, those of one product after each other. Every row is checked before any picture is made.

    The name of a job ends in a digest of all that its row asks for and of the files that it names: a row that has
    changed has another name, and the pictures of all other rows stay.

    Raises:
        ConfigError: names the row and the key that is wrong.
    """
    assert config.campaign is not None
    table = readable("campaign", config.campaign)
    rows = read_campaign(table)
    count = len(rows)
    if config.campaign_cross:
        rows = crossed(rows)
    campaign = Campaign([], {})
    digests: dict[Path, str] = {}
    repeated = 0
    for row in rows:
        for job in row_jobs(config, row, table.parent, digests):
            if job.name in campaign.rows:
                repeated += 1
                continue
            campaign.rows[job.name] = row
            campaign.jobs.append(job)
    if repeated:
        log.warning("campaign: %d jobs repeat an earlier row, and are made once", repeated)
    # A product is prepared once, so its jobs follow each other; the sort keeps the rows' order otherwise.
    places: dict[Path, int] = {}
    for job in campaign.jobs:
        places.setdefault(job.product, len(places))
    campaign.jobs.sort(key=lambda job: places[job.product])
    pictures = sum(job.config.num_images for job in campaign.jobs)
    log.info("campaign: %d rows, %d jobs, %d pictures", count, len(campaign.jobs), pictures)
    return campaign


# ---- the table ----


def read_campaign(table: Path) -> list[Row]:
    """The rows of a CSV file or of JSON lines.

    Raises:
        ConfigError: it is neither, damaged or empty, or a column is not known.
    """
    suffix = table.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise ConfigError(f"campaign={table} is not a table.", "Expected a .csv or .jsonl file.")
    try:
        text, _ = decode_text(table.read_bytes())
        found = json_rows(text, f"campaign={table}") if suffix in (".jsonl", ".ndjson") else csv_rows(text)
    except (OSError, EncodingError, csv.Error) as error:
        raise ConfigError(f"campaign={table} cannot be read ({error}).", "Save it again, as UTF-8.") from error
    if not found:
        raise ConfigError(f"campaign={table} has no rows.", "Each row is one job; the columns are config keys.")
    keys = allowed_keys()
    return [read_row(f"campaign row {number}", cells, keys) for number, cells in enumerate(found, 1)]


def read_row(
    where: str, cells: Mapping[str, Cell | None], keys: Mapping[str, tuple[dataclasses.Field[Cell], Hint]]
) -> Row:
    """One row. An empty cell leaves a key as the command line has it.

    Raises:
        ConfigError: a column is not known, or a cell has a value of the wrong type.
    """
    row = Row(where, {}, {})
    for column, cell in cells.items():
        key = _SHORT.get(column, column)
        if column.startswith(NOTE):
            row.notes[column] = "" if cell is None else str(cell)
            continue
        if key not in keys:
            close = nearest(column, [*keys, *_SHORT])
            meant = f"Did you mean {close}? " if close else ""
            raise ConfigError(
                f"{where}: there is no column {column!r}.",
                f"{meant}Columns are config keys; name your own ones {NOTE}{column.strip() or 'sku'}.",
            )
        if cell is None or cell == "":
            continue
        if key in row.values:
            raise ConfigError(f"{where}: {column} and another column both set {key}.", "Leave one of them out.")
        entry, hint = keys[key]
        try:
            row.values[key] = read_cell(cell, hint)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{where}: {column}={cell} has a value of the wrong type.", f"{column} takes {describe(entry, hint)}."
            ) from error
    return row


def read_cell(cell: Cell, hint: Hint) -> Cell:
    """A cell as the value of a config key.

    Raises:
        ValueError, TypeError, KeyError: it is not one.
    """
    if get_origin(hint) is list:
        kind = get_args(hint)[0]
        return [read_scalar(item, kind) for item in list_items(cell)]
    if isinstance(hint, UnionType):
        return read_cell(cell, get_args(hint)[0])
    if isinstance(cell, list) or not isinstance(hint, type):
        raise TypeError("a list stands where one value is wanted")
    return read_scalar(cell, hint)


def read_scalar(cell: Scalar, hint: type) -> Scalar:
    """One value of a cell. Raises ValueError, KeyError: it is not one of the type ``hint``."""
    text = str(cell).strip()
    if issubclass(hint, Enum):
        return hint[text]
    if hint is bool:
        return {"true": True, "false": False}[text.lower()]
    if hint is int:
        return int(text)
    return float(text) if hint is float else text


def list_items(cell: Cell) -> list[Scalar]:
    """The items of a list: ``[800, 600]``, ``800x600``, or texts between semicolons."""
    if isinstance(cell, list):
        return list(cell)
    text = str(cell).strip()
    if text.startswith("[") and text.endswith("]"):
        return [item.strip() for item in text[1:-1].split(",") if item.strip()]
    width, times, height = text.partition("x")
    if times and width.strip().isdigit() and height.strip().isdigit():
        return [width, height]
    return [item.strip() for item in text.split(";") if item.strip()]


# ---- all combinations ----


def axis_of(key: str) -> str:
    """What a key is combined with as one value; most keys stand alone."""
    for axis, members in _TOGETHER.items():
        if any(key == member or (member.endswith(".") and key.startswith(member)) for member in members):
            return axis
    return key


def crossed(rows: Iterable[Row]) -> list[Row]:
    """Every combination of the distinct values of the columns.

    Raises:
        ConfigError: the table has notes, which belong to one row.
    """
    axes: dict[str, list[dict[str, Cell]]] = {}
    for row in rows:
        if row.notes:
            raise ConfigError(
                f"campaign: {next(iter(row.notes))} belongs to a row, and campaign_cross=true combines columns.",
                "Leave out the column, or campaign_cross.",
            )
        parts: dict[str, dict[str, Cell]] = {}
        for key, value in row.values.items():
            parts.setdefault(axis_of(key), {})[key] = value
        for axis, part in parts.items():
            distinct = axes.setdefault(axis, [])
            if part not in distinct:
                distinct.append(part)
    combined = []
    for number, parts_of_job in enumerate(itertools.product(*axes.values()), 1):
        values: dict[str, Cell] = {}
        for part in parts_of_job:
            values |= part
        combined.append(Row(f"campaign combination {number}", values))
    return combined


# ---- jobs ----


@contextmanager
def named(where: str) -> Iterator[None]:
    """Errors inside begin with the row that they come from."""
    try:
        yield
    except PackshotError as error:
        error.args = (f"{where}: {error.args[0]}", *error.args[1:])
        raise


def row_jobs(config: Generate, row: Row, beside: Path, digests: dict[Path, str]) -> list[Job]:
    """The jobs of a row: one for its product, or one for each of a folder.

    beside: the folder of the table, to which paths may be relative. digests: of files that were hashed before.
    """
    with named(row.where):
        settings = with_values(config, {key: found_beside(key, value, beside) for key, value in row.values.items()})
        validate(settings)
        GenerateSettings.check_placement(settings)
        refuse_unread(settings)
        files = product_files("product", settings.product)
        masks = mask_files(settings.mask, files, folder_of("product", settings.product))
        references = [readable("reference", path) for path in settings.reference_files()]
    jobs = []
    for some in [files] if settings.together else [[file] for file in files]:
        given = [mask for mask in map(masks.get, some) if mask]
        used = [*some, *given, *references]
        for path in used:
            if path not in digests:
                digests[path] = file_sha256(path)
        key = job_digest(settings, [digests[path] for path in used])
        if settings.together:
            name = Path(settings.product).resolve().name
            with named(row.where):
                jobs.append(group_job(settings, files, masks, f"{name}-{key}", f"{row.where} ({name})"))
        else:
            [file] = some
            jobs.append(Job(f"{file.stem}-{key}", file, masks[file], settings, f"{row.where} ({file.name})"))
    return jobs


def found_beside(key: str, value: Cell, beside: Path) -> Cell:
    """A path that is relative to the table, where such a file exists; other values as they are."""
    if key not in _PATHS:
        return value
    if isinstance(value, list):
        return [str(found_beside(key, str(path), beside)) for path in value]
    near = beside / str(value)
    return str(near) if near.exists() else value


def with_values(config: Generate, values: Mapping[str, Cell]) -> Generate:
    """A copy of a config with other values of some keys."""
    changed: dict[str, Cell | Generate] = {}
    nested: dict[str, dict[str, Cell]] = {}
    for key, value in values.items():
        group, dot, name = key.partition(".")
        if dot:
            nested.setdefault(group, {})[name] = value
        else:
            changed[key] = value
    for group, inner in nested.items():
        changed[group] = dataclasses.replace(getattr(config, group), **inner)
    return dataclasses.replace(config, **changed)


def job_digest(config: Generate, files: list[str]) -> str:
    """Identity of a job: what is asked for, as far as it differs from the defaults, and the hashes of its files.

    How many pictures are asked for is left out: more of them leave those that are there as they are.
    """
    asked: dict[str, str] = {}
    for key, (entry, _) in allowed_keys().items():
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if key not in (*_PATHS, "num_images") and value != default:
            asked[key] = str(value)
    text = json.dumps([asked, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


# ---- the run folder ----


def set_aside(folder: Path, jobs: Iterable[Job]) -> None:
    """Move the pictures that no job of the campaign asks for any more to ``replaced/``, and count them."""
    wanted = {job.name: job.config.num_images for job in jobs}
    moved = 0
    for place in (folder, folder / LAYERS):
        for file in sorted(place.glob("*")):
            made = _MADE.fullmatch(file.stem)
            if made is None or int(made["number"] or 0) < wanted.get(made["name"], 0):
                continue
            target = folder / REPLACED / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
            moved += place == folder and file.suffix == ".json"
    if moved:
        log.warning("%d pictures are not asked for any more; they are in %s", moved, folder / REPLACED)


def write_index(folder: Path, campaign: Campaign) -> None:
    """``campaign.csv``: which row asked for which pictures, and what became of them; for a spreadsheet."""
    keys: dict[str, None] = {}
    for row in campaign.rows.values():
        keys |= dict.fromkeys([*row.notes, *row.values])
    certificates = load_certificates(folder)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "picture", "status", "reasons", *keys])
    for name, row in campaign.rows.items():
        cells = [cell_text({**row.notes, **row.values}.get(key, "")) for key in keys]
        for stem, certificate in certificates.items():
            if stem.rpartition("-")[0] == name:
                reasons = " ".join(certificate["reasons"])
                writer.writerow([row.where.rpartition(" ")[2], f"{stem}.png", certificate["status"], reasons, *cells])
    with replacing_file(folder / INDEX) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8-sig")


def cell_text(value: object) -> str:
    """A value as a cell that a campaign file may have again."""
    if isinstance(value, list):
        return ";".join(map(str, value)) if all(isinstance(item, str) for item in value) else str(value)
    return str(value).lower() if isinstance(value, bool) else str(value)

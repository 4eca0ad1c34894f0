"""Pictures of a dataset by row without holding them in memory.

Parquet gives out whole row groups, hundreds of megabytes at times; training wants single rows in any order. So the
picture columns are copied once into an Arrow file, as the ``datasets`` library does, and mapped into memory: the system
reads what is touched and drops it when memory is short, and processes share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from packshot.runs.files import replacing_file, writing
from packshot.runs.folder import log
from packshot.runs.progress import progress

BATCH = 16  # rows copied at a time

REPAIR = "Copy it again, or delete it and build the dataset again: run.resume=true makes what is missing."


def first_damaged(files: Sequence[Path]) -> Path | None:
    """The first of Parquet files whose end, which lists its columns, cannot be read."""
    for file in files:
        try:
            pq.read_metadata(file)
        except (OSError, pa.ArrowException):
            return file
    return None


def read_tables(files: Sequence[Path], pictures: Sequence[str] | None, cache: str | None) -> tuple[pa.Table, pa.Table]:
    """(all but pictures, pictures) of Parquet files, as two tables of as many rows.

    pictures: names of the columns to read; None: all. cache: folder for the Arrow file; None: read into memory.

    Raises:
        OSError, ValueError: as pyarrow does, when a file is not whole.
        PackshotError: the Arrow file cannot be written.
    """
    tables: list[pa.Table] = []
    shown: list[pa.Schema] = []
    for file in files:  # one by one: pq.read_table imports pandas, and a process may open 1,024 files
        with pq.ParquetFile(file) as opened:
            seen = pa.schema(filter(holds_pictures, opened.schema_arrow))
            tables.append(opened.read([name for name in opened.schema_arrow.names if name not in seen.names]))
            shown.append(seen)
    table = pa.concat_tables(tables, promote_options="default")
    schema = pa.unify_schemas(shown)
    if pictures is not None:
        schema = pa.schema(filter(lambda field: field.name in pictures, schema))
    schema = schema.remove_metadata()
    if cache is None:
        return table, pa.Table.from_batches(read_batches(files, schema), schema)
    return table, mapped_copy(files, table.num_rows, schema, Path(cache))


def mapped_copy(files: Sequence[Path], rows: int, schema: pa.Schema, folder: Path) -> pa.Table:
    """The memory-mapped copy of the pictures. One that is damaged is removed and written again.

    Raises:
        PackshotError: the Arrow file cannot be written.
        ValueError: the dataset's own files are damaged.
    """
    path = copied(files, rows, schema, folder)
    try:
        found = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        log.warning("cache file %s is damaged (%s): removed, the pictures are copied again", path, error)
    else:
        if found.num_rows == rows:
            return found
        log.warning("cache file %s has %d rows instead of %d: copied again", path, found.num_rows, rows)
    path.unlink(missing_ok=True)
    return pa.ipc.open_file(pa.memory_map(str(copied(files, rows, schema, folder)))).read_all()


def holds_pictures(field: pa.Field) -> bool:
    """Whether a column holds encoded pictures."""
    return pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0


def read_batches(files: Sequence[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The columns of a schema, ``BATCH`` rows at a time; null where a file lacks one."""
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                here = set(schema.names) & set(file.schema_arrow.names)
                for batch in file.iter_batches(BATCH, columns=sorted(here)):
                    yield with_columns(batch, schema)
        except OSError as error:  # the caller writes a file too, and would take the error for one of its own
            raise ValueError(str(error)) from error


def with_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with exactly the columns of a schema, null where it lacks one."""
    columns: list[pa.Array] = []
    for field in schema:
        found = field.name in batch.schema.names
        columns.append(batch.column(field.name).cast(field.type) if found else pa.nulls(len(batch), field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def copied(files: Sequence[Path], rows: int, schema: pa.Schema, folder: Path) -> Path:
    """The Arrow file of these columns of these files, which is written unless it is there.

    By one process, while others that want it wait: those of a run do not know each other yet, and a large set must not
    be copied once for each of them.
    """
    states = ((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    name = hashlib.sha256(repr((*states, str(schema))).encode()).hexdigest()[:16]
    path = folder / f"pictures-{name}.arrow"
    if path.exists():
        return path
    with writing(str(path), "data.cache_dir names another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{path.name}.lock", mode=0o666):
            if path.exists():
                return path
            for left in folder.glob(f".{path.name}.*.tmp"):  # of a killed process: nobody else has the lock
                log.info("removed %s (%.1f MiB), which a killed run had left", left, left.stat().st_size / 2**20)
                left.unlink()
            with (
                replacing_file(path) as temporary,
                pa.ipc.new_file(str(temporary), schema) as out,
                progress(f"copying the pictures of {files[0].parent}", rows) as advance,
            ):
                for batch in read_batches(files, schema):
                    out.write_batch(batch)
                    advance(len(batch))
    return path

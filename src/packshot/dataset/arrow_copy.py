"""Pictures of a dataset by row without holding them in memory.

Parquet gives out whole row groups, hundreds of megabytes at times; training wants single rows in any order. So the
picture columns are copied once into an Arrow file, as the ``datasets`` library does, and mapped into memory: the system
reads what is touched and drops it when memory is short, and processes share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from packshot.runs.files import replacing_file, writing
from packshot.runs.progress import progress

BATCH = 16  # rows copied at a time


def read_tables(files: Sequence[Path], pictures: Sequence[str] | None, spool: str | None) -> tuple[Any, Any]:
    """(all but pictures, pictures) of Parquet files, as two tables of as many rows.

    pictures: names of the columns to read; None: all. spool: folder for the Arrow file; None: read into memory.

    Raises:
        OSError, ValueError: as pyarrow does, when a file is not whole.
        PackshotError: the Arrow file cannot be written.
    """
    tables, shown = [], []
    for file in files:  # one by one: pq.read_table imports pandas, and a process may open 1,024 files
        with pq.ParquetFile(file) as opened:
            fields = list(opened.schema_arrow)
            tables.append(opened.read([field.name for field in fields if not _shows(field)]))
            shown.append(pa.schema([field for field in fields if _shows(field)]))
    table, schema = pa.concat_tables(tables, promote_options="default"), pa.unify_schemas(shown)
    if pictures is not None:
        schema = pa.schema([field for field in schema if field.name in pictures])
    schema = schema.remove_metadata()
    if spool is None:
        return table, pa.Table.from_batches(_batches(files, schema), schema)
    return table, pa.ipc.open_file(pa.memory_map(str(_spooled(files, table.num_rows, schema, Path(spool))))).read_all()


def _shows(field: Any) -> bool:
    """Whether a column holds encoded pictures."""
    return pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0


def _batches(files: Sequence[Path], schema: Any) -> Iterator[Any]:
    """The columns of a schema, ``BATCH`` rows at a time; null where a file lacks one."""
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                here = {field.name for field in schema} & set(file.schema_arrow.names)
                for batch in file.iter_batches(BATCH, columns=sorted(here)):
                    columns = [
                        batch.column(field.name).cast(field.type)
                        if field.name in here
                        else pa.nulls(len(batch), field.type)
                        for field in schema
                    ]
                    yield pa.RecordBatch.from_arrays(columns, schema=schema)
        except OSError as error:  # whoever writes what comes from here would take it for its own
            raise ValueError(str(error)) from error


def _spooled(files: Sequence[Path], rows: int, schema: Any, folder: Path) -> Path:
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
            with (
                replacing_file(path) as temporary,
                pa.ipc.new_file(str(temporary), schema) as out,
                progress(f"copying the pictures of {files[0].parent}", rows) as advance,
            ):
                for batch in _batches(files, schema):
                    out.write_batch(batch)
                    advance(len(batch))
    return path

"""Files of predictions, written as the rows come: csv or parquet, whole or not there."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

SUFFIXES = (".csv", ".parquet")
_ROWS_AT_ONCE = 10_000  # of a parquet file

Rows = Iterator[Mapping[str, Any]]


def check_output(output: str) -> None:
    """Refuse a file of another type, or in a folder that does not exist."""
    path = Path(output)
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise ValueError(f"`output` (={output!r}) must be a file that ends in {' or '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`output` (={output!r}): there is no folder {str(path.parent)!r}; make it first.")


def write_rows(rows: Rows, output: str | None) -> int:
    """Write rows of the same columns, to a file that is there when all are in it, or as csv to stdout; return their number."""
    if output is None:
        return _write_csv(rows, sys.stdout)
    path = Path(output)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix.lower() == ".csv":
            with open(draft, "w", newline="", encoding="utf-8") as stream:
                count = _write_csv(rows, stream)
        else:
            count = _write_parquet(rows, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def _write_csv(rows: Rows, stream: IO[str]) -> int:
    writer, count = csv.writer(stream, lineterminator="\n"), 0
    for row in rows:
        if not count:
            writer.writerow(row)
        # Nine digits tell any two numbers in single precision apart.
        writer.writerow([f"{value:.9g}" if isinstance(value, float) else value for value in row.values()])
        count += 1
    return count


def _write_parquet(rows: Rows, path: Path) -> int:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    first = list(islice(rows, _ROWS_AT_ONCE))
    table, count = pa.Table.from_pylist(first), len(first)
    with ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=table.schema))
            count += len(chunk)
    return count

"""Tables as they stand: the cells of csv and tsv files are text, unless a whole column is of integers."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from etf_adapt.errors import DataError

_ROWS_AT_ONCE = 10_000
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")  # as it would be written again: 007, +7 and 1.0 are text


def read_tables(files: Sequence[Path]) -> Dataset:
    """Read csv files, or tsv files by their suffix, of one header as one data set; empty cells are missing."""
    # Not by `datasets`' own reader: pandas guesses types anew for each part of a file (001 becomes 1, in some rows), shifts
    # rows of one field too many, and lets an unclosed quotation mark swallow rows.
    names: list[str] | None = None
    parts: list[list[list[str | None]]] = []  # columns of cells, some rows at once
    for file in files:
        rows = _records(file)
        _, header = next(rows, (0, []))
        header = [name.strip() or f"Unnamed: {position}" for position, name in enumerate(header)]
        if repeated := [name for name in header if header.count(name) > 1]:
            raise DataError(f"`{file}` names column `{repeated[0]}` twice: rename one.")
        if names is not None and set(header) != set(names):
            raise DataError(f"`{file}` has columns {', '.join(header)}, and `{files[0]}` has {', '.join(names)}.")
        names = header if names is None else names
        order = [header.index(name) for name in names]
        for chunk in _chunks(file, rows, len(header)):
            columns = list(zip(*chunk, strict=True))
            parts.append([[cell or None for cell in columns[position]] for position in order])
    arrays = [_typed([part[position] for part in parts]) for position in range(len(names or ()))]
    return Dataset(InMemoryTable(pa.table(arrays, names=names or [])))


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a file with the number of the line on which each begins, blank lines left out."""
    # In tab-separated files, of corpora for the most part, a quotation mark is a character.
    is_tsv = file.suffix.lower() == ".tsv"
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"delimiter": ",", "strict": True}
    before = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, **options)  # type: ignore[arg-type]
            for record in reader:
                if record:
                    yield line, record
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"`{file}`: the row that begins on line {line} cannot be read ({error}): a quotation mark within a cell is "
            "doubled, and the cell is put between quotation marks."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"`{file}` is not encoded in UTF-8 ({error.reason} after line {line}): save it anew."
        ) from error
    finally:
        csv.field_size_limit(before)


def _chunks(file: Path, rows: Iterator[tuple[int, list[str]]], width: int) -> Iterator[list[list[str]]]:
    """Yield some rows at once, each as wide as the header."""
    chunk: list[list[str]] = []
    for line, row in rows:
        if len(row) != width:
            quote = "put a cell that holds the separator between quotation marks"
            raise DataError(
                f"`{file}`: the row on line {line} has {len(row)} fields, and the header has {width}: "
                f"{quote if len(row) > width else 'add what is missing'}."
            )
        chunk.append(row)
        if len(chunk) == _ROWS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _typed(parts: list[list[str | None]]) -> pa.ChunkedArray:
    """Return a column as integers where all its cells are, and as text otherwise."""
    cells = (cell for part in parts for cell in part if cell is not None)
    is_integer = any(cell is not None for part in parts for cell in part) and all(map(_INTEGER.fullmatch, cells))
    if is_integer:
        whole = [pa.array([None if cell is None else int(cell) for cell in part], pa.int64()) for part in parts]
        return pa.chunked_array(whole, pa.int64())
    return pa.chunked_array([pa.array(part, pa.string()) for part in parts], pa.string())

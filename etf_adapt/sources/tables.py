"""Tables as they stand: the cells of csv and tsv files are text, unless a whole column is of integers; json has types."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import InMemoryTable

from etf_adapt.errors import DataError

_ROWS_AT_ONCE = 10_000
_INTEGER = r"^(0|-?[1-9]\d{0,17})$"  # as it would be written again: 007, +7 and 1.0 are text


def read_tables(files: Sequence[Path]) -> Dataset:
    """Read csv, tsv, json or jsonl files, one type by suffix, as one data set; empty cells are missing."""
    # Not by `datasets`' own readers: pandas guesses types anew for each part of a file (001 becomes 1, in some rows), shifts
    # rows of one field too many, and lets an unclosed quotation mark swallow rows; of json files the first part sets the
    # types of all ("007" becomes 7), and dates become times.
    is_json = files[0].suffix.lower() in (".json", ".jsonl")
    table = _read_json(files) if is_json else _read_csv(files)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.suffix} {file.stat().st_size} ".encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    # `datasets` would join all rows to hash them, which fails for more than 2 GiB of text.
    return Dataset(InMemoryTable(table), fingerprint=digest.hexdigest()[:16])


def _read_csv(files: Sequence[Path]) -> pa.Table:
    """Read csv or tsv files of one header, its names in any order, as one table."""
    parts = []
    names: list[str] | None = None
    for file in files:
        rows = _records(file)
        header = _header(file, rows)
        if names is not None and set(header) != set(names):
            raise DataError(f"`{file}` has columns {', '.join(header)}, and `{files[0]}` has {', '.join(names)}.")
        names = header if names is None else names
        parts.append(_table([], names))  # there may be no rows
        parts += [_table(chunk, header).select(names) for chunk in _chunks(file, rows, len(header))]
    return _with_types(pa.concat_tables(parts))


def stream_table(file: Path) -> tuple[Dataset, Iterator[dict[str, str]]]:
    """Open a csv or tsv file as its first rows, which tell its columns, and all its rows one by one, cells as text."""
    rows = _records(file)
    header = _header(file, rows)
    chunks = _chunks(file, rows, len(header))
    first = next(chunks, [])
    head = Dataset(InMemoryTable(_with_types(_table(first, header))))
    return head, (dict(zip(header, row, strict=True)) for chunk in itertools.chain([first], chunks) for row in chunk)


def _table(rows: Sequence[Sequence[str]], names: Sequence[str]) -> pa.Table:
    """Return rows of cells as a table of text."""
    columns = zip(*rows, strict=True) if rows else ((),) * len(names)
    arrays = [pa.array([cell or None for cell in column], pa.string()) for column in columns]
    return pa.table(arrays, names=list(names))


def _with_types(table: pa.Table) -> pa.Table:
    return pa.table({name: _typed(table.column(name)) for name in table.column_names})


def _header(file: Path, rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    """Read the names of the columns from the first record."""
    _, header = next(rows, (0, []))
    header = [name.strip() or f"Unnamed: {position}" for position, name in enumerate(header)]
    if not header:
        raise DataError(f"`{file}` is empty: remove it, or begin it with a line of column names.")
    if repeated := [name for name in header if header.count(name) > 1]:
        raise DataError(f"`{file}` names column `{repeated[0]}` twice: rename one.")
    return header


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the records of a file with the number of the line on which each begins, blank lines left out."""
    before = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            header = next(filter(str.strip, stream), "")
            stream.seek(0)
            if file.suffix.lower() == ".tsv":  # of corpora for the most part, in which a quotation mark is a character
                reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:  # spreadsheets write semicolons where the comma is the decimal mark
                others = [mark for mark in ";\t" if mark in header and "," not in header]
                reader = csv.reader(stream, delimiter=others[0] if others else ",", strict=True)
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
        raise not_utf8(file, error, line) from error
    finally:
        csv.field_size_limit(before)


def not_utf8(file: Path | str, error: UnicodeDecodeError, line: int) -> DataError:
    """Return the error of a file of another encoding, which the lines up to this one do not show."""
    return DataError(f"`{file}` is not encoded in UTF-8 ({error.reason} after line {line}): save it anew.")


def _chunks(file: Path, rows: Iterable[tuple[int, list[str]]], width: int) -> Iterator[list[list[str]]]:
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


def _typed(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as integers where all its cells are, and as the text that it is otherwise."""
    is_integer = (pc.all(pc.match_substring_regex(chunk, _INTEGER), min_count=0).as_py() for chunk in cells.chunks)
    return cells.cast(pa.int64()) if cells.null_count < len(cells) and all(is_integer) else cells


def _read_json(files: Sequence[Path]) -> pa.Table:
    """Read json files as one table; a column that mixes types is text, as the files have it."""
    columns: dict[str, list[Any]] = {}
    count = 0
    for file in files:
        rows = _objects(file)
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            for name in dict.fromkeys([*columns, *(name for row in chunk for name in row)]):
                columns.setdefault(name, [None] * count).extend(row.get(name) for row in chunk)
            count += len(chunk)
    return pa.table({name: _json_array(values) for name, values in columns.items()})


def _json_array(values: list[Any]) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        is_text = [value is None or isinstance(value, str) for value in values]
        return pa.array([value if is_text[row] else json.dumps(value) for row, value in enumerate(values)], pa.string())


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a json file: one a line, a list, or one object of columns, as pandas writes it."""
    before = 0
    try:
        with open(file, encoding="utf-8-sig") as stream:
            lines = filter(str.strip, stream)
            first, second = next(lines, ""), next(lines, "")
            stream.seek(0)
            if _is_row(first, alone=not second):
                for before, line in enumerate(stream):
                    if line.strip():
                        yield _checked_object(json.loads(line.strip()), file, f"line {before + 1}")
                return
            whole = json.load(stream)
    except json.JSONDecodeError as error:
        line_number = before + error.lineno
        raise DataError(f"`{file}` cannot be read: {error.msg} on line {line_number}. Mend or replace it.") from error
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, before) from error
    if isinstance(whole, dict):
        columns = [list(values.values()) if isinstance(values, dict) else values for values in whole.values()]
        if all(isinstance(values, list) and len(values) == len(columns[0]) for values in columns):
            whole = [dict(zip(whole, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(whole, list):
        raise DataError(f"`{file}` holds no table: it must be a list of objects, or have an object on each line.")
    for row, value in enumerate(whole):
        yield _checked_object(value, file, f"row {row}")


def _is_row(line: str, *, alone: bool) -> bool:
    """Return whether a file's first line is an object that stands for a row."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and not (alone and all(isinstance(cell, (list, dict)) for cell in value.values()))


def _checked_object(value: Any, file: Path, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f'`{file}`: {where} holds {json.dumps(value):.40}, and must hold an object, such as {{"text": ...}}.'
        )
    return value

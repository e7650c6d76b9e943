"""Rows of label tables in the files that people have: CSV, JSON lines, Parquet.

Every row has texts or lists of texts; the first column names the image. Which columns there may be is the business of
csv_table.py.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, require_regular
from spml_fast.core.text import has_surrogates, parse_json

# A field of a row: a text, or several.
Value = str | list[str]
# Line or row number, and the row's fields by column.
TableRow = tuple[int, dict[str, Value]]
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")


def row_word(path: Path) -> str:
    """What a row's number counts, for messages: lines of a text file, rows of Parquet."""
    return "row" if path.suffix.lower() in PARQUET else "line"


def read_rows(path: Path) -> tuple[list[str], Iterator[TableRow]]:
    """Columns and rows of a table; its name's ending says what it is, CSV where it says nothing else.

    Columns of JSON lines are known only when all rows have been read: the list grows until then.

    Args:
        path: UTF-8 text with any line ends and with or without byte order mark, or Parquet.

    Raises:
        UserError: naming file and line (or row); also while rows are read.
    """
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        return _parquet(path)
    columns: list[str] = []
    rows = _json_lines(path, columns) if suffix in JSON_LINES else _csv(path, columns)
    if suffix in JSON_LINES:
        return columns, rows
    # The header comes first, and tells what is missing before any row is read.
    next(rows, None)
    return columns, rows


@contextmanager
def _text(path: Path) -> Iterator[Any]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _csv(path: Path, columns: list[str]) -> Iterator[TableRow]:
    """The header into `columns` (yielding an empty row), then the rows."""
    # Ten thousand class names in a field are longer than the module's limit of 131,072 characters.
    csv.field_size_limit(sys.maxsize)
    with _text(path) as file:
        reader = csv.reader(file, strict=True)
        try:
            columns += [name.strip() for name in next(reader, [])]
            yield 1, {}
            for values in reader:
                if not values or values == [""]:
                    continue
                if len(values) != len(columns):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, but the header has {len(columns)}"
                    )
                yield reader.line_num, dict(zip(columns, values, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _value(value: Any, where: str) -> Value:
    """A field of JSON or Parquet. Raises `UserError` for what is neither a text, nor a list of texts, nor nothing."""
    if value is None:
        return ""
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and has_surrogates(text) for text in texts):
        raise UserError(f"{where} holds half of a surrogate pair; fix the program that wrote the table")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return value
    raise UserError(f"{where} must be a text or a list of texts, not {str(value)[:60]!r}")


def _json_lines(path: Path, columns: list[str]) -> Iterator[TableRow]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not an object of JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not an object of JSON such as {{'path': 'a.jpg', ...}}")
            columns += [name for name in row if name not in columns]
            yield number, {name: _value(v, f"{path}, line {number}: {name!r}") for name, v in row.items()}


def _parquet(path: Path) -> tuple[list[str], Iterator[TableRow]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        require_regular(path)
        file = pa.parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file ({error})") from error

    def rows() -> Iterator[TableRow]:
        number = 0
        try:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: _value(v, f"{path}, row {number}: {name!r}") for name, v in row.items()}
        except (OSError, pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}, after row {number}: cannot be read ({error})") from error

    return names, rows()

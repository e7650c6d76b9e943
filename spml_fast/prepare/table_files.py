"""Rows of label tables in the files that people have: CSV, JSON lines, Parquet, Arrow.

Every row has texts or lists of texts, or, on request, whatever the file holds. Which columns there may be is the
business of who reads the table.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
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
ARROW = (".arrow",)
# Rows of Parquet and Arrow that are in memory at a time; with images in them a row can be megabytes.
BATCH = 64


def row_word(path: Path) -> str:
    """What a row's number counts, for messages: lines of a text file, rows of Parquet."""
    return "row" if path.suffix.lower() in PARQUET + ARROW else "line"


def read_rows(
    path: Path,
    convert: Callable[[Any, str], Any] | None = None,
    only: Sequence[str] | None = None,
    errors: str = "strict",
) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Columns and rows of a table; its name's ending says what it is, CSV where it says nothing else.

    Columns of JSON lines are known only when all rows have been read: the list grows until then.

    Args:
        path: UTF-8 text with any line ends and with or without byte order mark, Parquet or Arrow.
        convert: makes a field's value of what JSON, Parquet or Arrow hold and the field's place in the file; None for
            texts and lists of texts alone.
        only: of Parquet and Arrow, read these columns and no others; `column.field` is a part of one.
        errors: of text that is not UTF-8: `strict`, or `surrogateescape` for tables with file names of any bytes.

    Raises:
        UserError: naming file and line (or row); also while rows are read.
    """
    suffix, convert = path.suffix.lower(), convert or _value
    if suffix in PARQUET + ARROW:
        names, rows = (_parquet if suffix in PARQUET else _arrow)(path, only)
        return names, _converted(path, rows, convert)
    columns: list[str] = []
    lines = _json_lines(path, columns, convert) if suffix in JSON_LINES else _csv(path, columns, errors)
    if suffix in JSON_LINES:
        return columns, lines
    # The header comes first, and tells what is missing before any row is read.
    next(lines, None)
    return columns, lines


@contextmanager
def _text(path: Path, errors: str = "strict") -> Iterator[Any]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", errors=errors, newline="") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _csv(path: Path, columns: list[str], errors: str) -> Iterator[TableRow]:
    """The header into `columns` (yielding an empty row), then the rows."""
    # Ten thousand class names in a field are longer than the module's limit of 131,072 characters.
    csv.field_size_limit(sys.maxsize)
    with _text(path, errors) as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path} is empty; its first line must name the columns")
            columns += [name.strip() for name in header]
            yield 1, {}
            for values in reader:
                if not values or values == [""]:
                    continue
                if len(values) != len(columns):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(values)} fields, but the header has {len(columns)}; "
                        "a field with a comma in it must stand in double quotes"
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


def _json_lines(path: Path, columns: list[str], convert: Callable[[Any, str], Any]) -> Iterator[TableRow]:
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
            yield number, {name: convert(v, f"{path}, line {number}: {name!r}") for name, v in row.items()}


def _converted(
    path: Path, rows: Iterator[dict[str, Any]], convert: Callable[[Any, str], Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of Parquet or Arrow. Raises `UserError` where the file cannot be read to its end."""
    import pyarrow as pa

    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, {name: convert(v, f"{path}, row {number}: {name!r}") for name, v in row.items()}
    except (OSError, pa.ArrowException, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({error})") from error


def table_schema(path: Path) -> Any:
    """The Arrow schema of a Parquet or Arrow file. Raises `UserError`."""
    return _open_parquet(path).schema_arrow if path.suffix.lower() in PARQUET else _open_arrow(path).schema


def _field_names(fields: Any) -> list[str]:
    """Names of all fields of a schema or struct and below it; damage of a name shows only when it is asked for."""
    names = []
    for at in range(len(fields) if hasattr(fields, "names") else fields.num_fields):
        inner = fields.field(at)
        names.append(inner.name)
        kind = inner.type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        if str(kind).startswith("struct"):
            names += _field_names(kind)
    return names


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        require_regular(path)
        file = pa.parquet.ParquetFile(path)
        _field_names(file.schema_arrow)
        return file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file ({error})") from error


def _open_arrow(path: Path) -> Any:
    """A reader of an Arrow stream, which is what `save_to_disk` of Hugging Face writes."""
    import pyarrow as pa

    try:
        require_regular(path)
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        _field_names(reader.schema)
        return reader
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not an Arrow stream ({error})") from error


def _parquet(path: Path, only: Sequence[str] | None) -> tuple[list[str], Iterator[dict[str, Any]]]:
    file = _open_parquet(path)
    batches = file.iter_batches() if only is None else file.iter_batches(BATCH, columns=list(only))
    return list(file.schema_arrow.names), (row for batch in batches for row in batch.to_pylist())


def _arrow(path: Path, only: Sequence[str] | None) -> tuple[list[str], Iterator[dict[str, Any]]]:
    reader = _open_arrow(path)
    names = list(reader.schema.names)
    wanted = names if only is None else list(dict.fromkeys(name.split(".")[0] for name in only))

    def rows() -> Iterator[dict[str, Any]]:
        for batch in reader:
            kept = batch.select(wanted)
            # Offsets that point outside of a mapped file would be followed.
            kept.validate(full=True)
            for start in range(0, len(kept), BATCH):
                yield from kept.slice(start, BATCH).to_pylist()

    return names, rows()

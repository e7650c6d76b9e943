"""CSV files of any size: read in blocks of whole lines; and the wrong line, named.

pyarrow does not say in which line it stopped, so `explain_line` reads the text again, line by line.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from spml_fast.core.errors import UserError
from spml_fast.core.io import require_regular

# Bytes of a block. Memory of larger ones goes back to the system every time, and costs more than reading them.
BLOCK = 8 << 20
# Type of columns with few different values.
DICTIONARY = pa.dictionary(pa.int32(), pa.binary())


def megabytes(path: Path) -> int:
    """Size of a file, at least 1. Raises `UserError`."""
    try:
        return max(1, path.stat().st_size >> 20)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def open_file(path: Path) -> Any:
    """A file as a stream of bytes, unpacked if its name ends with .gz. Raises `UserError`."""
    try:
        require_regular(path)
        return pa.input_stream(str(path), compression="detect")
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words; pyarrow's own exceptions have no `strerror`."""
    return getattr(error, "strerror", None) or str(error).split(". Detail:")[-1].strip()


def read_bytes(stream: Any, size: int, path: Path) -> bytes:
    """At most `size` bytes of a stream of `open_file`. Raises `UserError` naming `path`."""
    try:
        return bytes(stream.read(size))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def read_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset of the first byte, whole lines) of a file without its header line, some MB at a time."""
    with open_file(path) as stream:
        rest = b""
        while b"\n" not in rest and (data := read_bytes(stream, BLOCK, path)):
            rest += data
        offset = rest.find(b"\n") + 1 or len(rest)
        rest = rest[offset:]
        while data := read_bytes(stream, BLOCK, path):
            end = data.rfind(b"\n") + 1
            if end:
                whole = b"".join((rest, memoryview(data)[:end]))
                yield offset, whole
                offset += len(whole)
                rest = data[end:]
            else:
                rest += data
        if rest:
            yield offset, rest


def check_header(path: Path, wanted: Sequence[str], exact: bool = True) -> list[str]:
    """The column names of a CSV. Raises `UserError` when one is missing, or when there is another (`exact`)."""
    with open_file(path) as stream:
        line = read_bytes(stream, 1 << 16, path).split(b"\n")[0]
    try:
        text = line.decode("utf-8-sig").strip("\r")
        columns = [name.strip() for name in next(csv.reader([text]), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}, line 1: not the header of a CSV in UTF-8 ({error})") from error
    missing = [name for name in wanted if name not in columns]
    if missing or len(set(columns)) != len(columns) or (exact and len(columns) != len(wanted)):
        start = text if len(text) <= 100 else text[:100] + " ..."
        raise UserError(f"{path}, line 1: the header must be {','.join(wanted)}, not {start!r}")
    return columns


def explain_line(
    path: Path,
    columns: list[str],
    line: int,
    text: TextIO,
    find_fault: Callable[[dict[str, str]], str],
    otherwise: str,
) -> UserError:
    """The error that names the first wrong line of a text.

    Args:
        path: the file.
        columns: its column names.
        line: number of the line of the file that the text begins with, counted from 1.
        text: the text.
        find_fault: column name -> field of a line, to what is wrong with it; empty when nothing is.
        otherwise: what is wrong when no line is.
    """
    first = 0
    try:
        reader = csv.reader(text, strict=True)
        for fields in reader:
            if fields:
                fault = (
                    f"{len(fields)} fields instead of {len(columns)}"
                    if len(fields) != len(columns)
                    else find_fault(dict(zip(columns, fields, strict=True)))
                )
                if fault:
                    return UserError(f"{path}, line {line + first}: {fault}")
            first = reader.line_num
    except csv.Error as error:
        return UserError(f"{path}, line {line + first}: {error}")
    return UserError(f"{path}, in the lines from {line} on: {otherwise}")


def line_at(path: Path, offset: int) -> int:
    """Number of the line that begins at a byte, counted from 1."""
    line = 1
    with open_file(path) as stream:
        while offset > 0 and (data := read_bytes(stream, min(offset, BLOCK), path)):
            line += data.count(b"\n")
            offset -= len(data)
    return line

"""Writing files whole or not at all, and text that a terminal shows safely.

The only file that calls os.replace and os.fsync: whoever writes something that others read goes through it.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any


def printable(path: str) -> str:
    """A path for people: characters that a terminal cannot show, or would obey, are escaped."""
    return path if path.isprintable() else repr(path)[1:-1]


def finite(value: Any) -> Any:
    """A JSON value with null in the place of numbers that are not finite, which strict readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


def partial_path(path: Path) -> Path:
    """Where `path`, a file or a folder, is written until it is whole: `NAME.partial` beside it."""
    return path.with_name(path.name + ".partial")


def move_into_place(partial: Path, path: Path) -> None:
    """Give what was written at `partial` its name, at once; a file that was there is replaced."""
    os.replace(partial, path)


def flush_to_disk(file: IO[bytes]) -> None:
    """Wait until all that was written to an open file would survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield the path to write to; at the end of the block what was written there becomes `path`, whole.

    If the block raises, `path` is as it was before and nothing is left beside it.

    Args:
        path: the file to make or replace.
        durable: wait for the disk before `path` gets its name, for files that say that other work is done.

    Raises:
        OSError: the file cannot be written.
    """
    partial = partial_path(path)
    try:
        yield partial
        if durable:
            with partial.open("rb") as file:
                flush_to_disk(file)
        move_into_place(partial, path)
    except BaseException:
        # What went wrong in the block says more than what is wrong with cleaning up.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a UTF-8 text file whole or not at all.

    Args:
        path: the file to make or replace.
        text: what it holds; line ends are kept as they are on Linux.
        errors: what to do with characters that UTF-8 lacks, as in `str.encode`.
    """
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(values), indent=1, ensure_ascii=False))


def csv_writer(file: IO[str], line_end: str = "\n") -> Callable[[Sequence[Any]], None]:
    """A function that writes one row of CSV to an open text file."""
    plain = csv.writer(file, lineterminator=line_end)
    # The plain writer leaves a carriage return without the quotes that readers need.
    quoting = csv.writer(file, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC)

    def write(row: Sequence[Any]) -> None:
        inside = any(isinstance(cell, str) and "\r" in cell for cell in row)
        (quoting if inside else plain).writerow(row)

    return write


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], line_end: str = "\n") -> int:
    """Write a table as CSV, whole or not at all: UTF-8, file names byte for byte.

    Args:
        path: the file to make or replace.
        header: names of the columns.
        rows: the cells of each row.
        line_end: what ends a row.

    Returns:
        Number of rows without the header.

    Raises:
        OSError: the file cannot be written.
    """
    count = 0
    with (
        atomic_write(path) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        write = csv_writer(file, line_end)
        write(header)
        for row in rows:
            write(row)
            count += 1
    return count

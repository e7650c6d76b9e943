"""Reading files that may be anything, writing files whole or not at all, and checksums.

The only file that calls os.replace and os.fsync: whoever writes something that others read goes through it.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spml_fast.core.errors import UserError
from spml_fast.core.text import formula_safe
from spml_fast.core.text import printable as printable

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def require_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file, which is not opened.

    Whatever is read here ends: a pipe waits for a writer for ever, and some devices never stop.

    Raises:
        OSError: there is none, or it is a folder, a named pipe, a socket or a device; `strerror` says which.
    """
    status = os.stat(path)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind != stat.S_IFREG:
        reason = f"it is {_KINDS.get(kind, 'a special file')}, not a regular file"
        raise OSError(errno.EINVAL, reason, os.fspath(path))
    return status


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading. Raises `OSError` as `require_regular`."""
    require_regular(path)
    # Should it have become a pipe meanwhile, opening does not wait.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        require_regular(path)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return file


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """The text of a file that a user has named, line ends as they are.

    Args:
        path: a regular file.
        encoding: `utf-8-sig` drops a byte order mark, `utf-8` keeps it.

    Raises:
        UserError: it cannot be read, is no regular file, or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            return file.read().decode(encoding)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_lines(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Lines of a text file, without their ends: LF, CR or both. Raises `UserError` as `read_text`."""
    return re.split("\r\n|\r|\n", read_text(path, encoding))


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


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files, new and removed ones, would survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class FileRecord:
    """What a file must hold.

    Attributes:
        size: bytes.
        crc32: checksum of its content, 8 hexadecimal digits.
    """

    size: int
    crc32: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> FileRecord:
        """As JSON files hold it. KeyError, TypeError or ValueError where it is none."""
        return cls(int(values["size"]), str(values["crc32"]))


# Bytes that are read at a time for a checksum.
_CHUNK = 1 << 22


def file_record(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on the disk; reads it once. Raises `OSError`."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return FileRecord(size, f"{crc:08x}")


class FileNotWritten(OSError):
    """A file could not be written.

    Args:
        error: why.
        path: the file.
        size: bytes that it would have had.
    """

    def __init__(self, error: OSError, path: Path, size: int) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.size = size


def failure_reason(path: Path, number: int | None, reason: str | None, size: int) -> str:
    """Why a file was not written; of a full disk, which one it is and the space that is needed.

    Args:
        path: the file.
        number: `errno` of the error.
        reason: its text.
        size: bytes that it must hold; 0 where that is not known.
    """
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return reason or "unknown error"
    mount = path.absolute().parent
    while not os.path.ismount(mount):
        mount = mount.parent
    megabytes = f", {max(1, -(-size // 10**6)):,} MB needed" if size else ""
    return f"no space left on {mount}{megabytes}"


class RecordedFile:
    """A file that is written from its start to its end, and whose checksum is taken on the way.

    `write` never fails, since writers in C++ abort the process when the function that they call back raises: the first
    error is kept, what comes after it is thrown away, and `record` raises it.

    Args:
        path: the file to make or replace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: OSError | None = None
        self._size = self._crc = 0
        self._file: IO[bytes] | None = None
        try:
            self._file = path.open("wb")
        except OSError as error:
            self._error = error

    def write(self, data: Any) -> int:
        """Append bytes, or anything with a buffer; returns their number."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        if self._error is None and self._file is not None:
            try:
                self._file.write(view)
                self._crc = zlib.crc32(view, self._crc)
            except OSError as error:
                self._error = error
        return len(view)

    def flush(self) -> None:
        """Nothing: `record` flushes."""

    def record(self) -> FileRecord:
        """Close the file once it has reached the disk; returns what it holds.

        Raises:
            FileNotWritten: with the first error.
        """
        if self._file is not None:
            try:
                if self._error is None:
                    flush_to_disk(self._file)
            except OSError as error:
                self._error = error
            # What is left in the buffer cannot be written either.
            with contextlib.suppress(OSError):
                self._file.close()
        if self._error is not None:
            raise FileNotWritten(self._error, self._path, self._size) from self._error
        return FileRecord(self._size, f"{self._crc:08x}")


def copy_file(source: Path, path: Path) -> FileRecord:
    """Copy a file's content, to the disk; returns what it holds. Raises `OSError`."""
    copy = RecordedFile(path)
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            copy.write(chunk)
    return copy.record()


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


def write_text(path: Path, text: str, errors: str = "strict", durable: bool = False) -> None:
    """Write a UTF-8 text file whole or not at all.

    Args:
        path: the file to make or replace.
        text: what it holds; line ends are kept as they are on Linux.
        errors: what to do with characters that UTF-8 lacks, as in `str.encode`.
        durable: return once it would survive a power cut under its name.
    """
    with atomic_write(path, durable) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, values: dict[str, Any], durable: bool = False) -> None:
    """Write a JSON file whole or not at all, as `write_text`; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(values), indent=1, ensure_ascii=False), durable=durable)


def csv_writer(file: IO[str], line_end: str = "\n") -> Callable[[Sequence[Any]], None]:
    """A function that writes one row of CSV to an open text file; cells of text are never formulas."""

    def plain_text(cell: Any) -> Any:
        return formula_safe(cell) if isinstance(cell, str) else cell

    plain = csv.writer(file, lineterminator=line_end)
    # The plain writer leaves a carriage return without the quotes that readers need.
    quoting = csv.writer(file, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC)

    def write(row: Sequence[Any]) -> None:
        row = [plain_text(cell) for cell in row]
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

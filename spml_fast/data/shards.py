"""Tar shards: many images in a few big files, found by (shard, offset, size) and read ahead of their use.

    MANIFEST/SPLIT/shards.json       name, bytes, samples and SHA-256 of every shard, in order
    MANIFEST/SPLIT/shard_index.npy   int64 [N, 3]: shard number, offset and size in bytes of every image
    MANIFEST/SPLIT/shard_crc32.npy   uint32 [N]: CRC-32 of every image's bytes, compared where they come from a network
    IMAGE_ROOT/SPLIT-00000.tar ...   plain tar, one member per image: 000000123.jpg; tar and webdataset readers take it

Images lie in the order of their sample indices, so consecutive samples are read without seeking. prepare/pack writes
shards. This file reads them with `pread` and not through a memory map: a shard that is cut short, or a mount
that fails, is then an error with a sentence and not a signal that kills the process.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, require_regular
from spml_fast.core.urls import Location
from spml_fast.core.workers import DaemonThreads
from spml_fast.data.manifest_check import load_array, read_meta
from spml_fast.data.read_retry import read_patiently

SHARDS_FILE, INDEX_FILE, CRC_FILE = "shards.json", "shard_index.npy", "shard_crc32.npy"
# What to do about a damaged shard, for messages.
RESTORE_SHARD = "restore the shard, or pack the images again"

# Open files are kept, but a data set may have more shards than a process may open files.
_MAX_OPEN = 64
# Bytes between two wanted images that are read and dropped, where a disk takes longer to seek.
_READ_THROUGH = 512 << 10
# Rows of the index that are checked at a time.
_CHECKED = 1 << 18
# Bytes of one task of a reading thread. Linux takes at most 1,024 buffers per call, half of them images.
_TASK_BYTES, _TASK_IMAGES = 8 << 20, 500

Encoded = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ShardFile:
    """One shard.

    Attributes:
        name: file name within the image folder.
        size: bytes of the whole file.
        samples: images in it.
        sha256: checksum of the whole file, hexadecimal.
    """

    name: str
    size: int
    samples: int
    sha256: str


def read_shard_files(path: Path) -> list[ShardFile]:
    """The list of a split's shards. Raises `UserError` where it is missing or damaged."""
    entries = read_meta(path)
    try:
        files = [ShardFile(**entry) for entry in entries]
    except TypeError as error:
        raise UserError(f"{path} is not a list of shards ({error}); pack the images again") from error
    kinds = {"name": str, "size": int, "samples": int, "sha256": str}
    for file in files:
        fine = all(type(getattr(file, field)) is kind for field, kind in kinds.items())
        if not fine or "\0" in file.name or min(file.size, file.samples) < 0 or file.size >= 2**62:
            raise UserError(f"{path} has the invalid entry {file}; pack the images again")
    return files


def _check_index(path: Path, table: npt.NDArray[Any], files: Sequence[ShardFile]) -> None:
    """Raise `UserError` where an image does not lie within one of the shards."""
    if table.ndim != 2 or table.shape[1] != 3 or table.dtype != np.int64:
        raise UserError(f"{path} is not a table of shard, offset and size; pack the images again")
    sizes = np.array([file.size for file in files], np.int64)
    for start in range(0, len(table), _CHECKED):
        shard, offset, size = np.asarray(table[start : start + _CHECKED]).T
        fine = (shard >= 0) & (shard < len(files)) & (offset >= 0) & (size >= 0)
        if fine.all():
            fine = size <= sizes[shard] - offset
        if not fine.all():
            row = start + int(np.argmin(fine))
            raise UserError(
                f"{path}: image {row} is at {table[row].tolist()} (shard, offset, size), which is outside of the "
                f"{len(files)} shards; pack the images again"
            )


class _OpenFile:
    """A file descriptor that closes with its last user."""

    def __init__(self, path: str) -> None:
        require_regular(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Shards:
    """The shards of one split, opened for reading. Safe to use from several threads.

    Args:
        folder: the split's folder in the Manifest.
        root: folder that holds the shards.

    Attributes:
        table: int64 [N, 3], memory-mapped: shard number, offset and size in bytes of every image.
        files: the shards, in order.

    Raises:
        UserError: the index is missing or damaged.
    """

    def __init__(self, folder: Path, root: Location) -> None:
        self.folder, self.root = folder, root
        self.files = read_shard_files(folder / SHARDS_FILE)
        self.table: npt.NDArray[np.int64] = load_array(folder / INDEX_FILE)
        _check_index(folder / INDEX_FILE, self.table, self.files)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.table)

    def path(self, number: int) -> str:
        """Full path of a shard."""
        return os.path.join(self.root, self.files[number].name)

    def place(self, index: int) -> str:
        """Where an image lies, for a message."""
        shard, offset, _ = self.table[index].tolist()
        return f"at offset {offset} of shard {self.path(shard)} (sample {index} of split {self.folder.name!r})"

    def file(self, number: int) -> _OpenFile:
        """An open shard. Raises `OSError`."""
        with self._lock:
            file = self._open.get(number)
            if file is None:
                file = self._open[number] = _OpenFile(self.path(number))
                if len(self._open) > _MAX_OPEN:
                    # A thread that is reading from it keeps it open until it has finished.
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return file

    def forget(self, number: int) -> None:
        """Open a shard anew the next time, because it may have been replaced."""
        with self._lock:
            self._open.pop(number, None)

    def read(self, index: int) -> bytes:
        """The encoded image of a sample. Raises `UserError` naming the shard if it is missing or too short."""
        return self.read_many([index])[0].tobytes()

    def read_many(self, index: Sequence[int]) -> list[Encoded]:
        """Encoded images, uint8 arrays of their own, in the order of `index`; read in the order of the disk."""
        samples = np.asarray(index, np.int64)
        out: list[Encoded | None] = [None] * len(samples)
        for read in self.jobs(samples, len(samples), out):
            read()
        return [array for array in out if array is not None]

    def jobs(self, samples: npt.NDArray[np.int64], threads: int, out: list[Encoded | None]) -> list[Callable[[], None]]:
        """What threads have to do to read samples, in the order of the disk.

        Args:
            samples: int64 [n] sample indices.
            threads: that will read.
            out: n elements, which the jobs put the encoded images into.

        Returns:
            Jobs that may run at the same time; each raises `UserError` where an image cannot be read.
        """
        rows = np.asarray(self.table[samples])
        return [partial(self.read_spans, samples, rows, task, out) for task in _tasks(rows, threads)]

    def measure(self, number: int) -> tuple[int, str]:
        """Bytes and SHA-256 of a whole shard; of one that has not the bytes it should the latter is empty.

        Raises:
            OSError: it cannot be read.
        """
        path = self.path(number)
        size = os.stat(path).st_size
        return size, file_sha256(path) if size == self.files[number].size else ""

    def _read_span(self, shard: int, buffers: list[memoryview], start: int) -> tuple[int, int]:
        """Fill buffers from a shard; (where reading ended, size of the shard in bytes). Raises `OSError`."""
        try:
            file = self.file(shard)
            return start + _read_into(file.fd, list(buffers), start), os.fstat(file.fd).st_size
        except OSError:
            # The file behind a stale handle is found again by its name.
            self.forget(shard)
            raise

    def _require_length(
        self, samples: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], span: npt.NDArray[np.int64]
    ) -> None:
        """Raise `UserError` where a shard is missing or ends before the last image of a span."""
        try:
            # Named, since another thread may forget the file, which closes with its last user.
            file = self.file(int(rows[span[0], 0]))
            length = os.fstat(file.fd).st_size
        except OSError as error:
            raise self._unreadable(int(samples[span[0]]), error) from error
        if length < int((rows[span, 1] + rows[span, 2]).max()):
            raise self._cut_off(samples, rows, span, length)

    def _unreadable(self, sample: int, error: OSError) -> UserError:
        """The error for a shard that cannot be opened or read."""
        self.forget(int(self.table[sample, 0]))
        reason = "the shard is missing" if isinstance(error, FileNotFoundError) else error.strerror
        return UserError(f"the image {self.place(sample)} cannot be read ({reason}); {RESTORE_SHARD}")

    def _cut_off(
        self, samples: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], span: npt.NDArray[np.int64], end: int
    ) -> UserError:
        """The error for a shard that ends at byte `end`, within the images of a span."""
        self.forget(int(rows[span[0], 0]))
        first = int(span[np.argmax(rows[span, 1] + rows[span, 2] > end)])
        return UserError(
            f"the image {self.place(int(samples[first]))} cannot be read (the shard ends at byte {end}); "
            f"{RESTORE_SHARD}"
        )

    def read_spans(
        self,
        samples: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        spans: Sequence[npt.NDArray[np.int64]],
        out: list[Encoded | None],
    ) -> None:
        """Read spans of images and put them into `out`.

        Args:
            samples: int64 [n] sample indices.
            rows: int64 [n, 3], their rows of `table`.
            spans: positions in `samples`, each in the order of the disk and within one shard.
            out: n elements, which the images are put into.

        Raises:
            UserError: a shard is missing, cannot be read, or ends too early.
        """
        unused = bytearray(_READ_THROUGH)
        for span in spans:
            shard = int(rows[span[0], 0])
            start = end = int(rows[span[0], 1])
            # Before memory is taken for images that are not there.
            self._require_length(samples, rows, span)
            buffers: list[memoryview] = []
            arrays = []
            for _, offset, size in rows[span].tolist():
                if offset > end:
                    buffers.append(memoryview(unused)[: offset - end])
                arrays.append(np.empty(size, np.uint8))
                if size:
                    buffers.append(arrays[-1].data)
                end = offset + size
            try:
                end_read, length = read_patiently(partial(self._read_span, shard, buffers, start))
            except OSError as error:
                raise self._unreadable(int(samples[span[0]]), error) from error
            if end_read < end:
                raise self._cut_off(samples, rows, span, min(end_read, length))
            for position, array in zip(span.tolist(), arrays, strict=True):
                out[position] = array


def _read_into(fd: int, buffers: list[memoryview], offset: int) -> int:
    """Fill buffers one after the other from `offset` of a file on. Returns the bytes read, fewer at the file's end."""
    done = 0
    while buffers:
        count = os.preadv(fd, buffers, offset + done)
        if count == 0:
            break
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]
    return done


def _tasks(rows: npt.NDArray[np.int64], threads: int) -> list[list[npt.NDArray[np.int64]]]:
    """Cut images into spans that are read in one go, and distribute the spans over tasks.

    Args:
        rows: int64 [n, 3] shard, offset, size.
        threads: that will read.

    Returns:
        Tasks in the order of the disk, each a list of spans, each int64 positions in `rows`.
    """
    if not len(rows):
        return []
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    shard, offset, size = rows[order].T
    gap = offset[1:] - (offset[:-1] + size[:-1])
    # An image that begins before the previous one ends is the same image, asked for twice.
    cut = (shard[1:] != shard[:-1]) | (gap < 0) | (gap > _READ_THROUGH)
    tasks: list[list[npt.NDArray[np.int64]]] = [[]]
    filled = images = 0
    most = -(-len(rows) // threads)
    for span in np.split(order, np.flatnonzero(cut) + 1):
        ends = np.cumsum(rows[span, 2])
        while len(span):
            # No more than fits into the task that is being filled; one image at least.
            count = int(np.searchsorted(ends, _TASK_BYTES - filled, "right"))
            count = min(count, min(most, _TASK_IMAGES) - images)
            if count < 1 and tasks[-1]:
                tasks.append([])
                filled = images = 0
                continue
            count = max(1, count)
            tasks[-1].append(span[:count])
            filled, images = filled + int(ends[count - 1]), images + count
            span, ends = span[count:], ends[count:] - ends[count - 1]
    return tasks


class PendingImages:
    """Images that are being read."""

    def __init__(self, futures: list[Future[None]], out: list[Encoded | None]) -> None:
        self._futures, self._out = futures, out

    def result(self) -> list[Encoded | None]:
        """Wait, and return the encoded images, uint8 each, in the order asked for. `UserError` if one is unreadable.

        The list belongs to the caller: an image that is taken out of it is freed when the caller drops it.
        """
        for future in self._futures:
            future.result()
        self._futures = []
        return self._out

    def done(self) -> bool:
        """Whether `result` returns or raises at once."""
        return all(future.done() for future in self._futures)

    def cancel(self) -> None:
        """Do not start reads that have not been started."""
        for future in self._futures:
            future.cancel()


class ShardReader:
    """Reads images of a split on threads of its own, in the order of the disk.

    Args:
        shards: the split's shards.
        threads: reads at a time.
    """

    def __init__(self, shards: Shards, threads: int) -> None:
        self.shards, self._threads = shards, DaemonThreads(threads, "shards")

    def submit(self, samples: npt.NDArray[np.int64]) -> PendingImages:
        """Start reading samples, int64 [n]; returns at once."""
        out: list[Encoded | None] = [None] * len(samples)
        futures = [self._threads.submit(job) for job in self.shards.jobs(samples, self._threads.threads, out)]
        return PendingImages(futures, out)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

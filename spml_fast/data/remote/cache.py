"""Pieces of shards on the local disk, up to a limit, shared by all processes of a machine.

    CACHE/pieces/AB/ABCDEF...-OFFSET-LENGTH   bytes of a shard; AB... is the beginning of the shard's SHA-256
    CACHE/pieces/used                         bytes that are taken, as far as known; counted when they seem too many
    CACHE/pieces/lock                         held while `used` changes and while pieces are removed

A piece is written under another name and moved into its place, so a process that is killed leaves none that is cut off.
Whoever reads has it open: it may be removed at the same time. Names come from the content, so pieces of a data set that
was packed anew are other pieces, and data sets at two places that hold the same shards share theirs.

What was used longest ago is removed first, but nothing that was used since this cache was opened: an epoch reads every
piece once, so that the oldest one is the next to be wanted. Of a data set that is larger than the cache the same part
stays (a hit for every image of that part), and the rest is read without being kept.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from spml_fast.core.errors import UserError
from spml_fast.core.io import move_into_place
from spml_fast.core.lock import guarded

# Where data sets on object storage are kept, below the user's folder for caches.
FOLDER = "spml_fast/remote"
# Of the limit, what is left after pieces were removed, so that it does not have to be done for every one.
_KEPT = 0.95
# Seconds for which a full cache is not looked through again.
_FULL = 30.0
# Seconds after which a file that is being written belongs to a process that was killed.
_ABANDONED = 3600.0
_PARTIAL = ".partial"


class PieceCache:
    """Pieces of shards on the local disk. Safe to use from several threads and processes.

    Args:
        folder: of the cache; made if it is not there.
        limit: bytes that all pieces may take.
        note: called with a sentence when the disk is full.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int, note: Callable[[str], None]) -> None:
        self._folder, self._limit, self._note = folder / "pieces", limit, note
        self._since = time.time()
        self._full_until = 0.0
        self._told = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {folder} cannot be used ({error.strerror}); choose another folder"
            ) from error

    @property
    def limit(self) -> int:
        """Bytes that all pieces may take."""
        return self._limit

    @property
    def has_room(self) -> bool:
        """Whether it is worth while to offer a piece."""
        return self._limit > 0 and time.monotonic() >= self._full_until

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    def read(self, key: str, parts: Sequence[tuple[int, int]]) -> list[bytes] | None:
        """Parts of a piece as (offset, bytes); None where the piece is not there, or not whole.

        A piece that is not whole, as a power cut leaves it, or that the disk fails to give, is removed: it would never
        be kept again.
        """
        try:
            file = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            found = [os.pread(file, size, offset) for offset, size in parts]
            # Marks it as used. Another user's piece, or one on a read-only disk, is no worse without.
            with contextlib.suppress(OSError):
                os.utime(file)
        except OSError:
            found = []
        finally:
            os.close(file)
        if [len(data) for data in found] == [size for _, size in parts]:
            return found
        self.drop(key)
        return None

    def drop(self, key: str) -> None:
        """Remove a piece that is damaged."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def keep(self, key: str, data: bytes) -> bool:
        """Keep a piece, if there is room or older ones make room; returns whether it is there now."""
        path = self._path(key)
        if path.exists():
            return True
        partial = path.with_name(f"{key}.{os.getpid()}-{threading.get_ident()}{_PARTIAL}")
        try:
            # On a disk without locks pieces are still whole or not there, and the limit is held less closely.
            with guarded(self._folder / "lock"):
                if not self._reserve(len(data)):
                    self._full_until = time.monotonic() + _FULL
                    return False
                # Its size is on the disk before another process counts what is there, and stays while it is written.
                path.parent.mkdir(exist_ok=True)
                with partial.open("wb") as file:
                    file.truncate(len(data))
            with partial.open("r+b") as file:
                file.write(data)
            move_into_place(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._full_until = time.monotonic() + _FULL
            if not self._told:
                self._told = True
                self._note(
                    f"the cache {self._folder} cannot be written ({error.strerror}): what does not fit is read from "
                    "the store every time; make room, or lower data.cache_size"
                )
            return False
        return True

    def _reserve(self, size: int) -> bool:
        """Count a piece that will be written, and remove older ones for it if need be. The lock is held."""
        count = self._folder / "used"
        try:
            used = int(count.read_text())
        except (OSError, ValueError):
            used = self._make_room(0)
        if used + size > self._limit:
            used = self._make_room(size)
        fits = used + size <= self._limit
        count.write_text(str(used + size * fits))
        return fits

    def _make_room(self, size: int) -> int:
        """Remove pieces until another one fits, as far as that is allowed; returns the bytes of those that stay."""
        used, pieces = 0, []
        now = time.time()
        for folder in self._folder.iterdir():
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    abandoned = entry.name.endswith(_PARTIAL) and now - status.st_mtime > _ABANDONED
                    used += status.st_size
                    if abandoned or (status.st_mtime < self._since and not entry.name.endswith(_PARTIAL)):
                        pieces.append((0.0 if abandoned else status.st_mtime, status.st_size, entry.path))
        most = int(self._limit * _KEPT) - size
        if used + size > self._limit:
            for _, bytes_, path in sorted(pieces):
                if used <= most:
                    break
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                used -= bytes_
        return used

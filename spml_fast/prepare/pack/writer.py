"""One shard and its record: written under another name, and put in their place when they are whole."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write, flush_to_disk, move_into_place, partial_path
from spml_fast.data.shards import file_sha256
from spml_fast.prepare.pack.images import PackedImage
from spml_fast.prepare.pack.plan import IntArray, PlannedShard

# Of the table of a shard's images: see `ShardRecord`.
COLUMNS = 7


class HashingFile:
    """Writes to a file, and keeps a checksum of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sum, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Append."""
        self._sum.update(data)
        self._size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    @property
    def sha256(self) -> str:
        """Checksum of what was written, hexadecimal."""
        return self._sum.hexdigest()


class ShardWriter:
    """Writes one shard and then its record.

    Args:
        work: folder of the unfinished work.
        planned: the shard.
        upload: takes the whole shard to where it belongs; None where that is the folder that it was written to.

    Attributes:
        planned: the shard.
        seen: samples that were added or left out.
    """

    def __init__(self, work: Path, planned: PlannedShard, upload: Callable[[Path], None] | None = None) -> None:
        self._work, self.planned, self._upload = work, planned, upload
        self._final = work / "shards" / f"{planned.name}.tar"
        self._partial = partial_path(self._final)
        self._raw = open(self._partial, "wb")  # noqa: SIM115 (closed by `finish` or `close`)
        self._file = HashingFile(self._raw)
        # `tarfile` asks for no more of a file than to write and to tell.
        output: Any = self._file
        self._tar = tarfile.TarFile(fileobj=output, mode="w", format=tarfile.USTAR_FORMAT)
        self._table: list[tuple[int, ...]] = []
        self._left_out: list[tuple[int, str, str]] = []
        self.seen = 0

    def add(self, row: int, image: PackedImage) -> None:
        """Append an image under its sample index as the key."""
        # Owner, time and mode are the same always, so equal images make equal shards.
        info = tarfile.TarInfo(f"{row:09d}.{image.ending}")
        info.size = len(image.data)
        offset = self._file.tell() + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(image.data))
        shown = image.width, image.height, image.orientation
        self._table.append((row, offset, info.size, *shown, zlib.crc32(image.data)))
        self.seen += 1

    def leave_out(self, row: int, reason: str, detail: str) -> None:
        """Note an image that is not packed."""
        self._left_out.append((row, reason, detail))
        self.seen += 1

    def finish(self) -> None:
        """Put the shard in its place, then the record that makes it count."""
        self._tar.close()
        flush_to_disk(self._raw)
        self._raw.close()
        move_into_place(self._partial, self._final)
        if self._upload is not None:
            self._upload(self._final)
            self._final.unlink()
        meta = {"size": self._file.tell(), "sha256": self._file.sha256, "left_out": self._left_out}
        table = np.array(self._table, np.int64).reshape(-1, COLUMNS)
        record = record_path(self._work, self.planned)
        with atomic_write(record, durable=True) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, table=table, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))

    def close(self) -> None:
        """Give up what is not finished."""
        self._raw.close()


@dataclass(frozen=True)
class ShardRecord:
    """What a whole shard holds.

    Attributes:
        table: int64 [n, 7]: row, offset, size in bytes, width, height, orientation and CRC-32 of every image.
        size: bytes of the shard.
        sha256: its checksum, hexadecimal.
        left_out: (row, reason, detail) of the images that are not in it.
    """

    table: IntArray
    size: int
    sha256: str
    left_out: list[tuple[int, str, str]]


def record_path(work: Path, planned: PlannedShard) -> Path:
    """Where the record of a shard lies."""
    return work / f"{planned.name}.npz"


def load_record(work: Path, planned: PlannedShard) -> ShardRecord | None:
    """The record of a shard; None when it has none, or an older version's. Raises `UserError` when it is damaged."""
    path = record_path(work, planned)
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            left_out = [(row, reason, detail) for row, reason, detail in meta["left_out"]]
            table = arrays["table"]
            return ShardRecord(table, meta["size"], meta["sha256"], left_out) if table.shape[1] == COLUMNS else None
    except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and repeat the command") from error


def is_whole(work: Path, planned: PlannedShard) -> bool:
    """Whether a shard was written, and still has the bytes that were written."""
    record = load_record(work, planned)
    path = work / "shards" / f"{planned.name}.tar"
    if record is None or not path.exists():
        return False
    return path.stat().st_size == record.size and file_sha256(path) == record.sha256

"""Tar shards on object storage: images read by ranges, checked, and kept in a local cache.

Samples are cut into pieces of `data.shuffle_block` that follow each other in a shard, as the window shuffle cuts them,
so that one request brings what a rank wants of a block and one file of the cache holds it. Where the cache has room a
piece is fetched whole, also for one of its images; where it has none exactly what is asked for is fetched. The bytes of
every image are compared with the checksum that was taken when it was packed, whether they come from the store or from
the cache: a damaged piece of the cache is fetched again, damage in the store is an error that names the image.
"""

from __future__ import annotations

import re
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.urls import Url
from spml_fast.data.manifest_check import invalid, load_array
from spml_fast.data.remote.cache import PieceCache
from spml_fast.data.remote.mirror import UPLOAD_ADVICE, sha256_of
from spml_fast.data.remote.store import Store, StoreError
from spml_fast.data.shards import CRC_FILE, RESTORE_SHARD, Encoded, Shards

# Bytes between two wanted images that are fetched and dropped, where another request would take longer.
_FETCH_THROUGH = 1 << 20
# How often damaged bytes are asked for in all.
_DAMAGED_READS = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Samples of a piece where nobody has said otherwise.
_BLOCK = 64

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Wanted:
    """Images of one shard that are to be read, in the order of the shard.

    Attributes:
        positions: int64 [k], where in `out` they belong.
        samples: int64 [k], their sample indices.
        rows: int64 [k, 3], their rows of the table: shard, offset and size in bytes.
        out: of everything that is being read.
    """

    positions: IntArray
    samples: IntArray
    rows: IntArray
    out: list[Encoded | None]

    @property
    def shard(self) -> int:
        """Number of the shard."""
        return int(self.rows[0, 0])

    @property
    def ends(self) -> IntArray:
        """Byte behind each image, int64 [k]."""
        ends: IntArray = self.rows[:, 1] + self.rows[:, 2]
        return ends

    def parts(self, start: int) -> list[tuple[int, int]]:
        """(offset, bytes) of each image in what begins at byte `start` of the shard."""
        return [(offset - start, size) for _, offset, size in self.rows.tolist()]

    def cut(self, distance: int) -> list[_Wanted]:
        """The same in parts, where the next image begins more than so many bytes behind the last one."""
        cuts = np.flatnonzero(self.rows[1:, 1] - self.ends[:-1] > distance) + 1
        parts = zip(*(np.split(array, cuts) for array in (self.positions, self.samples, self.rows)), strict=True)
        return [_Wanted(positions, samples, rows, self.out) for positions, samples, rows in parts]

    def put(self, images: Sequence[bytes]) -> None:
        """Put the images where they belong."""
        for position, image in zip(self.positions.tolist(), images, strict=True):
            # Of its own memory, so that it is free as soon as the image is decoded; `bytes` already is.
            self.out[position] = np.frombuffer(image, np.uint8)


class RemoteShards(Shards):
    """The shards of one split on object storage. Safe to use from several threads.

    Args:
        folder: the split's folder in the Manifest, on the disk.
        root: folder that holds the shards.
        cache: folder of the cache.

    Attributes:
        store: what is below `root`.

    Raises:
        UserError: the index or the checksums are missing or damaged.
    """

    def __init__(self, folder: Path, root: Url, cache: Path) -> None:
        super().__init__(folder, root)
        path = folder / CRC_FILE
        if not path.exists():
            raise UserError(f"{path} is missing, since an older version packed the images; {UPLOAD_ADVICE}")
        self.checksums = load_array(path)
        if self.checksums.shape != (len(self.table),) or self.checksums.dtype != np.uint32:
            raise invalid(path, f"it has {self.checksums.dtype} {list(self.checksums.shape)}")
        for file in self.files:
            if not _SHA256.fullmatch(file.sha256) or {"", ".", ".."} & set(file.name.split("/")):
                raise UserError(f"{folder} has the invalid shard {file}; pack the images again")
        self.url, self.store = root, Store(root)
        self._folder, self._block = cache, _BLOCK
        self._cache: PieceCache | None = None
        # Pieces that a thread is fetching whole.
        self._fetched: dict[str, Future[bytes]] = {}
        self._fetched_lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes of all shards of the split."""
        return sum(file.size for file in self.files)

    def use_cache(self, block: int, limit: int) -> None:
        """Keep pieces of `block` samples, `limit` bytes in all; the shards were opened without keeping any."""
        self._block = block
        if limit > 0 and (self._cache is None or self._cache.limit != limit):
            self._cache = PieceCache(self._folder, limit, self.store.tell)

    def jobs(self, samples: IntArray, threads: int, out: list[Encoded | None]) -> list[Callable[[], None]]:
        """A job for each piece that has some of the samples; see `Shards.jobs`."""
        if not len(samples):
            return []
        rows = np.asarray(self.table[samples])
        block = samples // self._block
        order = np.lexsort((rows[:, 1], block, rows[:, 0]))
        cut = (np.diff(rows[order, 0]) != 0) | (np.diff(block[order]) != 0)
        spans = np.split(order, np.flatnonzero(cut) + 1)
        return [partial(self._read_piece, _Wanted(span, samples[span], rows[span], out)) for span in spans]

    def measure(self, number: int) -> tuple[int, str]:
        """Bytes and SHA-256 of a whole shard, which is read once. Raises `StoreError`."""
        url = self.url / self.files[number].name
        size = self.store.size(url)
        if size is None:
            raise StoreError(f"{url} does not exist; {RESTORE_SHARD}")
        return size, sha256_of(self.store, url, size) if size == self.files[number].size else ""

    def _piece(self, sample: int) -> tuple[int, int] | None:
        """(first byte, bytes) of the piece of a sample within its shard; None where its images lie far apart."""
        first = sample // self._block * self._block
        rows = np.asarray(self.table[first : first + self._block])
        rows = rows[rows[:, 0] == self.table[sample, 0]]
        start, end = int(rows[:, 1].min()), int((rows[:, 1] + rows[:, 2]).max())
        held = int(rows[:, 2].sum())
        return (start, end - start) if end - start <= 2 * held + _FETCH_THROUGH else None

    def _read_piece(self, wanted: _Wanted) -> None:
        """Read images of one piece: from the cache, or from the store."""
        piece = self._piece(int(wanted.samples[0])) if self._cache is not None else None
        if piece is None or self._cache is None:
            self._read_exactly(wanted)
            return
        start, length = piece
        key = f"{self.files[wanted.shard].sha256[:40]}-{start}-{length}"
        parts = wanted.parts(start)
        found = self._cache.read(key, parts)
        if found is not None:
            if self._wrong(wanted.samples, found) is None:
                wanted.put(found)
                return
            self._cache.drop(key)
        if not self._cache.has_room:
            self._read_exactly(wanted)
            return

        def images() -> list[bytes]:
            data = self._fetch_piece(key, wanted.shard, start, length)
            return [data[offset : offset + size] for offset, size in parts]

        wanted.put(self._checked(wanted.samples, images))

    def _fetch_piece(self, key: str, shard: int, start: int, length: int) -> bytes:
        """A whole piece from the store, which is kept; threads that want the same one share a request."""
        with self._fetched_lock:
            future = self._fetched.get(key)
            mine = future is None
            if future is None:
                future = self._fetched[key] = Future()
        if not mine:
            return future.result()
        try:
            data = self.store.read_range(self.url / self.files[shard].name, start, length)
            assert self._cache is not None
            self._cache.keep(key, data)
        except BaseException as error:
            future.set_exception(error)
            raise
        else:
            future.set_result(data)
            return data
        finally:
            with self._fetched_lock:
                del self._fetched[key]

    def _read_exactly(self, wanted: _Wanted) -> None:
        """Read images, and nothing that is far from them; nothing is kept."""
        for near in wanted.cut(_FETCH_THROUGH):
            self._read_near(near)

    def _read_near(self, wanted: _Wanted) -> None:
        """Read images with one request."""
        url = self.url / self.files[wanted.shard].name
        start, stop = int(wanted.rows[0, 1]), int(wanted.ends.max())
        parts = wanted.parts(start)

        def images() -> list[bytes]:
            data = self.store.read_range(url, start, stop - start)
            return [data[offset : offset + size] for offset, size in parts]

        wanted.put(self._checked(wanted.samples, images))

    def _wrong(self, samples: IntArray, images: Sequence[bytes]) -> int | None:
        """The first sample whose bytes have another checksum; None where all are right."""
        for sample, image in zip(samples.tolist(), images, strict=True):
            if zlib.crc32(image) != int(self.checksums[sample]):
                return int(sample)
        return None

    def _checked(self, samples: IntArray, fetch: Callable[[], list[bytes]]) -> list[bytes]:
        """Images whose checksums are right, fetched again where they are not. Raises `UserError`."""
        wrong = 0
        for _ in range(_DAMAGED_READS):
            images = fetch()
            found = self._wrong(samples, images)
            if found is None:
                return images
            wrong = found
            self._drop_damaged(wrong)
        raise UserError(
            f"the image {self.place(wrong)} has other bytes than when it was packed (its checksum); {RESTORE_SHARD}"
        )

    def _drop_damaged(self, sample: int) -> None:
        """What was fetched for a sample is not to be kept."""
        piece = self._piece(sample)
        if self._cache is not None and piece is not None:
            sha256 = self.files[int(self.table[sample, 0])].sha256
            self._cache.drop(f"{sha256[:40]}-{piece[0]}-{piece[1]}")

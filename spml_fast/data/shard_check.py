"""Whether shards still have the bytes that were packed: every one is read to its end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress
from spml_fast.data.shards import INDEX_FILE, RESTORE_SHARD, Shards


def check_shards(shards: Shards, threads: int = 4) -> int:
    """Read every byte of a split's shards and compare the checksums. Returns the bytes read.

    Raises:
        UserError: a shard is missing, has another size or other bytes, or the index points outside it.
    """
    numbers = np.asarray(shards.table[:, 0])
    ends = np.asarray(shards.table[:, 1] + shards.table[:, 2])
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(shards.files)):
        raise UserError(f"{shards.folder / INDEX_FILE} names a shard that does not exist; pack the images again")

    def check(number: int) -> int:
        file, path = shards.files[number], shards.path(number)
        rows = np.flatnonzero(numbers == number)
        samples = f"samples {rows[0]} to {rows[-1]} of split {shards.folder.name!r}" if len(rows) else "no sample"
        try:
            size, checksum = shards.measure(number)
            if size != file.size:
                raise UserError(f"shard {path} ({samples}) has {size} bytes instead of {file.size}; {RESTORE_SHARD}")
            if len(rows) != file.samples or ends[rows].max(initial=0) > size:
                raise UserError(f"{shards.folder / INDEX_FILE} does not fit shard {path}; pack the images again")
        except OSError as error:
            raise UserError(f"shard {path} ({samples}) cannot be read ({error.strerror}); {RESTORE_SHARD}") from error
        if checksum != file.sha256:
            raise UserError(
                f"shard {path} ({samples}) is damaged: its checksum has changed since it was packed; {RESTORE_SHARD}"
            )
        return size

    name, total = f"reading the shards of {shards.folder.name}", sum(file.size for file in shards.files)
    with ThreadPoolExecutor(threads) as pool, show_progress(total >> 20, name, unit="MB") as advance:
        read = 0
        for size in pool.map(check, range(len(shards.files))):
            advance((read + size >> 20) - (read >> 20))
            read += size
        return read

"""The files of a Manifest on object storage, but its images: fetched whole, compared with their checksums, kept.

    CACHE/manifests/HASH/         the files; manifest.json is written last
    CACHE/manifests/HASH.lock     held by the process that fetches them; the others of the machine wait

The hash is of the URL and of manifest.json as it is now, which has the checksums of the other files: a data set that
was replaced is another one, and one that is here is opened with two requests: how large manifest.json is, and its
content.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spml_fast.core.errors import UserError
from spml_fast.core.io import atomic_write, failure_reason
from spml_fast.core.lock import READERS, guarded, readers
from spml_fast.core.text import parse_json
from spml_fast.core.urls import Url
from spml_fast.core.workers import DaemonThreads
from spml_fast.data.remote.store import OPENING_PAUSES, Store, StoreError

# Bytes of manifest.json at most; it has a line for every file and split.
_MOST = 16 << 20
# Bytes of one request of a large file, and requests at a time.
_RANGE, _AT_A_TIME = 16 << 20, 8
# Seconds after which a data set that nobody has opened is removed.
_UNUSED = 30 * 24 * 3600.0
_NAME = re.compile(r"[^/\\\0]+(?:/[^/\\\0]+){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

UPLOAD_ADVICE = "upload it with `spml-fast prepare shard --manifest DIR --out URL`"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Manifest.

    Attributes:
        name: relative to the Manifest.
        size: bytes.
        sha256: checksum, hexadecimal.
    """

    name: str
    size: int
    sha256: str


def remote_files(url: Url, meta: Any) -> list[RemoteFile]:
    """The files that a manifest.json lists. Raises `UserError` where it lists none, or one that lies elsewhere."""
    listed = meta.get("files") if isinstance(meta, dict) else None
    if not isinstance(listed, dict):
        raise UserError(
            f"{url}/manifest.json has no checksums of its files (an older version wrote it); {UPLOAD_ADVICE}"
        )
    files = []
    for name, entry in listed.items():
        size, sha256 = (entry.get(key) if isinstance(entry, dict) else None for key in ("size", "sha256"))
        inside = _NAME.fullmatch(name) and not {".", "..", "manifest.json", ".lock"} & set(name.split("/"))
        if not inside or type(size) is not int or not 0 <= size < 2**50:
            raise UserError(f"{url}/manifest.json is damaged: it lists the file {name!r} as {entry!r}; {UPLOAD_ADVICE}")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise UserError(f"{url}/manifest.json is damaged: {name!r} has no checksum; {UPLOAD_ADVICE}")
        files.append(RemoteFile(name, size, sha256))
    return files


def fetch_manifest(url: Url, cache: Path) -> Path:
    """The folder that holds the files of a Manifest on object storage, fetched unless they are there.

    Args:
        url: of the Manifest.
        cache: the cache's folder.

    Raises:
        UserError: it does not exist, may not be read, is damaged, or the disk is full.
    """
    store = Store(url)
    try:
        content = Store(url, OPENING_PAUSES).read(url / "manifest.json", _MOST)
    except StoreError as error:
        raise StoreError(f"{url} is not a Manifest that can be read: {error}") from error
    try:
        meta = parse_json(content)
    except ValueError as error:
        raise UserError(f"{url}/manifest.json is damaged: {error}; {UPLOAD_ADVICE}") from error
    files = remote_files(url, meta)
    folder = cache / "manifests" / hashlib.sha256(url.encode() + b"\0" + content).hexdigest()[:24]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with guarded(_lock_of(folder)):
            if not _is_here(folder, files):
                _remove_unused(folder)
                for file in files:
                    _fetch(store, url, file, folder / file.name)
                with atomic_write(folder / "manifest.json") as partial:
                    partial.write_bytes(content)
            os.utime(folder)
    except OSError as error:
        path = Path(error.filename or folder)
        reason = failure_reason(path, error.errno, error.strerror, sum(file.size for file in files))
        raise UserError(f"data.cache_dir {cache} cannot be written: {reason}; choose another folder") from error
    return folder


def _is_here(folder: Path, files: list[RemoteFile]) -> bool:
    """Whether all files of a Manifest were fetched before, and still have their sizes."""
    if not (folder / "manifest.json").is_file():
        return False
    return all(_size(folder / file.name) == file.size for file in files)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _ranges(store: Store, url: Url, size: int) -> Iterator[bytes]:
    """An object from its start to its end, several requests at a time.

    Whoever is interrupted meanwhile does not wait for requests that are under way, which may take minutes.
    """
    threads = DaemonThreads(_AT_A_TIME, "ranges")
    waiting: deque[tuple[Future[None], list[bytes]]] = deque()

    def fetch(at: int, out: list[bytes]) -> None:
        out.append(store.read_range(url, at, min(_RANGE, size - at)))

    starts = iter(range(0, size, _RANGE))
    while True:
        for at in itertools.islice(starts, _AT_A_TIME - len(waiting)):
            out: list[bytes] = []
            waiting.append((threads.submit(partial(fetch, at, out)), out))
        if not waiting:
            return
        future, found = waiting.popleft()
        future.result()
        yield found.pop()


def _fetch(store: Store, url: Url, file: RemoteFile, path: Path) -> None:
    """Fetch a file, unless a process that was cut off did. Raises `UserError` where it has another checksum."""
    if _size(path) == file.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    checksum = hashlib.sha256()
    with atomic_write(path) as partial:
        with partial.open("wb") as out:
            for data in _ranges(store, url / file.name, file.size):
                checksum.update(data)
                out.write(data)
        if checksum.hexdigest() != file.sha256:
            raise UserError(
                f"{url / file.name} has other bytes than when it was written (its checksum); {UPLOAD_ADVICE}"
            )


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _remove_unused(kept: Path) -> None:
    """Remove data sets beside `kept`, whose lock is held, that nobody reads, and nobody has opened for long."""
    for old in [path for path in kept.parent.iterdir() if path != kept and path.is_dir()]:
        # Somebody may be opening it, or removing it as well.
        with contextlib.suppress(BlockingIOError, FileNotFoundError), guarded(_lock_of(old), wait=False):
            if time.time() - old.stat().st_mtime > _UNUSED and not readers(old / READERS):
                shutil.rmtree(old, ignore_errors=True)


def sha256_of(store: Store, url: Url, size: int) -> str:
    """SHA-256 of an object of that size, hexadecimal; reads it once. Raises `StoreError`."""
    checksum = hashlib.sha256()
    for data in _ranges(store, url, size):
        checksum.update(data)
    return checksum.hexdigest()

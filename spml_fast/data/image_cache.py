"""Resized images kept on the disk, so that they are decoded once and not once an epoch (`data.cache`).

    FOLDER/SPLIT-KEY/cache.json       what the images were made from, and which file has them
    FOLDER/SPLIT-KEY/images-XXXX.bin  uint8 [N, S, S, 3], and behind them uint32 [N], the CRC-32 of each image

KEY stands for Manifest, size and kind of device. The file is written under a name of its own and counts once
cache.json names it, so a reader sees a whole cache or none, and two that are made at the same time do not meet. Ranks
and runs wait for the first one to make it. A cache of other images, or of another version of what decodes and resizes,
is made again; each image is compared with its checksum when a process reads it first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import failure_reason, flush_to_disk, require_regular, write_json
from spml_fast.core.lock import guarded
from spml_fast.core.progress import show_progress
from spml_fast.core.text import parse_json
from spml_fast.core.urls import Url
from spml_fast.data.bad_images import print_note
from spml_fast.data.manifest import Split
from spml_fast.data.shards import SHARDS_FILE

Pixels = npt.NDArray[np.uint8]

_FORMAT = 1
_ABOUT, _LOCK = "cache.json", "lock"
# Seconds after which a file that is being written belongs to a process that was killed.
_ABANDONED = 3600.0


@dataclass(frozen=True)
class CacheKind:
    """What a cache holds.

    Attributes:
        image_size: S, side of the square images in pixels.
        device: type of the device that decodes and resizes, "cpu" or "cuda": they round differently.
        versions: of the libraries that do it, by name.
    """

    image_size: int
    device: str
    versions: dict[str, str]


def _stamp(path: str) -> bytes:
    """A file's name, size, and times of its content and of its last change of any kind.

    Programs set the first time as they like (cp -p, rsync, tar), and the second one is the system's own, so a file that
    was replaced by another one of its size and time is noticed.
    """
    try:
        status = os.stat(path)
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    except OSError:
        # Whoever makes the cache says what is wrong with it.
        stamp = "missing"
    return f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape")


def _source_digest(split: Split) -> str:
    """Of the files that hold a split's images and of how these are turned; changes when an image does."""
    digest = hashlib.sha256(np.ascontiguousarray(split.orientation, np.uint8).tobytes())
    if split.shards is None:
        for sample in range(len(split)):
            digest.update(_stamp(split.path(sample)))
        return digest.hexdigest()
    digest.update((split.folder / SHARDS_FILE).read_bytes())
    digest.update(np.ascontiguousarray(split.shards.table).tobytes())
    if not isinstance(split.shards.root, Url):
        # One that was damaged and has been restored; what comes from a store is compared with its checksums.
        for number in range(len(split.shards.files)):
            digest.update(_stamp(split.shards.path(number)))
    return digest.hexdigest()


class ImageCache:
    """An opened cache.

    Args:
        path: the file of images.
        images: N.
        side: S.
        checksum: CRC-32 of the images' checksums, 8 hexadecimal digits.

    Raises:
        OSError: the file is missing.
        ValueError: it is not of that many bytes, or its checksums are damaged.
    """

    def __init__(self, path: Path, images: int, side: int, checksum: str) -> None:
        self.path = path
        size = require_regular(path).st_size
        if size != _file_bytes(images, side):
            raise ValueError(f"{path} has {size} bytes instead of {_file_bytes(images, side)}")
        data = np.memmap(path, np.uint8, "r")
        pixels = images * side * side * 3
        self._pixels = data[:pixels].reshape(images, side, side, 3)
        self._checksums = np.frombuffer(data[pixels:].tobytes(), "<u4")
        if f"{zlib.crc32(self._checksums.tobytes()):08x}" != checksum:
            raise ValueError(f"the checksums in {path} are damaged")
        self._checked = np.zeros(images, np.bool_)

    def __len__(self) -> int:
        return len(self._checksums)

    def image(self, sample: int) -> Pixels:
        """A resized image, uint8 [S, S, 3], read-only.

        Raises:
            UserError: it is damaged.
        """
        pixels: Pixels = self._pixels[sample]
        if not self._checked[sample]:
            if zlib.crc32(pixels.data) != self._checksums[sample]:
                raise UserError(
                    f"image {sample} in the cache {self.path} is damaged; remove the folder {self.path.parent}, and it "
                    "is made again"
                )
            self._checked[sample] = True
        return pixels


def _file_bytes(images: int, side: int) -> int:
    return images * (side * side * 3 + 4)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{max(1, round(size / 1e6)):,} MB"


def cache_folder(where: str, split: Split, kind: CacheKind) -> Path:
    """Where the cache of a split lies: in its Manifest for `auto`, else below the given folder."""
    manifest = split.manifest_folder
    assert manifest is not None
    root = manifest / "image_cache" if where == "auto" else Path(where)
    key = hashlib.sha256(f"{manifest.resolve()}\0{kind.image_size}\0{kind.device}".encode("utf-8", "surrogateescape"))
    return root / f"{split.name}-{kind.image_size}-{key.hexdigest()[:12]}"


def open_cache(
    where: str,
    split: Split,
    kind: CacheKind,
    make: Callable[[], Iterator[Pixels]],
    note: Callable[[str], None] = print_note,
) -> ImageCache:
    """Open the cache of a split; make it where there is none, or one of other images.

    Args:
        where: `auto`, or a folder.
        split: whose images; one of a Manifest.
        kind: what the cache holds.
        make: yields all images of the split in order, uint8 [B, S, S, 3].
        note: called with a sentence about what takes time.

    Raises:
        UserError: the disk lacks the space, the folder cannot be written, or an image cannot be used.
    """
    folder = cache_folder(where, split, kind)
    facts = {
        "format": _FORMAT,
        "images": len(split),
        "image_size": kind.image_size,
        "versions": kind.versions,
        "source": _source_digest(split),
    }
    try:
        if (cache := _opened(folder, facts, None)) is not None:
            return cache
        folder.mkdir(parents=True, exist_ok=True)
        with guarded(folder / _LOCK) as held:
            # Another rank or run may have made it meanwhile.
            if (cache := _opened(folder, facts, note)) is None:
                _make(folder, facts, make, note, _left_behind(folder, held.alone))
                cache = _opened(folder, facts, None)
    except OSError as error:
        reason = failure_reason(folder, error.errno, error.strerror, _file_bytes(len(split), kind.image_size))
        raise UserError(
            f"the image cache {folder} cannot be written ({reason}); give another folder as data.cache, or none"
        ) from error
    if cache is None:
        raise UserError(f"the image cache {folder} is damaged as soon as it is written; give another folder, or none")
    return cache


def _opened(folder: Path, facts: dict[str, Any], note: Callable[[str], None] | None) -> ImageCache | None:
    """The cache in a folder, or None: there is none, one of something else, or a damaged one, which `note` is told."""
    try:
        about = parse_json((folder / _ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        about = {}
    say = note or (lambda text: None)
    try:
        old = {name: about.get(name) for name in facts}
        if old == facts:
            # Only a name: never a path out of the folder.
            path = folder / Path(str(about["file"])).name
            return ImageCache(path, facts["images"], facts["image_size"], str(about["checksum"]))
        changed = ", ".join(name for name in facts if old[name] != facts[name])
        say(f"the image cache {folder} is of something else ({changed} differs), and is made again")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        say(f"the image cache {folder} is damaged ({error}), and is made again")
    return None


def _left_behind(folder: Path, alone: bool) -> dict[Path, int]:
    """Files of images that nobody will open any more, of an older cache or a process that was killed, and their bytes.

    Args:
        folder: of the cache.
        alone: nobody else makes a cache there now; else what was written to lately may be another process's.
    """
    left = {}
    for path in folder.glob("images-*.bin"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if alone or time.time() - status.st_mtime > _ABANDONED:
                left[path] = status.st_size
    return left


def _make(
    folder: Path,
    facts: dict[str, Any],
    make: Callable[[], Iterator[Pixels]],
    note: Callable[[str], None],
    left: Mapping[Path, int],
) -> None:
    """Write all images, and then what names them; files that were left behind go first."""
    images, side = facts["images"], facts["image_size"]
    size, free = _file_bytes(images, side), shutil.disk_usage(folder).free
    about = f"{images:,} images of {side} x {side} px are {_gigabytes(size)}"
    free += sum(left.values())
    if size > free:
        raise UserError(
            f"data.cache: {about}, and {folder} has {_gigabytes(free)} free; give another folder as data.cache, a "
            "smaller data.image_size, or none"
        )
    note(f"data.cache: {about}; they are made once, in {folder}")
    for path in left:
        # Whoever reads it has it mapped, and keeps it.
        path.unlink(missing_ok=True)
    path = folder / f"images-{uuid.uuid4().hex[:8]}.bin"
    checksums = np.zeros(images, "<u4")
    done = 0
    try:
        with path.open("wb") as file, show_progress(images, "caching images", True) as advance:
            for batch in make():
                for pixels in batch:
                    content = np.ascontiguousarray(pixels).data
                    checksums[done] = zlib.crc32(content)
                    file.write(content)
                    done += 1
                advance(len(batch))
            file.write(checksums.tobytes())
            flush_to_disk(file)
        checksum = f"{zlib.crc32(checksums.tobytes()):08x}"
        write_json(folder / _ABOUT, {**facts, "file": path.name, "checksum": checksum}, durable=True)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise

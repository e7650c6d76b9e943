"""The on-disk data set: what `spml-fast prepare` writes once and everything else reads.

    MANIFEST/
      manifest.json      format, name, image root, split sizes; written last, so a folder without it is not a Manifest
      classes.txt        one class name per line, line number = class id
      report.json        counts, images left out and why
      SPLIT/             train, val, test, or any other name
        width.npy height.npy    int32 [N], as shown (after orientation)
        orientation.npy         uint8 [N], EXIF orientation 1..8 that the loader applies; 1 = as stored
        paths.bin + paths.npy   UTF-8 bytes of all relative paths and int64 [N + 1] offsets; or, with a path template,
        ids.npy                 uint64 [N] numeric ids, and with several templates
        template.npy            number of each image's template, uint16 or uint32 [N]
        known/ observed/        SparseLabels: all annotated labels, and those that training may see
        boxes.npy + boxes_indptr.npy   optional, float32 [K, 5] (class, x0, y0, x1, y1 as fractions), int64 [N + 1]
        shards.json + shard_index.npy + shard_crc32.npy  when the images lie in tar shards: see data/shards.py

A column whose values are all equal has no file: manifest.json holds the one value. All arrays are opened memory-mapped:
a Manifest of nine million images opens without being read whole. What an array holds is checked when it is first used.

A Manifest may lie on object storage, at a URL: its files are fetched into the local cache, whose arrays are mapped then
(data/remote/mirror.py; manifest.json has their checksums), and its shards are read by ranges (data/remote/shards.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core import env, lock
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, partial_path, read_text, require_regular
from spml_fast.core.lock import READERS as READERS
from spml_fast.core.urls import Location, Url, is_url, join, location
from spml_fast.data.manifest_check import (
    ADVICE,
    MAX_SIDE,
    check_boxes,
    check_column,
    check_offsets,
    check_split_info,
    invalid,
    load_array,
    read_meta,
)
from spml_fast.data.read_retry import read_patiently
from spml_fast.data.remote import cache, mirror
from spml_fast.data.remote.shards import RemoteShards
from spml_fast.data.shards import INDEX_FILE, SHARDS_FILE, Shards
from spml_fast.data.sparse_labels import SparseLabels

FORMAT = 1

# In the folder of a Manifest that is being written: its writer holds a lock on it.
LOCK = ".lock"


class Split:
    """One split of a Manifest; sample indices are 0..N-1 within the split.

    Args:
        folder: where its arrays lie.
        image_root: folder that images' paths are relative to.
        info: its entry in manifest.json.
        num_classes: C, that its labels must be of; None where there are no labels.
        cache: folder that keeps what is read of images on object storage; None for the user's cache.

    Raises:
        UserError: (when an array is first used) it is missing, damaged or has values out of range.
    """

    def __init__(
        self,
        folder: Path,
        image_root: Location,
        info: Mapping[str, Any],
        num_classes: int | None = None,
        cache: Path | None = None,
    ) -> None:
        self._num_classes, self._cache = num_classes, cache
        self.folder, self.image_root = folder, image_root
        self._size = int(info["size"])
        template = info.get("template")
        self.templates: list[str] = [template] if isinstance(template, str) else list(template or [])
        self._constant: Mapping[str, int] = info.get("constant", {})
        self._hides_labels: bool | None = info.get("hides_labels")

    @property
    def manifest_folder(self) -> Path | None:
        """The Manifest that the split belongs to; None for images that belong to none."""
        return self.folder.parent

    @property
    def name(self) -> str:
        """The split's name."""
        return self.folder.name

    def __len__(self) -> int:
        return self._size

    def _array(self, name: str) -> npt.NDArray[Any]:
        return load_array(self.folder / f"{name}.npy")

    def _column(self, name: str, dtype: type, low: int, high: int) -> npt.NDArray[Any]:
        """A column that may be one value for all images; that takes no memory."""
        if name in self._constant:
            return np.broadcast_to(np.asarray(self._constant[name], dtype), (self._size,))
        return self._checked(name, (dtype,), low, high)

    def _checked(self, name: str, dtypes: Sequence[type], low: int, high: int) -> npt.NDArray[Any]:
        """A column with N values between `low` and `high`."""
        values = self._array(name)
        check_column(self.folder / f"{name}.npy", values, self._size, dtypes, low, high)
        return values

    @cached_property
    def width(self) -> npt.NDArray[np.int32]:
        """Image widths in pixels after orientation, int32 [N]; 0 where unknown."""
        return self._column("width", np.int32, 0, MAX_SIDE)

    @cached_property
    def height(self) -> npt.NDArray[np.int32]:
        """Image heights in pixels after orientation, int32 [N]; 0 where unknown."""
        return self._column("height", np.int32, 0, MAX_SIDE)

    @cached_property
    def orientation(self) -> npt.NDArray[np.uint8]:
        """EXIF orientation 1..8 that the loader applies to the stored pixels, uint8 [N]."""
        return self._column("orientation", np.uint8, 1, 8)

    @cached_property
    def _path_offsets(self) -> npt.NDArray[np.int64]:
        offsets = self._array("paths")
        check_offsets(self.folder / "paths.npy", offsets, self._size, len(self._path_bytes))
        return offsets

    @cached_property
    def _path_bytes(self) -> npt.NDArray[np.uint8]:
        path = self.folder / "paths.bin"
        try:
            size = require_regular(path).st_size
            return np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from error

    @cached_property
    def ids(self) -> npt.NDArray[np.uint64] | None:
        """Numeric ids, uint64 [N], when paths come from a template; None otherwise."""
        return self._checked("ids", (np.uint64,), 0, 2**64 - 1) if self.templates else None

    @cached_property
    def template_of(self) -> npt.NDArray[np.unsignedinteger] | None:
        """Number of each image's template, [N], where there are several; None otherwise."""
        count = len(self.templates)
        return self._checked("template", (np.uint16, np.uint32), 0, count - 1) if count > 1 else None

    def relative_path(self, index: int) -> str:
        """Path of an image relative to the image root."""
        if self.templates:
            assert self.ids is not None
            template = self.templates[0 if self.template_of is None else int(self.template_of[index])]
            return template.format(id=int(self.ids[index]), split=self.name)
        start, stop = self._path_offsets[index], self._path_offsets[index + 1]
        return self._path_bytes[start:stop].tobytes().decode("utf-8", "surrogateescape")

    @cached_property
    def shards(self) -> Shards | None:
        """The tar shards that hold the images; None when each image is a file."""
        if not (self.folder / SHARDS_FILE).exists():
            if isinstance(self.image_root, Url):
                raise UserError(
                    f"the images of {self.folder} are single files at {self.image_root}, and each would be a request; "
                    f"pack them into shards: {mirror.UPLOAD_ADVICE}"
                )
            return None
        if isinstance(self.image_root, Url):
            shards: Shards = RemoteShards(self.folder, self.image_root, self._cache or default_cache())
        else:
            shards = Shards(self.folder, self.image_root)
        if len(shards) != self._size:
            raise invalid(self.folder / INDEX_FILE, f"it has {len(shards)} images instead of {self._size}")
        return shards

    def path(self, index: int) -> str:
        """Full path of an image; with `shards` there is no such file, and `read` reads the image from its shard."""
        return os.path.join(self.image_root, self.relative_path(index))

    def read(self, index: int) -> bytes:
        """The encoded image, from its file or its shard. Raises `OSError`, or `UserError` naming the shard;
        input/output errors are met by further attempts first."""
        if self.shards is not None:
            return self.shards.read(index)

        def read() -> bytes:
            with open_regular(self.path(index)) as file:
                return file.read()

        return read_patiently(read)

    def place(self, index: int) -> str:
        """Where an image lies, for a message: its path, or its name, shard and offset."""
        if self.shards is not None:
            return f"{self.relative_path(index)} {self.shards.place(index)}"
        return self.path(index)

    @cached_property
    def known(self) -> SparseLabels:
        """All annotated labels: the truth that evaluation uses."""
        return self._labels("known")

    @cached_property
    def observed(self) -> SparseLabels:
        """The labels that training may see; the same as `known` when none was hidden."""
        folder = self.folder / "observed"
        return self._labels("observed") if folder.exists() else self.known

    def _labels(self, name: str) -> SparseLabels:
        labels = SparseLabels.load(self.folder / name)
        if len(labels) != self._size or self._num_classes not in (None, labels.num_classes):
            raise invalid(
                self.folder / name,
                f"the labels are of {len(labels)} images and {labels.num_classes} classes instead of {self._size} and "
                f"{self._num_classes}",
            )
        return labels

    @property
    def hides_labels(self) -> bool:
        """Whether `observed` leaves out labels that are known (a simulation), so that methods can be scored on them."""
        if self._hides_labels is not None:
            return self._hides_labels
        return (self.folder / "observed").exists()

    @cached_property
    def boxes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """(indptr int64 [N + 1], boxes float32 [K, 5] of class, x0, y0, x1, y1 in 0..1), or None when unknown."""
        if not (self.folder / "boxes.npy").exists():
            return None
        indptr, boxes = self._array("boxes_indptr"), self._array("boxes")
        check_boxes(self.folder, indptr, boxes, self._size, self._num_classes or 0)
        return indptr, boxes


class Manifest:
    """A prepared data set, opened for reading.

    Args:
        folder: the Manifest directory, or the URL of one.
        image_root: use this image folder, or URL, instead of the one recorded at preparation.
        cache: folder that keeps what is read from object storage; None for `spml_fast/remote` in the user's cache.

    Attributes:
        source: the Manifest directory or URL, as it was given.
        folder: where its files lie on the disk: the same directory or, of a URL, a folder of the cache.
        image_root: what images' paths are relative to.

    Raises:
        UserError: the folder is not a (whole) Manifest, or the URL cannot be read.
    """

    def __init__(
        self, folder: str | Path, image_root: str | Path | None = None, cache: str | Path | None = None
    ) -> None:
        self.source = location(folder)
        kept = Path(cache) if cache is not None else default_cache()
        self.folder = mirror.fetch_manifest(self.source, kept) if isinstance(self.source, Url) else self.source
        path = self.folder / "manifest.json"
        if not self.folder.exists():
            raise UserError(
                f"Manifest {self.folder} does not exist; restore it, or make it again with `spml-fast prepare`"
            )
        if not path.is_file():
            raise UserError(
                f"{self.folder} is not a Manifest (no manifest.json in it); make one with `spml-fast prepare`"
            )
        meta = read_meta(path)
        if not isinstance(meta, dict):
            raise invalid(path, "it holds no dictionary")
        if meta.get("format") != FORMAT:
            raise UserError(f"{path} has format {meta.get('format')!r}, this version reads {FORMAT}; prepare it again")
        for key, kind in (("name", str), ("image_root", str), ("splits", dict)):
            if not isinstance(meta.get(key), kind):
                raise invalid(path, f"it has {meta.get(key)!r} as its {key!r}")
        self.name: str = meta["name"]
        self.meta: dict[str, Any] = meta
        self.classes = read_text(self.folder / "classes.txt", "utf-8").split("\n")[:-1]
        root = location(image_root) if image_root is not None else join(self.source, meta["image_root"])
        self.image_root = root
        self.splits = {
            name: Split(self.folder / name, root, check_split_info(path, name, info), len(self.classes), kept)
            for name, info in meta["splits"].items()
        }

    @classmethod
    def configured(cls, config: DataConfig, folder: str | None = None) -> Manifest:
        """The Manifest of a run's `data` section; `folder` stands for a `data.dir` that is null. Raises `UserError`."""
        return cls(config.dir or str(folder), config.image_root, config.cache_dir)

    @property
    def where(self) -> str:
        """Its URL, or its absolute path, as plain text: what another process finds it by."""
        # Not a `Url`, which YAML refuses to write.
        return str(self.source if isinstance(self.source, Url) else self.source.resolve())

    def register_reader(self) -> Path | None:
        """Keep `prepare --overwrite` from replacing the Manifest while this process runs (not if it is read-only).

        Returns:
            As `lock.register_reader`.

        Raises:
            UserError: it is being replaced now.
        """
        if _locked(partial_path(self.folder) / LOCK):
            raise UserError(f"{self.folder} is being prepared anew by another command; wait for it")
        return lock.register_reader(self.folder / READERS)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """As `register_reader`, inside, for processes that go on for long afterwards."""
        note = self.register_reader()
        try:
            yield
        finally:
            if note is not None:
                lock.release(note)

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.classes)

    def split(self, name: str) -> Split:
        """The split called `name`; `UserError` names those that exist."""
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}; it has {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]


def default_cache() -> Path:
    """Where data on object storage is kept unless `data.cache_dir` says otherwise."""
    return env.cache_home() / cache.FOLDER


def may_exist(folder: str | Path) -> bool:
    """Whether there is a Manifest in a folder, or may be one at a URL, which is not asked."""
    return is_url(folder) or Path(folder, "manifest.json").is_file()


def _locked(path: Path) -> bool:
    """Whether another process holds a lock on a file."""
    try:
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN) and os.access(path, os.W_OK)
    return False

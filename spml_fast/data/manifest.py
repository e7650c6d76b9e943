"""The on-disk data set: what `launch/prepare.py` writes once and everything else reads.

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
        shards.json + shard_index.npy  when the images lie in tar shards: see data/shards.py

A column whose values are all equal has no file: manifest.json holds the one value. All arrays are opened memory-mapped:
a Manifest of nine million images opens without being read whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.read_retry import read_patiently
from spml_fast.data.shards import SHARDS_FILE, Shards

FORMAT = 1

# In the folder of a Manifest that is being written: its writer holds a lock on it.
LOCK = ".lock"


class Split:
    """One split of a Manifest; sample indices are 0..N-1 within the split.

    Args:
        folder: where its arrays lie.
        image_root: folder that images' paths are relative to.
        info: its entry in manifest.json.
    """

    def __init__(self, folder: Path, image_root: Path, info: Mapping[str, Any]) -> None:
        self.folder, self.image_root = folder, image_root
        self._size = int(info["size"])
        template = info.get("template")
        self.templates: list[str] = [template] if isinstance(template, str) else list(template or [])
        self._constant: Mapping[str, int] = info.get("constant", {})
        self._hides_labels: bool | None = info.get("hides_labels")

    @property
    def name(self) -> str:
        """The split's name."""
        return self.folder.name

    def __len__(self) -> int:
        return self._size

    def _array(self, name: str) -> npt.NDArray[Any]:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the data again") from error

    def _column(self, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A column that may be one value for all images; that takes no memory."""
        if name in self._constant:
            return np.broadcast_to(np.asarray(self._constant[name], dtype), (self._size,))
        return self._array(name)

    @cached_property
    def width(self) -> npt.NDArray[np.int32]:
        """Image widths in pixels after orientation, int32 [N]; 0 where unknown."""
        return self._column("width", np.int32)

    @cached_property
    def height(self) -> npt.NDArray[np.int32]:
        """Image heights in pixels after orientation, int32 [N]; 0 where unknown."""
        return self._column("height", np.int32)

    @cached_property
    def orientation(self) -> npt.NDArray[np.uint8]:
        """EXIF orientation 1..8 that the loader applies to the stored pixels, uint8 [N]."""
        return self._column("orientation", np.uint8)

    @cached_property
    def _path_offsets(self) -> npt.NDArray[np.int64]:
        return self._array("paths")

    @cached_property
    def _path_bytes(self) -> npt.NDArray[np.uint8]:
        path = self.folder / "paths.bin"
        return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)

    @cached_property
    def ids(self) -> npt.NDArray[np.uint64] | None:
        """Numeric ids, uint64 [N], when paths come from a template; None otherwise."""
        return self._array("ids") if self.templates else None

    @cached_property
    def template_of(self) -> npt.NDArray[np.unsignedinteger] | None:
        """Number of each image's template, [N], where there are several; None otherwise."""
        return self._array("template") if len(self.templates) > 1 else None

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
        return Shards(self.folder, self.image_root) if (self.folder / SHARDS_FILE).exists() else None

    def path(self, index: int) -> str:
        """Full path of an image; with `shards` there is no such file, and `read` reads the image from its shard."""
        return os.path.join(self.image_root, self.relative_path(index))

    def read(self, index: int) -> bytes:
        """The encoded image, from its file or its shard. Raises `OSError`, or `UserError` naming the shard;
        input/output errors are met by further attempts first."""
        if self.shards is not None:
            return self.shards.read(index)
        return read_patiently(lambda: Path(self.path(index)).read_bytes())

    def place(self, index: int) -> str:
        """Where an image lies, for a message: its path, or its name, shard and offset."""
        if self.shards is not None:
            return f"{self.relative_path(index)} {self.shards.place(index)}"
        return self.path(index)

    @cached_property
    def known(self) -> SparseLabels:
        """All annotated labels: the truth that evaluation uses."""
        return SparseLabels.load(self.folder / "known")

    @cached_property
    def observed(self) -> SparseLabels:
        """The labels that training may see; the same as `known` when none was hidden."""
        folder = self.folder / "observed"
        return SparseLabels.load(folder) if folder.exists() else self.known

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
        return self._array("boxes_indptr"), self._array("boxes")


class Manifest:
    """A prepared data set, opened for reading.

    Args:
        folder: the Manifest directory.
        image_root: use this image folder instead of the one recorded at preparation.

    Raises:
        UserError: the folder is not a (whole) Manifest.
    """

    def __init__(self, folder: str | Path, image_root: str | Path | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise UserError(
                f"{self.folder} is not a Manifest (no manifest.json in it); make one with launch/prepare.py"
            )
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); prepare the data again") from error
        if meta.get("format") != FORMAT:
            raise UserError(f"{path} has format {meta.get('format')!r}, this version reads {FORMAT}; prepare it again")
        self.name: str = meta["name"]
        self.meta: dict[str, Any] = meta
        self.classes = (self.folder / "classes.txt").read_text(encoding="utf-8").split("\n")[:-1]
        root = Path(image_root) if image_root is not None else self.folder / meta["image_root"]
        self.image_root = root
        self.splits = {name: Split(self.folder / name, root, info) for name, info in meta["splits"].items()}

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.classes)

    def split(self, name: str) -> Split:
        """The split called `name`; `UserError` names those that exist."""
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}; it has {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]

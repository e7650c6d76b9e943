"""The on-disk data set: what `launch/prepare.py` writes once and everything else reads.

    MANIFEST/
      manifest.json      format, name, image root, split sizes; written last, so a folder without it is not a Manifest
      classes.txt        one class name a line, line number = class id
      report.json        what preparation found: counts, pictures left out and why
      SPLIT/             train, val, test, or any other name
        width.npy height.npy    int32 [N], as shown (after orientation)
        orientation.npy         uint8 [N], EXIF orientation 1..8 that the loader applies; 1 = as stored
        paths.bin + paths.npy   UTF-8 bytes of all relative paths and int64 [N + 1] offsets; or, with a path template,
        ids.npy                 uint64 [N] numeric ids, and with several templates
        template.npy            number of each picture's template, uint16 or uint32 [N]
        known/ observed/        SparseLabels: everything that is annotated, and what training may see
        boxes.npy + boxes_indptr.npy   optional, float32 [K, 5] (class, x0, y0, x1, y1 as fractions), int64 [N + 1]
        shards.json + shard_index.npy  when the pictures lie in tar shards: see shards.py

A column whose values are all alike has no file: manifest.json holds the one value. All arrays are opened memory-mapped:
a Manifest of nine million pictures opens without being read.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.shards import SHARDS_FILE, Shards

FORMAT = 1
# In the folder of a Manifest that is being written: its writer holds a lock on it.
_LOCK = ".lock"


class Split:
    """One split of a Manifest; sample indices are 0..N-1 within the split.

    Args:
        folder: where its arrays lie.
        image_root: folder that pictures' paths are relative to.
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
        """A column that may be one value for all pictures; that takes no memory."""
        if name in self._constant:
            return np.broadcast_to(np.asarray(self._constant[name], dtype), (self._size,))
        return self._array(name)

    @cached_property
    def width(self) -> npt.NDArray[np.int32]:
        """Picture widths in pixels after orientation, int32 [N]; 0 where nobody looked."""
        return self._column("width", np.int32)

    @cached_property
    def height(self) -> npt.NDArray[np.int32]:
        """Picture heights in pixels after orientation, int32 [N]; 0 where nobody looked."""
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
        """Number of each picture's template, [N], where there are several; None otherwise."""
        return self._array("template") if len(self.templates) > 1 else None

    def relative_path(self, index: int) -> str:
        """Path of a picture relative to the image root."""
        if self.templates:
            assert self.ids is not None
            template = self.templates[0 if self.template_of is None else int(self.template_of[index])]
            return template.format(id=int(self.ids[index]), split=self.name)
        start, stop = self._path_offsets[index], self._path_offsets[index + 1]
        return self._path_bytes[start:stop].tobytes().decode("utf-8", "surrogateescape")

    @cached_property
    def shards(self) -> Shards | None:
        """The tar shards that hold the pictures; None when they are files of their own."""
        return Shards(self.folder, self.image_root) if (self.folder / SHARDS_FILE).exists() else None

    def path(self, index: int) -> str:
        """Full path of a picture; with `shards`, where it would lie as a file of its own (`read` finds it there)."""
        return os.path.join(self.image_root, self.relative_path(index))

    def read(self, index: int) -> bytes:
        """The encoded picture, from its file or its shard. Raises `OSError`, or `UserError` naming the shard."""
        if self.shards is not None:
            return self.shards.read(index)
        with open(self.path(index), "rb") as file:
            return file.read()

    def place(self, index: int) -> str:
        """Where a picture lies, in words for a message: its path, or its name, shard and offset."""
        if self.shards is not None:
            return f"{self.relative_path(index)} {self.shards.place(index)}"
        return self.path(index)

    @cached_property
    def known(self) -> SparseLabels:
        """Everything that is annotated: the truth that evaluation uses."""
        return SparseLabels.load(self.folder / "known")

    @cached_property
    def observed(self) -> SparseLabels:
        """What training may see; the same as `known` when nothing was hidden."""
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
        image_root: use this picture folder instead of the one recorded at preparation.

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


class ManifestWriter:
    """Writes a Manifest beside its final place and moves it there when it is whole.

    Args:
        folder: the Manifest directory to make. `UserError` if it exists and is not an empty folder, unless `overwrite`
            and it is a Manifest, or if another process is writing it.
        name: name of the data set.
        classes: class names in class-id order.
        image_root: folder that the pictures' paths are relative to. A folder inside `staging` is stored relative.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        classes: Sequence[str],
        image_root: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.overwrite = overwrite
        self.check_target(self.folder, overwrite)
        for line, class_name in enumerate(classes, 1):
            if "\n" in class_name or "\r" in class_name or not class_name:
                raise UserError(f"class {line} has an unusable name: {class_name!r}")
        seen: set[str] = set()
        for class_name in classes:
            if class_name in seen:
                raise UserError(f"class {class_name!r} is listed twice")
            seen.add(class_name)
        self.name, self.classes = name, list(classes)
        self.staging = self.folder.with_name(self.folder.name + ".partial")
        try:
            if (self.staging / _LOCK).exists():
                # Of a writer that is at work, or of one that was killed.
                weakref.finalize(self, os.close, self._lock())
            if self.staging.exists():
                shutil.rmtree(self.staging)
            self.staging.mkdir(parents=True)
            weakref.finalize(self, os.close, self._lock())
        except OSError as error:
            raise UserError(f"{self.staging} cannot be written ({error.strerror})") from error
        self.image_root = Path(image_root).resolve() if image_root is not None else None
        if self.image_root is not None and self.image_root.is_relative_to(self.folder.resolve()):
            # Replacing the folder would delete the pictures.
            shutil.rmtree(self.staging)
            raise UserError(f"the pictures lie inside {self.folder}; choose an --out outside {self.image_root}")
        self.splits: dict[str, dict[str, Any]] = {}

    def _lock(self) -> int:
        """Lock `staging` against other processes; the lock ends with the file returned, or with this process."""
        # Not flock, which worker processes would inherit.
        file = os.open(self.staging / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Anything else means a file system without locks, which must do without.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(file)
                raise UserError(
                    f"another command is writing {self.folder}; wait for it, or choose another --out"
                ) from error
        return file

    @staticmethod
    def check_target(folder: str | Path, overwrite: bool) -> None:
        """Raise `UserError` when a Manifest must not be written to `folder`."""
        folder = Path(folder)
        try:
            if not folder.exists():
                return
            if not folder.is_dir():
                raise UserError(f"{folder} is a file; choose another --out")
            if not any(folder.iterdir()):
                return
            is_manifest = (folder / "manifest.json").is_file()
        except OSError as error:
            raise UserError(f"{folder} cannot be used ({error.strerror}); choose another --out") from error
        if not is_manifest:
            raise UserError(f"{folder} exists and is not a Manifest; choose another --out")
        if not overwrite:
            raise UserError(f"{folder} already holds a Manifest; choose another --out or pass --overwrite")

    def add_split(
        self,
        name: str,
        *,
        known: SparseLabels,
        width: npt.ArrayLike,
        height: npt.ArrayLike,
        orientation: npt.ArrayLike | None = None,
        paths: Iterable[str] | None = None,
        ids: npt.ArrayLike | None = None,
        template: str | Sequence[str] | None = None,
        template_of: npt.NDArray[np.integer] | None = None,
        observed: SparseLabels | None = None,
        hides_labels: bool | None = None,
        boxes: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    ) -> None:
        """Write one split.

        Give `paths` (relative to the image root), or `ids` with a `template` such as `{split}/{id:016x}.jpg`. With
        several templates, `template_of` [N] holds the number of each picture's. `observed` None means that training
        sees everything that is known. `hides_labels` says whether `observed` leaves out labels that are known
        (default: if it is given).
        """
        size = len(known)
        if (paths is None) == (ids is None or template is None):
            raise ValueError("give either paths, or ids with a template")
        templates = [template] if isinstance(template, str) else list(template or [])
        if len(templates) > 1 and template_of is None:
            raise ValueError("with several templates, say which one each picture has")
        folder = self.staging / name
        folder.mkdir()
        constant: dict[str, int] = {}
        for key, values, dtype in (
            ("width", width, np.int32),
            ("height", height, np.int32),
            ("orientation", np.ones(size, np.uint8) if orientation is None else orientation, np.uint8),
        ):
            column = np.asarray(values, dtype=dtype)
            if size and len(column) == size and column.min() == column.max():
                constant[key] = int(column[0])
            else:
                self._save(folder / f"{key}.npy", column, size)
        if paths is not None:
            encoded = [p.encode("utf-8", "surrogateescape") for p in paths]
            offsets = np.zeros(len(encoded) + 1, np.int64)
            np.cumsum([len(e) for e in encoded], out=offsets[1:])
            (folder / "paths.bin").write_bytes(b"".join(encoded))
            self._save(folder / "paths.npy", offsets, size + 1)
        else:
            self._save(folder / "ids.npy", np.asarray(ids, dtype=np.uint64), size)
            if len(templates) > 1:
                assert template_of is not None
                number_type = np.uint16 if len(templates) <= 1 << 16 else np.uint32
                self._save(folder / "template.npy", np.asarray(template_of, dtype=number_type), size)
        known.save(folder / "known")
        if observed is not None:
            if len(observed) != size:
                raise ValueError(f"split {name}: {len(observed)} rows of observed labels for {size} samples")
            observed.save(folder / "observed")
        if boxes is not None:
            self._save(folder / "boxes_indptr.npy", np.asarray(boxes[0], np.int64), size + 1)
            np.save(folder / "boxes.npy", np.asarray(boxes[1], np.float32))
        info: dict[str, Any] = {"size": size, "template": templates[0] if len(templates) == 1 else templates or None}
        if constant:
            info["constant"] = constant
        if observed is not None and hides_labels is not None:
            info["hides_labels"] = hides_labels
        self.splits[name] = info

    @staticmethod
    def _save(path: Path, values: npt.NDArray[Any], size: int) -> None:
        if len(values) != size:
            raise ValueError(f"{path.name}: {len(values)} values, {size} expected")
        np.save(path, values)

    def finish(self, report: dict[str, Any]) -> Manifest:
        """Write classes, report and manifest.json, then move the folder to its place."""
        (self.staging / "classes.txt").write_text("".join(f"{c}\n" for c in self.classes), encoding="utf-8")
        (self.staging / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        root = "."
        if self.image_root is not None:
            staging = self.staging.resolve()
            inside = self.image_root.is_relative_to(staging)
            root = str(self.image_root.relative_to(staging) if inside else self.image_root)
        meta = {"format": FORMAT, "name": self.name, "image_root": root, "splits": self.splits}
        (self.staging / "manifest.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        (self.staging / _LOCK).unlink()
        if self.folder.exists():
            # Only an empty folder or, with overwrite, an older Manifest reaches this point.
            shutil.rmtree(self.folder)
        os.replace(self.staging, self.folder)
        return Manifest(self.folder)

"""Writes a Manifest: all of it, or nothing under its name."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import move_into_place, partial_path
from spml_fast.core.lock import readers
from spml_fast.core.text import has_surrogates
from spml_fast.core.urls import Location, Url, location
from spml_fast.data.manifest import FORMAT, LOCK, READERS, Manifest, Split
from spml_fast.data.manifest_check import load_array
from spml_fast.data.shards import CRC_FILE, INDEX_FILE, SHARDS_FILE, file_sha256
from spml_fast.data.sparse_labels import SparseLabels


class ManifestWriter:
    """Writes a Manifest beside its final place and moves it there when it is whole.

    Args:
        folder: the Manifest directory to make.
        name: name of the data set.
        classes: class names in class-id order.
        image_root: folder, or URL, that the images' paths are relative to. A folder inside `staging` is stored
            relative.
        overwrite: replace an older Manifest at `folder`.

    Attributes:
        staging: folder that the Manifest is written to.
        splits: entries of manifest.json.
        version: of the data set, where there are several.

    Raises:
        UserError: `folder` is neither an empty folder nor (with `overwrite`) a Manifest, another process is writing it,
            or a class has an unusable name.
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
            if "\n" in class_name or "\r" in class_name or not class_name or has_surrogates(class_name):
                raise UserError(f"class {line} has an unusable name: {class_name!r}")
        seen: set[str] = set()
        for class_name in classes:
            if class_name in seen:
                raise UserError(f"class {class_name!r} is listed twice")
            seen.add(class_name)
        if image_root is not None and has_surrogates(os.fspath(image_root)):
            raise UserError(f"the name of image folder {str(image_root)!r} is not UTF-8; rename it")
        self.name, self.classes = name, list(classes)
        self.version: str | None = None
        self.staging = partial_path(self.folder)
        try:
            if (self.staging / LOCK).exists():
                # Of a writer that is still writing, or of one that was killed.
                weakref.finalize(self, os.close, self._lock())
            if self.staging.exists():
                shutil.rmtree(self.staging)
            self.staging.mkdir(parents=True)
            weakref.finalize(self, os.close, self._lock())
        except OSError as error:
            raise UserError(f"{self.staging} cannot be written ({error.strerror})") from error
        root = location(image_root) if image_root is not None else None
        self.image_root: Location | None = root.resolve() if isinstance(root, Path) else root
        if isinstance(self.image_root, Path) and self.image_root.is_relative_to(self.folder.resolve()):
            # Replacing the folder would delete the images.
            shutil.rmtree(self.staging)
            raise UserError(f"the images lie inside {self.folder}; choose an --out outside {self.image_root}")
        self.splits: dict[str, dict[str, Any]] = {}

    def _lock(self) -> int:
        """Lock `staging` against other processes; the lock ends with the file returned, or with this process."""
        # Not flock, which worker processes would inherit.
        file = os.open(self.staging / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Any other error means a file system without locks.
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
        reading = readers(folder / READERS)
        if reading:
            # Their arrays would change under them, and images that lie in the folder be gone.
            raise UserError(
                f"{folder} is being read by {', '.join(map(str, reading))}; wait for it or choose another --out"
            )

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
        """Write one split. Give `paths`, or `ids` with a `template`.

        Args:
            name: of the split.
            known: all annotated labels, N rows.
            width: of the images as shown, int [N], 0 where unknown.
            height: of the images as shown, int [N], 0 where unknown.
            orientation: EXIF orientation that the loader applies, int [N]; None for 1 everywhere.
            paths: N paths relative to the image root.
            ids: numeric ids, int [N].
            template: path from an id, such as `{split}/{id:016x}.jpg`; or several of them.
            template_of: number of each image's template, int [N]; needed with several templates.
            observed: labels that training sees, N rows; None for all known ones.
            hides_labels: whether `observed` leaves out known labels; None: if it is given.
            boxes: (indptr int [N + 1], float [K, 5] of class, x0, y0, x1, y1 as fractions of the image as shown).

        Raises:
            ValueError: an array has another length than N, or paths are given in both ways or in none.
        """
        size = len(known)
        if (paths is None) == (ids is None or template is None):
            raise ValueError("give either paths, or ids with a template")
        templates = [template] if isinstance(template, str) else list(template or [])
        if len(templates) > 1 and template_of is None:
            raise ValueError("with several templates, say which one each image has")
        folder = self.staging / name
        folder.mkdir()
        orientation = np.ones(size, np.uint8) if orientation is None else orientation
        constant = self._write_columns(folder, size, width, height, orientation)
        if paths is not None:
            self._write_paths(folder, size, paths)
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

    def copy_split(
        self,
        split: Split,
        info: Mapping[str, Any],
        known: SparseLabels | None = None,
        observed: SparseLabels | None = None,
    ) -> None:
        """Take a split over from another Manifest, with its places in shards and its boxes, but not its images.

        Args:
            split: of the other Manifest.
            info: its entry in that one's manifest.json.
            known: other known labels; None for the same.
            observed: other observed labels; None for the same.
        """
        folder = self.staging / split.name
        new = {"known": known, "observed": observed}
        shutil.copytree(split.folder, folder, ignore=lambda path, names: {n for n in names if new.get(n) is not None})
        for name, labels in new.items():
            if labels is not None:
                labels.save(folder / name)
        self.splits[split.name] = dict(info)

    def take_rows(self, split: Split, rows: npt.NDArray[np.int64], name: str) -> None:
        """Make a split of some images of another Manifest's, without boxes; the images stay where they are.

        Args:
            split: of the other Manifest.
            rows: its images, ascending.
            name: of the new split.
        """
        template_of = split.template_of
        self.add_split(
            name,
            known=split.known.select(rows),
            observed=split.observed.select(rows) if (split.folder / "observed").exists() else None,
            hides_labels=split.hides_labels,
            width=split.width[rows],
            height=split.height[rows],
            orientation=split.orientation[rows],
            paths=None if split.templates else [split.relative_path(row) for row in rows.tolist()],
            ids=None if split.ids is None else split.ids[rows],
            # The images keep the name of their own split.
            template=[text.replace("{split}", split.name) for text in split.templates] or None,
            template_of=None if template_of is None else template_of[rows],
        )
        if split.shards is not None:
            shutil.copyfile(split.folder / SHARDS_FILE, self.staging / name / SHARDS_FILE)
            np.save(self.staging / name / INDEX_FILE, np.asarray(split.shards.table)[rows])
            if (split.folder / CRC_FILE).exists():
                np.save(self.staging / name / CRC_FILE, load_array(split.folder / CRC_FILE)[rows])

    def _write_columns(
        self, folder: Path, size: int, width: npt.ArrayLike, height: npt.ArrayLike, orientation: npt.ArrayLike
    ) -> dict[str, int]:
        """Write the columns whose values differ; returns those with one value for all images."""
        constant: dict[str, int] = {}
        for key, values, dtype in (
            ("width", width, np.int32),
            ("height", height, np.int32),
            ("orientation", orientation, np.uint8),
        ):
            column = np.asarray(values, dtype=dtype)
            if size and len(column) == size and column.min() == column.max():
                constant[key] = int(column[0])
            else:
                self._save(folder / f"{key}.npy", column, size)
        return constant

    def _write_paths(self, folder: Path, size: int, paths: Iterable[str]) -> None:
        """Write all paths as one run of bytes with offsets."""
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(path) for path in encoded], out=offsets[1:])
        (folder / "paths.bin").write_bytes(b"".join(encoded))
        self._save(folder / "paths.npy", offsets, size + 1)

    @staticmethod
    def _save(path: Path, values: npt.NDArray[Any], size: int) -> None:
        if len(values) != size:
            raise ValueError(f"{path.name}: {len(values)} values, {size} expected")
        np.save(path, values)

    def _checksums(self) -> dict[str, dict[str, Any]]:
        """Name -> size and SHA-256 of every file but images and manifest.json, for those who read it elsewhere."""
        inside = [path for name in self.splits for path in (self.staging / name).rglob("*") if path.is_file()]
        paths = [self.staging / "classes.txt", self.staging / "report.json", *sorted(inside)]
        return {
            path.relative_to(self.staging).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in paths
        }

    def finish(self, report: dict[str, Any]) -> Manifest:
        """Write classes, report and manifest.json, then move the folder to its place."""
        (self.staging / "classes.txt").write_text("".join(f"{c}\n" for c in self.classes), encoding="utf-8")
        (self.staging / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
        root = "."
        if isinstance(self.image_root, Url):
            root = str(self.image_root)
        elif self.image_root is not None:
            staging = self.staging.resolve()
            inside = self.image_root.is_relative_to(staging)
            root = str(self.image_root.relative_to(staging) if inside else self.image_root)
        meta: dict[str, Any] = {"format": FORMAT, "name": self.name}
        meta |= {} if self.version is None else {"version": self.version}
        meta |= {"image_root": root, "splits": self.splits, "files": self._checksums()}
        (self.staging / "manifest.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        (self.staging / LOCK).unlink()
        if self.folder.exists():
            # Only an empty folder or, with overwrite, an older Manifest reaches this point.
            self.check_target(self.folder, self.overwrite)
            shutil.rmtree(self.folder)
        move_into_place(self.staging, self.folder)
        return Manifest(self.folder)

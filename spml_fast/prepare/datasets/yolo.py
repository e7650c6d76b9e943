"""Detection sets in YOLO's format as image labels: data.yaml, and a text file of objects for each image.

    path: pets                  # folder that the others are relative to; without it, or where it does not exist, the
    train: images/train         #   file's own. A folder, a text file with one image per line, or a list of them
    val: images/val
    names: [cat, dog]           # or {0: cat, 1: dog}

The objects of `images/train/a.jpg` are in `labels/train/a.txt`, one per line, a class number first: boxes, polygons,
oriented boxes and poses are read alike. An empty file is an image without objects, and so is, as in YOLO's own
training, a missing one; `--missing unknown` says that nobody has looked at those.

Source: the loader of ultralytics 8.4 (data/utils.py, data/base.py), read for the format alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from spml_fast.core.errors import UserError
from spml_fast.core.io import read_lines, read_text
from spml_fast.core.progress import watched
from spml_fast.data.image_files import CONVERTIBLE_SUFFIXES, image_suffixes, images_below
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE
from spml_fast.prepare.datasets.base import Dataset, register, require_folder
from spml_fast.prepare.datasets.csv_table import folder_name
from spml_fast.prepare.image_table import ImageRow, ImageTable, NamedBox, class_list, relative_to, shown_value
from spml_fast.prepare.raw import Orientation, RawDataset

KEYS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def read_description(path: Path) -> dict[str, Any]:
    """data.yaml as a dictionary. Raises `UserError` naming the file, and the line where YAML knows it."""
    try:
        data = yaml.safe_load(read_text(path))
    # Dates such as 2001-99-99 and numbers of thousands of digits end in ValueError.
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{path}{line} is not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} has no names and no train; it is not a data.yaml of YOLO")
    return data


def read_names(data: dict[str, Any], path: Path) -> list[str]:
    """Class names in order of their numbers. Raises `UserError`."""
    names = data.get("names")
    if isinstance(names, dict):
        wrong = [key for key in names if not isinstance(key, int) or isinstance(key, bool)]
        if wrong or sorted(names) != list(range(len(names))):
            numbers = shown_value(list(names))
            raise UserError(f"{path}: the numbers of 'names' must be 0 to {len(names) - 1}, not {numbers}")
        names = [names[number] for number in range(len(names))]
    # YAML reads names such as 7 or no as something else than text.
    plain = [str(n) if isinstance(n, (int, float)) else n for n in names] if isinstance(names, list) else names
    return class_list(plain, f"{path}: 'names'")


def read_objects(path: Path, names: Sequence[str], pose: bool) -> list[NamedBox]:
    """Class and box of every object in a label file; a polygon's box is the one around its corners.

    Args:
        path: the text file.
        names: of the classes.
        pose: rows have key points behind the box (data.yaml has `kpt_shape`).

    Raises:
        UserError: naming file and line.
    """
    objects = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        # Neither nan nor inf is a place in an image.
        if len(values) < 5 or not all(-1e6 < value < 1e6 for value in values):
            raise UserError(f"{path}, line {number}: expected a class number and fractions, not {line[:60]!r}")
        if values[0] != int(values[0]) or not 0 <= values[0] < len(names):
            raise UserError(f"{path}, line {number}: {words[0][:20]} is no class number from 0 to {len(names) - 1}")
        name, places = names[int(values[0])], values[1:]
        # As YOLO's loader: up to six columns are a box (and a confidence), more are the corners of a polygon.
        if pose or len(values) <= 6:
            x, y, width, height = places[:4]
            box = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        elif len(places) % 2:
            raise UserError(f"{path}, line {number}: a polygon needs pairs of numbers, not {len(places)} numbers")
        else:
            box = min(places[::2]), min(places[1::2]), max(places[::2]), max(places[1::2])
        x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in box)
        objects.append((name, x0, y0, x1, y1))
    return objects


def label_path(image: str) -> str:
    """Where the objects of an image are: the last folder `images` becomes `labels`, the ending `.txt`."""
    head, found, tail = image.rpartition("/images/")
    swapped = f"{head}/labels/{tail}" if found else image
    return os.path.splitext(swapped)[0] + ".txt"


class _Places:
    """Resolves what data.yaml says about images.

    Args:
        path: of data.yaml.
        data: its content.
        root: folder that takes the place of its `path`.
    """

    def __init__(self, path: Path, data: dict[str, Any], root: Path | None) -> None:
        self.file, self.suffixes = path, image_suffixes() | CONVERTIBLE_SUFFIXES
        named = data.get("path")
        if named is not None and (not isinstance(named, str) or "\0" in named):
            raise UserError(f"{path}: 'path' is no folder, but {shown_value(named)}")
        # YOLO looks for a relative path below its own folder of data sets, which is nowhere here.
        inside = [path.parent / named, Path(named)] if named else []
        self.root = require_folder(root) if root else next((p for p in inside if os.path.isdir(p)), path.parent)

    def images(self, key: str, value: Any) -> list[str]:
        """Absolute paths of the images of `train`, `val` or `test`, sorted. Raises `UserError`."""
        found: list[str] = []
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, str) or not source or "\0" in source:
                raise UserError(f"{self.file}: {key!r} names no folder or list of images, but {shown_value(source)}")
            path = self._path(source)
            if os.path.isdir(path):
                if path == Path(path.anchor):
                    raise UserError(f"{self.file}: {key!r} is {source}, which is the whole file system")
                found += images_below(str(path), self.suffixes)
            elif os.path.isfile(path):
                found += self._listed(path)
            else:
                raise UserError(
                    f"{self.file}: {key!r} is {source}, but {path} does not exist (--root names its folder)"
                )
        if not found:
            endings = " ".join(sorted(self.suffixes))
            raise UserError(f"{self.file}: {key!r} names no image; files are taken that end in {endings}")
        return sorted(set(found))

    def _path(self, source: str) -> Path:
        """A place; files of Roboflow say `../train/images` for a folder beside them."""
        path, beside = self.root / source, self.root / source.removeprefix("../")
        return Path(os.path.abspath(beside if not os.path.exists(path) and os.path.exists(beside) else path))

    def _listed(self, path: Path) -> list[str]:
        found = []
        for number, line in enumerate(read_lines(path), 1):
            text = line.strip()
            if not text:
                continue
            if "\0" in text:
                raise UserError(f"{path}, line {number}: {text[:60]!r} is no file name")
            base = path.parent if text.startswith("./") else self.root
            found.append(os.path.abspath(base / text))
        return found


@register("yolo")
class Yolo(Dataset):
    """Detection sets in YOLO's format (data.yaml, labels/*.txt) as image labels."""

    default_observe: ClassVar[str] = "all"
    default_orientation: ClassVar[Orientation] = "exif"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The description and how it is read."""
        parser.add_argument("--data", required=True, type=Path, help="data.yaml, or the folder that it is in")
        parser.add_argument("--root", type=Path, help="folder that its paths are relative to (default: as it says)")
        parser.add_argument(
            "--missing",
            choices=["negative", "unknown"],
            default="negative",
            help="an image without a label file: has no object (default, as in YOLO's own training), or nobody has "
            "looked at it",
        )

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The description, the images and their label files."""
        path: Path = options.data
        if path.is_dir():
            path = next((p for p in (path / "data.yaml", path / "data.yml") if p.is_file()), path / "data.yaml")
        data = read_description(path)
        names = read_names(data, path)
        if not data.get("train"):
            raise UserError(f"{path} has no 'train'; it must name the training images")
        places = _Places(path, data, options.root)
        table = ImageTable()
        for key, split in KEYS.items():
            if data.get(key):
                images = places.images(key, data[key])
                self._add(table, split, images, places.root, names, options.missing, "kpt_shape" in data)
        return table.raw(folder_name(places.root), places.root, NEGATIVE, names)

    @staticmethod
    def _add(
        table: ImageTable,
        split: str,
        images: Sequence[str],
        root: Path,
        names: Sequence[str],
        missing: str,
        pose: bool,
    ) -> None:
        absent = 0
        with watched(images, f"reading labels of {split}", "files") as listed:
            for image in listed:
                path = Path(label_path(image))
                there = os.path.isfile(path)
                absent += not there
                objects = read_objects(path, names, pose) if there else []
                codes = {name: POSITIVE for name, *_ in objects}
                labelled = there or missing == "negative"
                table.add(split, ImageRow(relative_to(root, Path(image)), str(path), codes, labelled, objects))
        if absent == len(images):
            raise UserError(
                f"no image of {split} has a label file; that of {images[0]} would be {label_path(images[0])}"
            )
        if absent:
            meaning = "count as without objects" if missing == "negative" else "are unlabelled: all classes are unknown"
            table.notes.append(f"{split}: {absent:,} of {len(images):,} images have no label file and {meaning}")

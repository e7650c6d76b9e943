"""Images with their labels as an importer collects them, and the raw data set that they make.

Labels are class names here; which index a name has is settled when all of them are known. What an image does not list
is, as in tables (csv_table.py), unknown or absent as the importer says.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.core.text import has_surrogates, parse_json
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.prepare.raw import RawDataset, RawSplit

# What other programs call the splits.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# A class name and the corners x0, y0, x1, y1 as fractions of the image as it is shown.
NamedBox = tuple[str, float, float, float, float]


def shown_value(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + " ..."


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON; `what` says what was looked for.
    """
    try:
        with open_regular(path) as file:
            return parse_json(file.read())
    except OSError as error:
        raise UserError(f"{path} ({what}) cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} ({what}) is not valid JSON: {error}") from error


def class_text(value: Any, where: str) -> str:
    """A class name of a file. Raises `UserError` for what is no text, or cannot be written."""
    if not isinstance(value, str) or not value.strip() or has_surrogates(value) or "\n" in value or "\r" in value:
        raise UserError(f"{where}: {shown_value(value)} is no class name")
    return value.strip()


def class_list(value: Any, where: str) -> list[str]:
    """Class names in order. Raises `UserError` where it is no list, is empty, or names a class twice."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where} is no list of class names, but {shown_value(value)}")
    names = [class_text(name, f"{where}, entry {number}") for number, name in enumerate(value)]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{where} names class {name!r} twice")
        seen.add(name)
    return names


def fraction_box(value: Any, where: str, scale: float = 1.0) -> tuple[float, float, float, float]:
    """Corners of a box [x, y, width, height], within 0..1.

    Args:
        value: the four numbers.
        where: of the file, for messages.
        scale: what they are multiples of; 100 for per cent.

    Raises:
        UserError: it is something else.
    """
    fine = isinstance(value, (list, tuple)) and len(value) == 4
    # Neither inf nor a number of 400 digits is a place in an image.
    if not fine or not all(isinstance(v, (int, float)) and -1e9 < v < 1e9 for v in value):
        raise UserError(f"{where} has {shown_value(value)} as its box, not [x, y, width, height]")
    x, y, width, height = (float(v) / scale for v in value)
    return min(max(x, 0), 1), min(max(y, 0), 1), min(max(x + width, 0), 1), min(max(y + height, 0), 1)


def add_unlisted(parser: argparse.ArgumentParser, default: str) -> None:
    """Declare `--unlisted`, with the words that tables use."""
    parser.add_argument(
        "--unlisted",
        choices=["unknown", "negative"],
        help=f"what a class is that an image does not list (default: {default})",
    )


def code_of(choice: str | None, default: int) -> int:
    """Label code that `--unlisted` names."""
    return default if choice is None else UNKNOWN if choice == "unknown" else NEGATIVE


def relative_to(root: Path, path: Path) -> str:
    """A path relative to the folder of the images where it lies inside, else the absolute one."""
    absolute = os.path.abspath(path)
    base = os.path.join(os.path.abspath(root), "")
    return absolute[len(base) :] if absolute.startswith(base) else absolute


@dataclass
class ImageRow:
    """One image.

    Attributes:
        path: relative to the image root, or absolute.
        where: file and line (or entry) that names it.
        codes: class name -> code.
        labelled: False where nobody has looked at it: all of its classes are unknown.
        boxes: of its objects.
    """

    path: str
    where: str
    codes: Mapping[str, int]
    labelled: bool = True
    boxes: Sequence[NamedBox] = ()


@dataclass
class ImageTable:
    """The images of all splits.

    Attributes:
        splits: name -> rows in order.
        notes: sentences for the summary.
    """

    splits: dict[str, list[ImageRow]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _places: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, split: str, row: ImageRow) -> None:
        """Add an image. Raises `UserError` where it is there already, or its path is none."""
        if not row.path or "\0" in row.path:
            raise UserError(f"{row.where}: the path is {'empty' if not row.path else 'no file name'}")
        earlier = self._places.setdefault(row.path, (split, row.where))
        if earlier != (split, row.where):
            raise UserError(f"{row.where}: image {row.path} is listed twice; the first time at {earlier[1]}")
        self.splits.setdefault(split, []).append(row)

    def raw(
        self,
        name: str,
        root: Path | None,
        unlisted: int,
        classes: Sequence[str] | None = None,
        meaning: str | None = None,
    ) -> RawDataset:
        """All of it as a raw data set; without splits a fifth of the images becomes validation.

        Args:
            name: of the data set.
            root: folder that paths are relative to.
            unlisted: code of what a labelled image does not list.
            classes: names in order; None for all that are used, sorted.
            meaning: how the labels were read, for the summary; None says what `unlisted` means.

        Raises:
            UserError: there is no image for training, no positive label, or a name that `classes` lacks.
        """
        if "train" not in self.splits:
            others = ", ".join(sorted(self.splits))
            raise UserError(f"{name} has no training image" + (f" (only {others})" if others else ""))
        if not any(POSITIVE in row.codes.values() for row in self.splits["train"]):
            raise UserError(f"{name}: no training image has a positive class; there is nothing to learn from")
        ordered = list(classes) if classes is not None else sorted(set(self._names()))
        class_id = {class_name: i for i, class_name in enumerate(ordered)}
        for rows in self.splits.values():
            for row in rows:
                if missing := [class_name for class_name in row.codes if class_name not in class_id]:
                    raise UserError(f"{row.where}: class {missing[0]!r} is not among the {len(ordered)} classes")
        order = sorted(self.splits, key=lambda split: (split != "train", split))
        splits = [_raw_split(split, self.splits[split], class_id, unlisted) for split in order]
        notes = [*self.notes, meaning or self._meaning(unlisted)]
        carve = None
        if len(splits) == 1:
            notes.append("no other splits: a fifth of the images is for validation, and there is no test split")
            carve = ("train", "val")
        elif missing := [split for split in ("val", "test") if split not in self.splits]:
            notes.append(f"there is no {' and no '.join(missing)} split")
        return RawDataset(name, ordered, root, splits, carve, notes)

    def _names(self) -> Iterable[str]:
        return (class_name for rows in self.splits.values() for row in rows for class_name in row.codes)

    @staticmethod
    def _meaning(unlisted: int) -> str:
        meaning = {UNKNOWN: "unknown", NEGATIVE: "absent (negative)"}[unlisted]
        return f"classes that an image does not list were read as {meaning}"


def _raw_split(name: str, images: Sequence[ImageRow], class_id: Mapping[str, int], unlisted: int) -> RawSplit:
    rows: list[int] = []
    ids: list[int] = []
    codes: list[int] = []
    if not any(image.labelled for image in images):
        # Hidden labels of a test split: nothing is listed, in place of everything as unknown.
        unlisted = UNKNOWN
    for number, image in enumerate(images):
        listed = {class_id[class_name]: code for class_name, code in image.codes.items()}
        if not image.labelled and unlisted != UNKNOWN:
            listed = dict.fromkeys(range(len(class_id)), UNKNOWN) | listed
        for place, code in listed.items():
            if code != unlisted:
                rows.append(number)
                ids.append(place)
                codes.append(code)
    known = SparseLabels.from_entries(rows, ids, codes, len(images), len(class_id), unlisted)
    boxes = None
    if any(image.boxes for image in images):
        # A box without an area is a label, but no place.
        kept = [[b for b in image.boxes if b[3] > b[1] and b[4] > b[2]] for image in images]
        indptr = np.concatenate([[0], np.cumsum([len(b) for b in kept])]).astype(np.int64)
        values = [[class_id[b[0]], *b[1:]] for row_boxes in kept for b in row_boxes]
        boxes = indptr, np.array(values, np.float64).reshape(-1, 5)
    return RawSplit(name, known, paths=[image.path for image in images], boxes=boxes, boxes_as_shown=True)

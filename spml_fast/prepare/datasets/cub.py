"""CUB-200-2011 with its 312 attributes as classes (5,994 training and 5,794 test images).

    ROOT/images.txt                              image number and path
    ROOT/train_test_split.txt                    image number and 1 for training, 0 for test
    ROOT/attributes/image_attribute_labels.txt   image number, attribute number, is present (0 or 1), certainty, time
    ROOT/attributes/attributes.txt               attribute number and name; also found in ROOT or in the folder above
    ROOT/images/...

Protocol: the official split in the order of images.txt; an attribute is positive where "is
present" says so, however certain; everything else is negative; a fifth of the training images becomes validation.

Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021; docs/sources.md#cub.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, read_lines
from spml_fast.data.sparse_labels import NEGATIVE, UNKNOWN, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, add_val_fraction, register
from spml_fast.prepare.raw import RawDataset, RawSplit

NUM_ATTRIBUTES = 312
OFFICIAL = {"train": 5994, "test": 5794}
CERTAINTIES = ("not visible", "guessing", "probably", "definitely")


def read_numbered(path: Path) -> list[str]:
    """Texts of a file with lines `NUMBER TEXT`, numbered from 1 without gaps. Raises `UserError` naming the line."""
    lines = read_lines(path)
    out: list[str] = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        number, _, rest = text.strip().partition(" ")
        if number != str(len(out) + 1) or not rest.strip():
            raise UserError(f"{path}, line {line}: expected {len(out) + 1} and a text, not {text.strip()!r}")
        out.append(rest.strip())
    if not out:
        raise UserError(f"{path} is empty")
    return out


def read_attributes(path: Path, images: int, attributes: int, columns: int = 3) -> npt.NDArray[np.int64]:
    """Rows of image_attribute_labels.txt: image, attribute (both from 0), is present, and perhaps certainty (1 to 4).

    Some lines of the official file have a field too many behind these; what follows them is ignored.

    Args:
        path: the file.
        images: how many there are.
        attributes: how many there are.
        columns: 3, or 4 with the certainty.

    Returns:
        int64 [n, columns].

    Raises:
        UserError: naming file and line.
    """
    try:
        with open_regular(path) as file:
            table = np.loadtxt(file, np.int64, comments=None, usecols=range(columns), ndmin=2)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _wrong_line(path, images, attributes, columns) or UserError(f"{path} cannot be read: {error}") from error
    low, high = np.array([1, 1, 0, 1])[:columns], np.array([images, attributes, 1, len(CERTAINTIES)])[:columns]
    if len(table) and ((table < low) | (table > high)).any():
        raise _wrong_line(path, images, attributes, columns) or UserError(f"{path} has a number out of range")
    return table - np.array([1, 1, 0, 0])[:columns]


def _wrong_line(path: Path, images: int, attributes: int, columns: int) -> UserError | None:
    """The error that names the first wrong line."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="backslashreplace") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            try:
                image, attribute, present, *more = (int(field) for field in fields[:columns])
            except ValueError:
                return UserError(f"{path}, line {number}: expected whole numbers, not {line.strip()[:60]!r}")
            if not 1 <= image <= images:
                return UserError(f"{path}, line {number}: image {image} is not in images.txt")
            if not 1 <= attribute <= attributes:
                return UserError(f"{path}, line {number}: attribute {attribute} is not in attributes.txt")
            if present not in (0, 1):
                return UserError(f"{path}, line {number}: 'is present' is {present}, not 0 or 1")
            if len(fields) < columns or (more and not 1 <= more[0] <= len(CERTAINTIES)):
                return UserError(f"{path}, line {number}: the certainty must be 1 to {len(CERTAINTIES)}")
    return None


@register("cub")
class Cub(Dataset):
    """CUB-200-2011 birds, 312 attributes, in its official files."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Where the data set is, and how validation images are chosen."""
        parser.add_argument("--root", required=True, type=Path, help="folder with images.txt (CUB_200_2011)")
        parser.add_argument(
            "--certainty",
            type=int,
            choices=range(1, len(CERTAINTIES) + 1),
            default=1,
            help="least certainty with which an attribute is known: "
            + ", ".join(f"{i} {name}" for i, name in enumerate(CERTAINTIES, 1))
            + " (default: 1, all of them, as in the papers)",
        )
        add_val_fraction(parser)

    def read(self, options: argparse.Namespace) -> RawDataset:
        """Attributes of train and test."""
        root: Path = options.root
        if not (root / "images.txt").is_file() and (root / "CUB_200_2011" / "images.txt").is_file():
            root = root / "CUB_200_2011"
        paths = read_numbered(root / "images.txt")
        flags = read_numbered(root / "train_test_split.txt")
        if len(flags) != len(paths) or not {"0", "1"}.issuperset(flags):
            raise UserError(f"{root / 'train_test_split.txt'} must have 0 or 1 for each of {len(paths)} images")
        paths_tried = [root / "attributes" / "attributes.txt", root / "attributes.txt", root.parent / "attributes.txt"]
        names = next((path for path in paths_tried if path.is_file()), None)
        if names is None:
            raise UserError(f"attributes.txt is neither in {root}, its attributes folder nor the folder above; copy it")
        classes = read_numbered(names)
        notes = []
        if len(classes) != NUM_ATTRIBUTES:
            notes.append(f"{len(classes)} attributes found, not the official {NUM_ATTRIBUTES}")
        table = root / "attributes" / "image_attribute_labels.txt"
        known = self._known(table, len(paths), len(classes), options.certainty, notes)
        training = np.array(flags) == "1"
        splits = []
        for name, rows in (("train", np.flatnonzero(training)), ("test", np.flatnonzero(~training))):
            if len(rows) != OFFICIAL[name]:
                notes.append(f"{name}: {len(rows):,} images, not the official {OFFICIAL[name]:,}")
            splits.append(RawSplit(name, known.select(rows), paths=[paths[i] for i in rows.tolist()]))
        carve = ("train", "val") if options.val_fraction == "published" else None
        return RawDataset("cub", classes, root / "images", splits, carve, notes)

    @staticmethod
    def _known(path: Path, images: int, attributes: int, certainty: int, notes: list[str]) -> SparseLabels:
        """Labels from the table, where it is at least that certain; without a demand all others are negative.

        Args:
            path: the table.
            images: how many there are.
            attributes: how many there are.
            certainty: 1 to 4; from 2 on what is less certain, or missing, is unknown.
            notes: sentences for the summary are added here.
        """
        partial = certainty > 1
        image, attribute, present, *certain = read_attributes(path, images, attributes, 4 if partial else 3).T
        pairs = image * attributes + attribute
        keys, first, group = np.unique(pairs, return_index=True, return_inverse=True)
        if len(keys) < len(image):
            wrong = np.flatnonzero(present[first][group] != present)
            if len(wrong):
                entry = int(wrong[0])
                raise UserError(
                    f"{path} contradicts itself: attribute {attribute[entry] + 1} of image {image[entry] + 1} is both"
                )
            notes.append(f"{len(image) - len(keys):,} lines of {path.name} repeat others")
        missing = images * attributes - len(keys)
        if missing:
            notes.append(
                f"{missing:,} attributes of images are not annotated and {'unknown' if partial else 'count as absent'}"
            )
        codes = present[first]
        chosen = certain[0][first] >= certainty if partial else codes == 1
        if partial:
            left = int((~chosen).sum())
            notes.append(f"{left:,} attributes of images are less certain than {CERTAINTIES[certainty - 1]!r}: unknown")
        keys, codes = keys[chosen], codes[chosen]
        default = UNKNOWN if partial else NEGATIVE
        return SparseLabels.from_entries(keys // attributes, keys % attributes, codes, images, attributes, default)

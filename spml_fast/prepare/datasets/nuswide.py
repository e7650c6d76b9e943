"""NUS-WIDE with its 81 concepts, in either of its two published forms.

The arrays of the single-positive papers (150,000 training and 60,260 test images, crawled again in 2020):

    ROOT/formatted_{train,val}_images.npy   paths of the images, text [N]
    ROOT/formatted_{train,val}_labels.npy   0 or 1, [N, 81]; `val` is the test set
    ROOT/Flickr/...                         the images

The original distribution (161,789 and 107,859 images), which other papers use:

    ROOT/ConceptsList/Concepts81.txt                              one concept per line
    ROOT/ImageList/{Train,Test}Imagelist.txt                      one path per line, with backslashes
    ROOT/Groundtruth/TrainTestLabels/Labels_CONCEPT_{Train,Test}.txt   0 or 1 per line
    ROOT/Flickr/...

Copies of it name the folders otherwise: GroundTruth, the lists or the labels in ROOT itself, images/ with all images in
one folder. Those are found too.

Protocol: rows in the order of the files; images without any label are kept (22 per cent) and
observe nothing; a fifth of the training images becomes validation. The columns of the arrays are in alphabetical order,
as the original distribution's list of concepts is.

Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021; docs/sources.md#nuswide.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text
from spml_fast.data.sparse_labels import NEGATIVE, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, add_val_fraction, register
from spml_fast.prepare.label_encodings import load_array
from spml_fast.prepare.raw import RawDataset, RawSplit

CONCEPTS = [
    *("airport", "animal", "beach", "bear", "birds", "boats", "book", "bridge", "buildings", "cars", "castle", "cat"),
    *("cityscape", "clouds", "computer", "coral", "cow", "dancing", "dog", "earthquake", "elk", "fire", "fish"),
    *("flags", "flowers", "food", "fox", "frost", "garden", "glacier", "grass", "harbor", "horses", "house", "lake"),
    *("leaf", "map", "military", "moon", "mountain", "nighttime", "ocean", "person", "plane", "plants", "police"),
    *("protest", "railroad", "rainbow", "reflection", "road", "rocks", "running", "sand", "sign", "sky", "snow"),
    *("soccer", "sports", "statue", "street", "sun", "sunset", "surf", "swimmers", "tattoo", "temple", "tiger"),
    *("tower", "town", "toy", "train", "tree", "valley", "vehicle", "water", "waterfall", "wedding", "whales"),
    *("window", "zebra"),
]
# Images, and images without any label, of the published arrays; images of the original lists.
PUBLISHED = {"train": (150_000, 33_410), "test": (60_260, 13_412)}
ORIGINAL = {"train": 161_789, "test": 107_859}
# Where copies keep the parts of the original distribution, under the root.
LIST_FOLDERS = ("ImageList", "Imagelist", "image_list", "")
LABEL_FOLDERS = (
    *(
        "Groundtruth/TrainTestLabels",
        "GroundTruth/TrainTestLabels",
        "TrainTestLabels",
        "Groundtruth",
        "GroundTruth",
        "",
    ),
)
CONCEPT_FILES = ("ConceptsList/Concepts81.txt", "Concepts81.txt")
IMAGE_FOLDERS = ("Flickr", "images", "Images")
# Rows read at a time.
_ROWS = 1 << 14


def labels_of_array(path: Path, rows: int) -> SparseLabels:
    """Full labels, 0 or 1 [N, 81]. Raises `UserError` naming row and column of another value."""
    values = load_array(path)
    if values.shape != (rows, len(CONCEPTS)) or values.dtype.kind not in "biuf":
        raise UserError(
            f"{path} has shape {values.shape} and type {values.dtype}; {rows} x {len(CONCEPTS)} numbers are needed, as "
            f"many rows as images"
        )
    row_parts, class_parts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for start in range(0, rows, _ROWS):
        block = np.asarray(values[start : start + _ROWS])
        wrong = (block != 0) & (block != 1)
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise UserError(f"{path}: row {start + row}, column {column} holds {block[row, column]}, not 0 or 1")
        row_of, class_of = np.nonzero(block)
        row_parts.append(row_of + start)
        class_parts.append(class_of)
    row_of, class_of = np.concatenate(row_parts), np.concatenate(class_parts)
    return SparseLabels.from_entries(row_of, class_of, np.ones(len(row_of)), rows, len(CONCEPTS), NEGATIVE)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without blanks at their ends; empty lines at the end of the file do not count."""
    return [line.strip() for line in re.split("\r\n|\r|\n", read_text(path).rstrip())]


def read_concept(path: Path, images: int, listed: Path) -> npt.NDArray[np.int64]:
    """Rows that have a concept. Raises `UserError` naming file and line."""
    lines = read_lines(path)
    if len(lines) != images:
        raise UserError(f"{path} has {len(lines)} lines, but {listed} lists {images} images")
    values = np.array(lines)
    wrong = np.flatnonzero((values != "0") & (values != "1"))
    if len(wrong):
        raise UserError(f"{path}, line {wrong[0] + 1}: expected 0 or 1, not {lines[wrong[0]]!r}")
    return np.flatnonzero(values == "1")


def find_folder(root: Path, folders: Sequence[str], name: str) -> Path | None:
    """The first of some folders under the root that holds a file of that name."""
    return next((root / f for f in folders if (root / f / name).is_file()), None)


def in_one_folder(images: Path, splits: Sequence[RawSplit]) -> bool:
    """Whether the images lie in one folder, without the folders by concept that the lists name."""
    some = list(itertools.islice((p for s in splits for p in s.paths or ()), 1000))
    return not any((images / p).exists() for p in some) and any((images / Path(p).name).exists() for p in some)


def photo_notes(splits: Sequence[RawSplit]) -> list[str]:
    """What is to be said of photos that are listed more than once; files are named NUMBER_PHOTO.jpg, by concept."""
    photos = {s.name: [Path(p).stem.rpartition("_")[2] for p in s.paths or ()] for s in splits}
    counts = Counter(photo for listed in photos.values() for photo in listed)
    repeated = {photo for photo, count in counts.items() if count > 1}
    if not repeated:
        return []
    both = len(repeated & set(photos["train"]) & set(photos["test"]))
    return [
        f"{len(repeated):,} photos are listed more than once, under several concepts, {both:,} of them in train and in "
        "test; they are kept, as in the published lists"
    ]


@register("nuswide")
class NusWide(Dataset):
    """NUS-WIDE, 81 concepts: the single-positive papers' arrays or the original distribution."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Where the data set is, and how validation images are chosen."""
        parser.add_argument(
            "--root", required=True, type=Path, help="folder with formatted_*.npy, or with ImageList and Groundtruth"
        )
        parser.add_argument("--images", type=Path, help="folder of the images (default: Flickr in --root)")
        add_val_fraction(parser)

    def read(self, options: argparse.Namespace) -> RawDataset:
        """Labels and lists of train and test."""
        root: Path = options.root
        if (root / "formatted_train_images.npy").is_file():
            splits, notes = self._read_arrays(root)
        elif (lists := find_folder(root, LIST_FOLDERS, "TrainImagelist.txt")) is not None:
            splits, notes = self._read_lists(root, lists)
        else:
            raise UserError(
                f"{root} holds neither formatted_train_images.npy nor ImageList/TrainImagelist.txt; "
                "give NUS-WIDE's folder"
            )
        images: Path | None = options.images or next((root / f for f in IMAGE_FOLDERS if (root / f).is_dir()), None)
        if images is None or not images.is_dir():
            raise UserError(f"image folder {images or root / 'Flickr'} does not exist; name it with --images")
        if in_one_folder(images, splits):
            for split in splits:
                split.paths = [Path(p).name for p in split.paths or ()]
        for split in splits:
            empty = int((np.diff(split.known.indptr) == 0).sum())
            notes.append(f"{split.name}: {empty:,} official images have no label at all and are kept")
        notes += photo_notes(splits)
        carve = ("train", "val") if options.val_fraction == "published" else None
        return RawDataset("nuswide", CONCEPTS, images, splits, carve, notes)

    @staticmethod
    def _read_arrays(root: Path) -> tuple[list[RawSplit], list[str]]:
        notes: list[str] = []
        splits = []
        for official, name in (("train", "train"), ("val", "test")):
            paths = load_array(root / f"formatted_{official}_images.npy")
            if paths.ndim != 1 or paths.dtype.kind not in "US":
                raise UserError(f"{root / f'formatted_{official}_images.npy'} is not a list of paths")
            text = (np.char.decode(paths, "utf-8") if paths.dtype.kind == "S" else paths).tolist()
            known = labels_of_array(root / f"formatted_{official}_labels.npy", len(paths))
            splits.append(RawSplit(name, known, paths=[p.replace("\\", "/") for p in text]))
            size, empty = PUBLISHED[name]
            if len(paths) != size:
                notes.append(f"{name}: {len(paths):,} images, not the published {size:,}")
            elif (unlabelled := int((np.diff(known.indptr) == 0).sum())) != empty:
                notes.append(f"{name}: {unlabelled:,} images without a label, not the published {empty:,}")
        return splits, notes

    @staticmethod
    def _read_lists(root: Path, lists: Path) -> tuple[list[RawSplit], list[str]]:
        notes = ["the original distribution: other images and another test set than in the single-positive papers"]
        for names in (root / name for name in CONCEPT_FILES):
            if names.is_file() and read_lines(names) != CONCEPTS:
                raise UserError(f"{names} does not list the 81 concepts in alphabetical order")
        labels = find_folder(root, LABEL_FOLDERS, f"Labels_{CONCEPTS[0]}_Train.txt")
        if labels is None:
            raise UserError(
                f"{root} holds no {LABEL_FOLDERS[0]}/Labels_{CONCEPTS[0]}_Train.txt; give NUS-WIDE's folder"
            )
        splits = []
        for official, name in (("Train", "train"), ("Test", "test")):
            listed = lists / f"{official}Imagelist.txt"
            paths = [line.replace("\\", "/") for line in read_lines(listed)]
            rows = []
            for concept in CONCEPTS:
                path = labels / f"Labels_{concept}_{official}.txt"
                rows.append(read_concept(path, len(paths), listed))
            classes = np.repeat(np.arange(len(CONCEPTS)), [len(r) for r in rows])
            row_of = np.concatenate(rows)
            known = SparseLabels.from_entries(
                row_of, classes, np.ones(len(row_of)), len(paths), len(CONCEPTS), NEGATIVE
            )
            splits.append(RawSplit(name, known, paths=paths))
            if len(paths) != ORIGINAL[name]:
                notes.append(f"{name}: {len(paths):,} images, not the official {ORIGINAL[name]:,}")
        return splits, notes

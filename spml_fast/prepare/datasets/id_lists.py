"""Lists of images with the numbers of their classes, as several papers publish them (SPLC, SCPNet and others).

    COCO_train2014_000000480023.jpg, 0 52

A line names an image, then, behind the last comma, the classes that it has, counted from 0 in the order of the class
file; all others are absent. A second list of the training images, with fewer classes, says which labels training sees.

Source: docs/sources.md#protocol (protocol B: NUS-WIDE 119,103 and 50,720 images, and other lists).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text
from spml_fast.data.sparse_labels import NEGATIVE, UNKNOWN, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, register, require_folder
from spml_fast.prepare.datasets.csv_table import folder_name, read_classes
from spml_fast.prepare.raw import RawDataset, RawSplit


def read_list(path: Path, num_classes: int) -> dict[str, list[int]]:
    """Image -> ids of its classes, ascending, in the order of the file. Raises `UserError` naming file and line."""
    images: dict[str, list[int]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        image, comma, text = (part.strip() for part in line.rpartition(","))
        if not comma or not image:
            raise UserError(f"{path}, line {number}: expected an image, a comma and class numbers, not {line[:60]!r}")
        if image in images:
            raise UserError(f"{path}, line {number}: image {image} is listed twice")
        ids = set[int]()
        for word in text.split():
            if not (word.isascii() and word.isdigit()) or len(word) > 9 or int(word) >= num_classes:
                raise UserError(f"{path}, line {number}: {word[:20]!r} is no class number from 0 to {num_classes - 1}")
            ids.add(int(word))
        images[image] = sorted(ids)
    if not images:
        raise UserError(f"{path} lists no image")
    return images


def observed_of(path: Path, known: Mapping[str, list[int]], num_classes: int) -> SparseLabels:
    """Observed positives of the images of `known`. Raises `UserError` where the list contradicts the full one."""
    listed = read_list(path, num_classes)
    if listed.keys() != known.keys():
        other = sorted(listed.keys() ^ known.keys())
        raise UserError(f"{path} and the full list name different images ({len(other):,}; the first is {other[0]})")
    for image, ids in listed.items():
        if not set(ids).issubset(known[image]):
            raise UserError(f"{path}: image {image} has class {min(set(ids) - set(known[image]))} only here")
    return SparseLabels.from_positives([listed[image] for image in known], num_classes, UNKNOWN)


@register("lists")
class IdLists(Dataset):
    """Lists of images with class numbers, and which of them are observed."""

    default_observe: ClassVar[str] = "all"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The lists, one for each split."""
        parser.add_argument("--train", required=True, type=Path, help="list of the training images: image,ids")
        parser.add_argument("--train-observed", type=Path, help="the same images with the classes that training sees")
        parser.add_argument(
            "--val", type=Path, help="list of validation images (default: a fifth of the training ones)"
        )
        parser.add_argument("--test", type=Path, help="list of the test images")
        parser.add_argument("--classes", required=True, type=Path, help="class names, one per line, in their order")
        parser.add_argument("--images", required=True, help="folder that the images are in; none: labels alone")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The lists."""
        classes = read_classes(options.classes)
        folder = None if options.images == "none" else require_folder(Path(options.images))
        splits, split_of = [], dict[str, str]()
        for name, path in (("train", options.train), ("val", options.val), ("test", options.test)):
            if path is None:
                continue
            listed = read_list(path, len(classes))
            for image in listed:
                if split_of.setdefault(image, name) != name:
                    raise UserError(f"{path}: image {image} is in the list of split {split_of[image]} too")
            split = RawSplit(
                name, SparseLabels.from_positives(list(listed.values()), len(classes), NEGATIVE), paths=list(listed)
            )
            if name == "train" and options.train_observed is not None:
                split.observed = observed_of(options.train_observed, listed, len(classes))
            splits.append(split)
        notes = [] if options.test else ["no list of test images: there is no test split"]
        name = options.train.stem if folder is None else folder_name(folder)
        carve = None if options.val else ("train", "val")
        return RawDataset(name, classes, folder, splits, carve, notes, labels_alone=folder is None)

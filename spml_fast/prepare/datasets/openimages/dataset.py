"""The OpenImages data set: label files, class files, image lists and images, put together.

Protocol: a row with confidence 1 is an observed positive, with 0 an observed negative, and what has no row is unknown.
Classes are those of the trainable list, in its order; rows of others are dropped. An image is in a split if it has a
label of these classes and if its file exists. Machine labels are used only on request; training sees them as
positives, and they are never part of the truth that evaluation uses.

Source: docs/sources.md#openimages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.datasets.base import Dataset, register
from spml_fast.prepare.datasets.openimages.class_files import class_names, read_classes, read_descriptions
from spml_fast.prepare.datasets.openimages.coverage import Coverage
from spml_fast.prepare.datasets.openimages.grouping import group_rows
from spml_fast.prepare.datasets.openimages.image_folder import find_images
from spml_fast.prepare.datasets.openimages.image_lists import add_rotations
from spml_fast.prepare.datasets.openimages.label_files import read_labels
from spml_fast.prepare.datasets.openimages.split_names import SPLIT_WORDS, SPLITS, split_files
from spml_fast.prepare.raw import RawDataset, RawSplit


@register("openimages")
class OpenImages(Dataset):
    """OpenImages V3 to V7 image-level labels, with or without the images."""

    default_observe: ClassVar[str] = "all"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Label files, classes, images."""
        parser.add_argument(
            "--labels",
            required=True,
            nargs="+",
            metavar="[SPLIT=]CSV",
            help="human-verified image labels, of one split or of several; the split is told by the file's name, by "
            "--split, or by train=, val= or test= before the path",
        )
        parser.add_argument(
            "--split",
            nargs="+",
            choices=list(SPLIT_WORDS),
            metavar="{train,val,test}",
            help="split of each file of --labels, or of all of them",
        )
        parser.add_argument("--classes", required=True, type=Path, help="trainable classes, one id per line, in order")
        parser.add_argument("--descriptions", type=Path, help="class names (class-descriptions.csv)")
        parser.add_argument(
            "--images",
            required=True,
            help="folder of the images, ID.jpg in any folders below it; none: prepare the labels alone",
        )
        parser.add_argument(
            "--images-info",
            nargs="+",
            type=Path,
            default=[],
            metavar="CSV",
            help="image lists with a column Rotation (V4 and later); images are turned as they say",
        )
        parser.add_argument(
            "--machine-labels",
            nargs="+",
            default=[],
            metavar="[SPLIT=]CSV",
            help="machine-generated labels; training sees those of at least --machine-threshold as positives",
        )
        parser.add_argument(
            "--machine-threshold", type=float, metavar="T", help="confidence from which on a machine label is used"
        )
        parser.add_argument(
            "--conflicts",
            choices=["positive", "negative", "last", "drop"],
            default="positive",
            help="which label counts where verified rows contradict each other; drop: none (default: %(default)s)",
        )

    def prepare(self, options: argparse.Namespace) -> Manifest:
        """Raw files -> Manifest."""
        if options.images == "none" and options.verify not in (None, "none"):
            raise UserError(f"--verify {options.verify} needs images; give their folder with --images")
        if bool(options.machine_labels) != (options.machine_threshold is not None):
            raise UserError("--machine-labels and --machine-threshold go together; give both or neither")
        if options.machine_threshold is not None and not 0 < options.machine_threshold <= 1:
            raise UserError("--machine-threshold must be above 0 and at most 1")
        return super().prepare(options)

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The label files, and which of their images exist."""
        files = split_files(options.labels, options.split, "--labels")
        machine_files = split_files(options.machine_labels, None, "--machine-labels")
        for name in machine_files:
            if name not in files:
                raise UserError(f"--machine-labels has split {name}, --labels does not; give its verified labels too")
        folder = None if options.images == "none" else Path(options.images)
        if folder is not None and not folder.is_dir():
            raise UserError(f"image folder {folder} does not exist; write --images none for the labels alone")
        class_ids = read_classes(options.classes)
        descriptions = read_descriptions(options.descriptions) if options.descriptions else {}
        notes: list[str] = []
        unnamed = sum(class_id not in descriptions for class_id in class_ids)
        if unnamed:
            notes.append(
                f"{unnamed:,} of {len(class_ids):,} classes have no name in --descriptions; their ids are used"
            )
        # Before the labels, which take longer to read than a wrong folder to find.
        images = None if folder is None else find_images(folder)
        raw = RawDataset(
            "openimages",
            class_names(class_ids, descriptions),
            folder,
            [],
            notes=notes,
            settings={
                "conflicts": options.conflicts,
                "machine_threshold": options.machine_threshold,
                "class_ids": class_ids,
            },
            labels_alone=folder is None,
        )
        coverage = Coverage(images, raw)
        for name, paths in files.items():
            rows = read_labels(paths, class_ids)
            machine = None
            if name in machine_files:
                machine = read_labels(machine_files[name], class_ids, options.machine_threshold)
            grouped = group_rows(rows, machine, len(class_ids), options.conflicts)
            if not len(grouped.ids):
                raise UserError(f"no row of {paths[0]} has a class of {options.classes}; are they of the same release?")
            for other in raw.splits:
                _refuse_shared(name, grouped.ids, other)
            coverage.count_rows(name, rows, machine, grouped, options)
            raw.splits.append(coverage.locate_images(name, grouped))
        coverage.count_unused()
        if missing := [name for name in SPLITS if name not in files]:
            raw.notes.append(f"no {' and no '.join(missing)} split (--labels has no file of it)")
        _apply_rotations(options.images_info, raw)
        return raw


def _apply_rotations(paths: Sequence[Path], raw: RawDataset) -> None:
    """Turn images as the image lists say, and note how many they do not name."""
    for path in paths:
        add_rotations(path, raw.splits)
    for split in raw.splits if paths else ():
        known = 0 if split.orientation is None else int(np.count_nonzero(split.orientation))
        if known < len(split):
            raw.notes.append(
                f"{split.name}: the image lists know the rotation of {known:,} of {len(split):,} images; "
                "--orientation decides for the others"
            )


def _refuse_shared(name: str, ids: npt.NDArray[np.uint64], other: RawSplit) -> None:
    """Raise `UserError` when a split has images of another one: results on such a test split would be invalid."""
    assert isinstance(other.ids, np.ndarray)
    small, large = sorted((ids, other.ids), key=len)
    position = np.minimum(np.searchsorted(large, small), len(large) - 1)
    shared = small[large[position] == small]
    if len(shared):
        raise UserError(
            f"{len(shared):,} images have labels in split {other.name} and in split {name} (the first is "
            f"{int(shared[0]):016x}); give each label file to one split (train=, val= or test= before its path)"
        )

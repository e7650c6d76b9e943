"""COCO (2014, 2017, or anything else in its instances format).

Protocol: only images with at least one annotation, image ids sorted as strings, class index
in the order of the categories in the JSON file; a fifth of the training images becomes validation, the official
validation file is the test set.

Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021; docs/sources.md#coco.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular
from spml_fast.core.text import has_surrogates, parse_json
from spml_fast.data.sparse_labels import NEGATIVE, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, add_val_fraction, register, require_folder
from spml_fast.prepare.raw import RawDataset, RawSplit

# No side of an image is longer.
MAX_PIXELS = 2**31


def read_instances(path: Path) -> dict[str, Any]:
    """An instances file, checked for the fields that are used. Raises `UserError` naming file and field."""
    try:
        with open_regular(path) as file:
            data = parse_json(file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    fields = {
        "images": ("id", "file_name"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    for section, keys in fields.items():
        entries = data.get(section) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path} has no list {section!r}; it is not a COCO instances file")
        for number, entry in enumerate(entries):
            for key in keys:
                if not isinstance(entry, dict) or key not in entry:
                    raise UserError(f"{path}: entry {number} of {section!r} has no {key!r}")
                wanted = str if key in ("file_name", "name") else (int, str)
                value = entry[key]
                if not isinstance(value, wanted) or (isinstance(value, str) and has_surrogates(value)):
                    raise UserError(f"{path}: entry {number} of {section!r} has {_shown(value)} as its {key!r}")
    return dict(data)


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + " ..."


def _side(entry: dict[str, Any], key: str, path: Path, number: int) -> int:
    """Width or height of an image's entry; 0 where it is absent."""
    value = entry.get(key) or 0
    if not isinstance(value, (int, float)) or not 0 <= value < MAX_PIXELS:
        raise UserError(f"{path}: entry {number} of 'images' has {_shown(value)} as its {key!r}")
    return int(value)


def _corners(entry: dict[str, Any], path: Path, number: int) -> tuple[float, float, float, float]:
    """Corners x0, y0, x1, y1 of an annotation's box; all 0 where it has none."""
    box = entry.get("bbox") or (0, 0, 0, 0)
    # Neither inf nor a number of 400 digits is a pixel.
    fine = isinstance(box, (list, tuple)) and len(box) == 4
    if not fine or not all(isinstance(v, (int, float)) and -MAX_PIXELS < v < MAX_PIXELS for v in box):
        raise UserError(f"{path}: annotation {number} has {_shown(box)} as its 'bbox', not [x, y, width, height]")
    x, y, width, height = box
    return x, y, x + width, y + height


def read_split(
    data: dict[str, Any],
    path: Path,
    name: str,
    class_id: dict[int, int],
    prefix: str,
    all_images: bool = False,
    num_classes: int | None = None,
) -> RawSplit:
    """One instances file as a split.

    Args:
        data: as `read_instances` gives it.
        path: the file, for messages.
        name: of the split.
        class_id: category id -> class index.
        prefix: put before every file name.
        all_images: keep images without an annotation, and the order of the file; else the papers' protocol.
        num_classes: of the data set; None where the file has all of them.

    Raises:
        UserError: naming the entry that is wrong.
    """
    images: dict[Any, dict[str, Any]] = {}
    sizes: dict[Any, tuple[int, int]] = {}
    for number, image in enumerate(data["images"]):
        sizes[image["id"]] = _side(image, "width", path, number), _side(image, "height", path, number)
        if image["id"] in images:
            raise UserError(f"{path}: image id {image['id']} is listed twice in 'images'")
        images[image["id"]] = image
    objects: dict[Any, list[list[float]]] = {}
    for number, entry in enumerate(data["annotations"]):
        if entry["image_id"] not in images:
            raise UserError(
                f"{path}: annotation {number} is of image {entry['image_id']}, which 'images' does not list"
            )
        if entry["category_id"] not in class_id:
            raise UserError(
                f"{path}: annotation {number} has category {entry['category_id']}, which the training file lacks"
            )
        box = [class_id[entry["category_id"]], *_corners(entry, path, number)]
        objects.setdefault(entry["image_id"], []).append(box)
    ids = list(images) if all_images else sorted(objects, key=str)
    rows = [objects.get(i, []) for i in ids]
    positives = [{int(b[0]) for b in row} for row in rows]
    known = SparseLabels.from_positives(positives, num_classes or len(class_id), NEGATIVE)
    boxes = [[b for b in row if b[3] > b[1] and b[4] > b[2]] for row in rows]
    indptr = np.concatenate([[0], np.cumsum([len(b) for b in boxes])]).astype(np.int64)
    return RawSplit(
        name,
        known,
        paths=[prefix + images[i]["file_name"] for i in ids],
        width=np.array([sizes[i][0] for i in ids]),
        height=np.array([sizes[i][1] for i in ids]),
        boxes=(indptr, np.array([b for row in boxes for b in row], np.float64).reshape(-1, 5)),
    )


@register("coco")
class Coco(Dataset):
    """COCO 2014 or 2017, or your own boxes in COCO's instances format."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Annotation files and image folders."""
        parser.add_argument("--annotations", required=True, type=Path, help="instances JSON of the training images")
        parser.add_argument("--images", required=True, type=Path, help="folder of the training images")
        parser.add_argument("--test-annotations", type=Path, help="instances JSON of the test images")
        parser.add_argument("--test-images", type=Path, help="folder of the test images (default: that of --images)")
        add_val_fraction(parser)

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The instances files."""
        if options.test_images is not None and options.test_annotations is None:
            raise UserError("--test-images needs --test-annotations")
        folders = [options.images] + ([options.test_images] if options.test_images else [])
        for folder in folders:
            require_folder(folder)
        data = read_instances(options.annotations)
        class_id = {category["id"]: number for number, category in enumerate(data["categories"])}
        if len(class_id) != len(data["categories"]):
            raise UserError(f"{options.annotations}: two categories have the same id")
        # One root for both folders, so that the Manifest can move with them.
        root = Path(os.path.commonpath([f.resolve() for f in folders]))

        def prefix(folder: Path) -> str:
            inside = os.path.relpath(folder.resolve(), root)
            return "" if inside == "." else inside + "/"

        splits = [read_split(data, options.annotations, "train", class_id, prefix(options.images))]
        notes = [self._left_out(data, splits[0])]
        if options.test_annotations is not None:
            test = read_instances(options.test_annotations)
            names = {c["id"]: c["name"] for c in data["categories"]}
            for category in test["categories"]:
                if names.get(category["id"]) != category["name"]:
                    raise UserError(
                        f"{options.test_annotations}: category {category['id']} ({category['name']}) is "
                        f"{names.get(category['id'], 'absent')} in {options.annotations}"
                    )
            folder = options.test_images or options.images
            splits.append(read_split(test, options.test_annotations, "test", class_id, prefix(folder)))
            notes.append(self._left_out(test, splits[1]))
        else:
            notes.append("no test split (give --test-annotations)")
        carve = ("train", "val") if options.val_fraction == "published" else None
        classes = [str(c["name"]) for c in data["categories"]]
        return RawDataset("coco", classes, root, splits, carve, [n for n in notes if n])

    @staticmethod
    def _left_out(data: dict[str, Any], split: RawSplit) -> str:
        number = len(data["images"]) - len(split)
        return (
            f"{split.name}: {number:,} images without any annotation are not used, as in the papers" if number else ""
        )

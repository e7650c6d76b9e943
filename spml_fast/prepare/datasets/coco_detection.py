"""Detection and segmentation sets in COCO's instances format as image labels: a class is there where an object is.

Unlike `coco`, which follows the papers, images without an object are kept (all classes are absent), splits are those
that you give, and every known label is observed. Boxes are kept for the analysis of class activation maps.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, ClassVar

from spml_fast.core.errors import UserError
from spml_fast.prepare.datasets.base import Dataset, register, require_folder
from spml_fast.prepare.datasets.coco import read_instances, read_split
from spml_fast.prepare.datasets.csv_table import folder_name
from spml_fast.prepare.image_table import class_list
from spml_fast.prepare.raw import Orientation, RawDataset, RawSplit

SPLITS = ("train", "val", "test")


def category_ids(data: dict[str, Any], path: Path, classes: dict[str, int]) -> dict[int, int]:
    """Category id -> class index, by the categories' names. Raises `UserError` for a name that training lacks."""
    out: dict[int, int] = {}
    for category in data["categories"]:
        name = category["name"].strip()
        if name not in classes:
            raise UserError(f"{path}: category {category['id']} ({name}) is not in the training file")
        if category["id"] in out:
            raise UserError(f"{path}: two categories have the id {category['id']}")
        out[category["id"]] = classes[name]
    return out


@register("coco-detection")
class CocoDetection(Dataset):
    """Detection sets in COCO's format (instances JSON) as image labels, one file for each split."""

    default_observe: ClassVar[str] = "all"
    default_orientation: ClassVar[Orientation] = "exif"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Annotation files and image folders."""
        parser.add_argument("--train", required=True, type=Path, help="instances JSON of the training images")
        parser.add_argument("--val", type=Path, help="of the validation images (default: a fifth of the training ones)")
        parser.add_argument("--test", type=Path, help="of the test images")
        parser.add_argument("--images", type=Path, help="folder of the images (default: that of each JSON file)")
        for split in SPLITS[1:]:
            parser.add_argument(f"--{split}-images", type=Path, help=f"folder of the {split} images, if it is another")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The annotation files."""
        files = {name: getattr(options, name) for name in SPLITS if getattr(options, name) is not None}
        for name in SPLITS[1:]:
            if name not in files and getattr(options, f"{name}_images") is not None:
                raise UserError(f"--{name}-images needs --{name}")
        folders = {
            name: require_folder((name != "train" and getattr(options, f"{name}_images")) or options.images or p.parent)
            for name, p in files.items()
        }
        # One root for all folders, so that the Manifest can move with them.
        root = Path(os.path.commonpath([folder.resolve() for folder in folders.values()]))
        classes: dict[str, int] = {}
        splits: list[RawSplit] = []
        notes: list[str] = []
        split_of: dict[str, str] = {}
        for name, path in files.items():
            data = read_instances(path)
            if name == "train":
                names = class_list([category["name"] for category in data["categories"]], f"{path}: 'categories'")
                classes = {class_name: i for i, class_name in enumerate(names)}
            inside = os.path.relpath(folders[name].resolve(), root)
            prefix = "" if inside == "." else inside + "/"
            ids = category_ids(data, path, classes)
            split = read_split(data, path, name, ids, prefix, all_images=True, num_classes=len(classes))
            self._note(data, name, notes)
            for image in split.paths or ():
                if not image or "\0" in image:
                    raise UserError(f"{path}: image {image!r} is no file name")
                if image in split_of:
                    raise UserError(f"{path}: image {image} is listed twice; the first time in split {split_of[image]}")
                split_of[image] = name
            splits.append(split)
        if "val" not in files:
            notes.append("no file of validation images: a fifth of the training images is for validation")
        if "test" not in files:
            notes.append("no file of test images: there is no test split")
        carve = None if "val" in files else ("train", "val")
        return RawDataset(
            folder_name(options.images or options.train.parent), list(classes), root, splits, carve, notes
        )

    @staticmethod
    def _note(data: dict[str, Any], name: str, notes: list[str]) -> None:
        used = {annotation["image_id"] for annotation in data["annotations"]}
        empty = sum(image["id"] not in used for image in data["images"])
        if empty:
            notes.append(f"{name}: {empty:,} images without any object are kept; all classes are absent from them")
        crowds = sum(annotation.get("iscrowd") == 1 for annotation in data["annotations"])
        if crowds:
            notes.append(f"{name}: {crowds:,} crowds (iscrowd) count as objects of their class")

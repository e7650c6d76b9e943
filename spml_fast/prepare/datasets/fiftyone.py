"""Exports of FiftyOne as image labels: FiftyOneDataset, and the simple JSON of classification and detection sets.

FiftyOneDataset (`metadata.json` and `samples.json`, or a folder `samples` with a file for each):

    {"samples": [{"filepath": "data/a.jpg", "tags": ["train"],
                  "ground_truth": {"_cls": "Classifications", "classifications": [{"label": "cat"}, ...]}}, ...]}

FiftyOneImageClassificationDataset and FiftyOneImageDetectionDataset (`labels.json` beside `data/`, or `data.json`):

    {"classes": ["cat", "dog"], "labels": {"a": [0, 1], "b": [{"label": 1, "bounding_box": [0.1, 0.2, 0.3, 0.4]}]}}

Samples whose field is empty are unlabelled: all of their classes are unknown.

Source: the exporters of fiftyone 1.22 (utils/data/exporters.py, core/odm/database.py), read for the format alone.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from spml_fast.core.errors import UserError
from spml_fast.core.text import has_surrogates
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE
from spml_fast.prepare.datasets.base import Dataset, register
from spml_fast.prepare.datasets.csv_table import folder_name, read_classes
from spml_fast.prepare.image_table import (
    SPLIT_NAMES,
    ImageRow,
    ImageTable,
    NamedBox,
    add_unlisted,
    class_list,
    class_text,
    code_of,
    fraction_box,
    read_json,
    relative_to,
    shown_value,
)
from spml_fast.prepare.raw import Orientation, RawDataset

# Field's class -> the list in it; a Classification is one by itself.
LISTS = {
    "Classifications": "classifications",
    "Detections": "detections",
    "Polylines": "polylines",
    "Classification": "",
    "Detection": "",
}


def labels_in(value: Any, where: str) -> tuple[list[str], list[NamedBox]]:
    """Names and boxes of a sample's field. Raises `UserError`."""
    kind = value.get("_cls") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in LISTS:
        raise UserError(f"{where} is no labels of images ({', '.join(LISTS)}), but {shown_value(value)}")
    entries = value.get(LISTS[kind]) if LISTS[kind] else [value]
    if not isinstance(entries, list):
        raise UserError(f"{where} has no list {LISTS[kind]!r}")
    names, boxes = [], list[NamedBox]()
    for number, entry in enumerate(entries):
        place = f"{where}, label {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{place} is no object of JSON, but {shown_value(entry)}")
        # A label without a name is an object that nobody has classified.
        if entry.get("label") is None:
            continue
        names.append(class_text(entry["label"], place))
        if entry.get("bounding_box") is not None:
            boxes.append((names[-1], *fraction_box(entry["bounding_box"], place)))
    return names, boxes


def choose_field(samples: list[tuple[str, dict[str, Any]]], wanted: str | None) -> str:
    """The field of the labels: as wanted, else the only one that holds some. Raises `UserError`."""
    found: Counter[str] = Counter()
    for _, sample in samples:
        found.update(k for k, v in sample.items() if isinstance(v, dict) and v.get("_cls") in LISTS)
    if wanted is not None:
        if wanted not in found:
            raise UserError(f"no sample has labels in field {wanted!r}; there are {', '.join(found) or 'none'}")
        return wanted
    for name in ["ground_truth"] if "ground_truth" in found else list(found) if len(found) == 1 else []:
        return name
    if not found:
        raise UserError(f"{samples[0][0]}: no field of any sample holds labels ({', '.join(LISTS)})")
    raise UserError(f"samples have labels in {', '.join(found)}; choose one with --field")


def split_of_tags(tags: Any, where: str) -> str | None:
    """The split that a sample's tags name; None without one. Raises `UserError` where they name several."""
    words = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    named = {SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES}
    if len(named) > 1:
        raise UserError(f"{where} has tags of several splits: {', '.join(sorted(named))}")
    return next(iter(named), None)


def read_samples(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every sample of a FiftyOneDataset, with its place for messages. Raises `UserError`."""
    path = folder / "samples.json"
    if path.is_file():
        data = read_json(path, "samples")
        listed = data.get("samples") if isinstance(data, dict) else None
        if not isinstance(listed, list):
            raise UserError(f"{path} has no list 'samples'; it is not FiftyOne's")
        samples = [(f"{path}, sample {number}", sample) for number, sample in enumerate(listed)]
    else:
        files = sorted((folder / "samples").glob("*.json"))
        samples = [(str(file), read_json(file, "sample")) for file in files]
    if not samples:
        raise UserError(f"{folder} has no samples")
    for where, sample in samples:
        if not isinstance(sample, dict) or not isinstance(sample.get("filepath"), str) or not sample["filepath"]:
            raise UserError(f"{where} has no 'filepath'")
        if "\0" in sample["filepath"] or has_surrogates(sample["filepath"]):
            raise UserError(f"{where}: {shown_value(sample['filepath'])} is no file name")
    return samples


def data_files(folder: Path) -> dict[str, list[str]]:
    """Image's key in labels.json -> its paths: of data.json, else of all files below data/ that are called so.

    Keys have no ending, so two files may answer to one.
    """
    if (folder / "data.json").is_file():
        listed = read_json(folder / "data.json", "paths of the images")
        if not isinstance(listed, dict) or not all(isinstance(p, str) and "\0" not in p for p in listed.values()):
            raise UserError(f"{folder / 'data.json'} is no list of paths by their keys")
        return {key: [relative_to(folder, folder / path)] for key, path in listed.items()}
    found: dict[str, list[str]] = {}
    for top, _, names in os.walk(folder / "data"):
        for name in sorted(names):
            path = os.path.join(top, name)
            key = os.path.splitext(os.path.relpath(path, folder / "data"))[0]
            found.setdefault(key, []).append(relative_to(folder, Path(path)))
    return found


def _simple_labels(value: Any, classes: list[str] | None, where: str) -> tuple[list[str], list[NamedBox]]:
    """Names and boxes of an entry of labels.json. Raises `UserError`."""
    names, boxes = [], list[NamedBox]()
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        label = entry.get("label") if isinstance(entry, dict) else entry
        place = f"{where}, label {number}"
        if isinstance(label, int) and not isinstance(label, bool) and classes is not None:
            if not 0 <= label < len(classes):
                raise UserError(f"{place}: {shown_value(label)} is no class number from 0 to {len(classes) - 1}")
            label = classes[label]
        names.append(class_text(label, place))
        if isinstance(entry, dict) and entry.get("bounding_box") is not None:
            boxes.append((names[-1], *fraction_box(entry["bounding_box"], place)))
    return names, boxes


@register("fiftyone")
class FiftyOne(Dataset):
    """FiftyOne: an exported FiftyOneDataset, or labels.json of its classification and detection sets."""

    default_observe: ClassVar[str] = "all"
    default_orientation: ClassVar[Orientation] = "exif"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The export and its field."""
        parser.add_argument("--data", required=True, type=Path, help="folder of the export")
        parser.add_argument("--field", help="field of the labels (default: ground_truth, or the only one)")
        parser.add_argument("--classes", type=Path, help="class names, one per line; fixes their order, refuses others")
        add_unlisted(parser, "negative")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The export; tags called train, val or test (or the like) are splits."""
        folder: Path = options.data
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; --data must name that of the export")
        table = ImageTable()
        classes = read_classes(options.classes) if options.classes else None
        if (folder / "samples.json").is_file() or (folder / "samples").is_dir():
            self._samples(folder, options.field, table)
        elif (folder / "labels.json").is_file():
            named = self._simple(folder, table)
            classes = named if classes is None else classes
        else:
            raise UserError(
                f"{folder} is no export of FiftyOne that is read: it has neither samples.json nor labels.json"
            )
        unlabelled = sum(not row.labelled for rows in table.splits.values() for row in rows)
        if unlabelled:
            table.notes.append(f"{unlabelled:,} images have no labels: all of their classes are unknown")
        return table.raw(folder_name(folder), folder, code_of(options.unlisted, NEGATIVE), classes)

    @staticmethod
    def _samples(folder: Path, field: str | None, table: ImageTable) -> None:
        samples = read_samples(folder)
        field = choose_field(samples, field)
        splits = [split_of_tags(sample.get("tags"), where) for where, sample in samples]
        untagged = splits.count(None)
        if 0 < untagged < len(splits):
            table.notes.append(f"{untagged:,} images have no tag of a split; they are for training")
        for (where, sample), split in zip(samples, splits, strict=True):
            value = sample.get(field)
            names, boxes = labels_in(value, f"{where}, field {field!r}") if value is not None else ([], [])
            path = relative_to(folder, folder / sample["filepath"])
            row = ImageRow(path, where, dict.fromkeys(names, POSITIVE), value is not None, boxes)
            table.add(split or "train", row)

    @staticmethod
    def _simple(folder: Path, table: ImageTable) -> list[str] | None:
        """labels.json; returns its classes, None where it has none."""
        path = folder / "labels.json"
        data = read_json(path, "labels")
        labels = data.get("labels") if isinstance(data, dict) else None
        if not isinstance(labels, dict):
            raise UserError(f"{path} has no dictionary 'labels'; it is not FiftyOne's")
        named = data.get("classes")
        classes = class_list(named, f"{path}: 'classes'") if named is not None else None
        files = data_files(folder)
        for key, value in sorted(labels.items()):
            where = f"{path}, image {key[:80]!r}"
            if not os.path.isabs(key) and key not in files:
                raise UserError(f"{where} is neither below {folder / 'data'} nor in data.json")
            paths = files.get(key, [key])
            if len(paths) > 1:
                raise UserError(f"{where} may be {paths[0]} or {paths[1]}; rename or remove one of the files")
            names, boxes = _simple_labels(value, classes, where) if value is not None else ([], [])
            row = ImageRow(paths[0], where, dict.fromkeys(names, POSITIVE), value is not None, boxes)
            table.add("train", row)
        return classes

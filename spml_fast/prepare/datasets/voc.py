"""PASCAL VOC in its official layout (VOC 2012: 5,717 training and 5,823 validation images, 20 classes).

    ROOT/ImageSets/Main/CLASS_train.txt, CLASS_val.txt   image name and flag: 1 positive, 0 difficult, -1 absent
    ROOT/Annotations/NAME.xml                            boxes and size, where present
    ROOT/JPEGImages/NAME.jpg

Protocol: difficult counts as negative, classes in alphabetical order, image names sorted; a
fifth of the official training set becomes validation, the official validation set is the test set.

Source: Cole et al., "Multi-Label Learning from Single Positive Labels", CVPR 2021; docs/sources.md#voc.
"""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.io import open_regular, read_text
from spml_fast.core.progress import watched
from spml_fast.data.sparse_labels import NEGATIVE, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, add_val_fraction, register
from spml_fast.prepare.raw import RawDataset, RawSplit

NUM_CLASSES = 20
# No side of an image is longer.
MAX_PIXELS = 2**31 - 1
Boxes = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]


def read_flags(path: Path) -> dict[str, int]:
    """Image name -> flag (1, 0 or -1) of one class file. Raises `UserError` naming file and line."""
    flags: dict[str, int] = {}
    lines = read_text(path, "utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in ("1", "0", "-1"):
            raise UserError(f"{path}, line {number}: expected an image name and 1, 0 or -1, not {line.strip()!r}")
        if fields[0] in flags:
            raise UserError(f"{path}, line {number}: image {fields[0]} is listed twice")
        flags[fields[0]] = int(fields[1])
    return flags


def _pixels(text: str) -> float:
    """A coordinate or size. ValueError if it is no number, or none that an image can have."""
    value = float(text)
    if not -MAX_PIXELS <= value <= MAX_PIXELS:
        raise ValueError(f"{text.strip()[:60]!r} pixels")
    return value


def read_annotation(path: Path, class_id: dict[str, int]) -> tuple[tuple[int, int], list[list[float]]]:
    """Size (width, height; 0 where absent) and boxes [class, x0, y0, x1, y1] in pixels of one XML file."""
    try:
        with open_regular(path) as file:
            root = ElementTree.parse(file).getroot()
        size = root.find("size")
        width = int(_pixels(size.findtext("width", "0"))) if size is not None else 0
        height = int(_pixels(size.findtext("height", "0"))) if size is not None else 0
        boxes = []
        for element in root.iter("object"):
            name, box = element.findtext("name", ""), element.find("bndbox")
            if name not in class_id or box is None:
                continue
            x0, y0, x1, y1 = (_pixels(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            # VOC counts pixels from 1 and includes the last one.
            boxes.append([class_id[name], x0 - 1, y0 - 1, x1, y1])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ElementTree.ParseError, LookupError) as error:
        raise UserError(f"{path} is not valid XML: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} holds a box or size that is no number: {error}") from error
    if min(width, height) < 0:
        raise UserError(f"{path} has the size {width} x {height}")
    return (width, height), boxes


@register("voc")
class Voc(Dataset):
    """PASCAL VOC 2012 (or another year) in its official folders."""

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Where the data set is, and how validation images are chosen."""
        parser.add_argument("--root", required=True, type=Path, help="folder with ImageSets, Annotations, JPEGImages")
        add_val_fraction(parser)

    def read(self, options: argparse.Namespace) -> RawDataset:
        """Class files and annotations of train and val."""
        main = options.root / "ImageSets" / "Main"
        if not main.is_dir():
            raise UserError(
                f"{main} does not exist; --root must be the folder that holds ImageSets (VOCdevkit/VOC2012)"
            )
        classes = sorted(p.name.removesuffix("_train.txt") for p in main.glob("*_train.txt"))
        if not classes:
            raise UserError(f"{main} has no CLASS_train.txt files")
        notes = ["difficult objects count as absent, as in the papers"]
        if len(classes) != NUM_CLASSES:
            notes.append(f"{len(classes)} classes found, not the official {NUM_CLASSES}")
        splits = []
        for official, name in (("train", "train"), ("val", "test")):
            splits.append(self._read_split(options.root, classes, official, name, notes))
        carve = ("train", "val") if options.val_fraction == "published" else None
        return RawDataset("voc", classes, options.root / "JPEGImages", splits, carve, notes)

    def _read_split(self, root: Path, classes: list[str], official: str, name: str, notes: list[str]) -> RawSplit:
        """The official split `official` (train or val) as the split `name`."""
        main = root / "ImageSets" / "Main"
        flags = [read_flags(main / f"{class_name}_{official}.txt") for class_name in classes]
        names = sorted(flags[0])
        for class_name, listed in zip(classes, flags, strict=True):
            if listed.keys() != flags[0].keys():
                other = sorted(listed.keys() ^ flags[0].keys())[0]
                raise UserError(
                    f"{main / f'{class_name}_{official}.txt'} does not list the same images as "
                    f"{classes[0]}_{official}.txt (first difference: {other})"
                )
        positives = [[c for c, listed in enumerate(flags) if listed[n] == 1] for n in names]
        known = SparseLabels.from_positives(positives, len(classes), NEGATIVE)
        split = RawSplit(name, known, paths=[f"{n}.jpg" for n in names])
        missing = [n for n in names if not (root / "Annotations" / f"{n}.xml").is_file()]
        if missing:
            notes.append(
                f"{name}: no boxes, since {len(missing)} annotation files are missing (first: {missing[0]}.xml)"
            )
            return split
        class_id = {c: i for i, c in enumerate(classes)}
        with watched(names, f"reading annotations of {name}", "files") as listed_names:
            read = [read_annotation(root / "Annotations" / f"{n}.xml", class_id) for n in listed_names]
        split.width = np.array([size[0] for size, _ in read])
        split.height = np.array([size[1] for size, _ in read])
        indptr = np.concatenate([[0], np.cumsum([len(boxes) for _, boxes in read])]).astype(np.int64)
        split.boxes = indptr, np.array([box for _, boxes in read for box in boxes], np.float64).reshape(-1, 5)
        return split

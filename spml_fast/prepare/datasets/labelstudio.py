"""Label Studio's JSON export as image labels.

    [{"id": 1, "data": {"image": "/data/upload/3/0a1b2c3d-cat.jpg"},
      "annotations": [{"was_cancelled": false, "result": [
          {"type": "choices", "value": {"choices": ["cat", "sofa"]}},
          {"type": "rectanglelabels", "value": {"x": 10, "y": 20, "width": 30, "height": 40,
                                                "rectanglelabels": ["cat"]}}]}]}, ...]

Choices (single or multiple), rectangles, polygons, ellipses, brushes, key points and taxonomies are labels of the
image; rectangles are boxes too. Uploaded images (`/data/upload/`) and those of local storage (`/data/local-files/?d=`)
are looked for below `--images`; addresses of other machines are refused, since nothing is downloaded. A task without an
annotation (or with skipped ones only) is unlabelled. Of several annotations of a task the newest counts.

Source: the converter of label-studio-sdk 2.1 (converter/converter.py, label_studio_tools/core/utils/io.py), read for
the format alone.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from spml_fast.core.errors import UserError
from spml_fast.core.text import has_surrogates
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE
from spml_fast.prepare.datasets.base import Dataset, register, require_folder
from spml_fast.prepare.datasets.csv_table import folder_name, read_classes
from spml_fast.prepare.image_table import (
    SPLIT_NAMES,
    ImageRow,
    ImageTable,
    NamedBox,
    add_unlisted,
    class_text,
    code_of,
    fraction_box,
    read_json,
    relative_to,
    shown_value,
)
from spml_fast.prepare.raw import Orientation, RawDataset

# Kinds of results that name classes; the names are in the value under the same word.
KINDS = (
    *("choices", "rectanglelabels", "polygonlabels", "ellipselabels", "brushlabels", "keypointlabels", "taxonomy"),
    *("labels", "vectorlabels", "bitmasklabels"),
)


def image_path(text: Any, root: Path, where: str) -> str:
    """Where a task's image is, relative to `root`. Raises `UserError` where that is another machine."""
    if not isinstance(text, str) or not text.strip() or "\0" in text or has_surrogates(text):
        raise UserError(f"{where}: {shown_value(text)} is no image")
    text = text.strip()
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise UserError(f"{where}: {text[:80]!r} is no path ({error})") from error
    # Text such as C:\\a.jpg has a scheme of one letter.
    if len(parts.scheme) > 1 and parts.scheme != "file":
        raise UserError(f"{where}: the image is at {text[:80]}; download the images, and export tasks with local files")
    if "/data/local-files" in parts.path:
        named = parse_qs(parts.query).get("d")
        if not named:
            raise UserError(f"{where}: {text[:80]!r} names no file (?d=)")
        return relative_to(root, _inside(root, named[-1]))
    if parts.path.startswith("/data/upload/"):
        # Folders of the server's storage: the project's number may be missing where files were copied.
        inside = unquote(parts.path.removeprefix("/data/upload/"))
        short = re.sub(r"^\d+/", "", inside)
        return relative_to(root, next((p for p in (root / inside, root / short) if os.path.isfile(p)), root / short))
    path = unquote(parts.path) if parts.scheme == "file" else text
    return relative_to(root, root / path)


def _inside(root: Path, name: str) -> Path:
    """A file of local storage: below the folder, whose own name the path may repeat."""
    name = os.path.normpath(name).lstrip("/")
    first, _, rest = name.partition("/")
    repeated = first == root.resolve().name and rest and not os.path.isfile(root / name)
    return root / (rest if repeated else name)


def names_of(result: Any, where: str, only: str | None) -> tuple[list[str], list[NamedBox]]:
    """Class names and boxes of one result of an annotation. Raises `UserError`."""
    if not isinstance(result, dict):
        raise UserError(f"{where} is no object of JSON, but {shown_value(result)}")
    kind, value = result.get("type"), result.get("value")
    if kind not in KINDS or (only is not None and result.get("from_name") != only):
        return [], []
    listed = value.get(kind) if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(listed, list):
        raise UserError(f"{where} has no list {kind!r} in its value")
    # A taxonomy's choice is a path from its root; the last one is the class.
    texts = [entry[-1] if kind == "taxonomy" and isinstance(entry, list) and entry else entry for entry in listed]
    names = [class_text(text, where) for text in texts]
    if kind != "rectanglelabels" or value.get("rotation"):
        return names, []
    box = fraction_box([value.get(key) for key in ("x", "y", "width", "height")], where, 100)
    return names, [(name, *box) for name in names]


def newest(annotations: Any, where: str) -> dict[str, Any] | None:
    """The newest annotation that was not skipped; None without one. Raises `UserError`."""
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise UserError(f"{where} has no list 'annotations'; export the project as JSON, not as JSON-MIN or CSV")
    kept = [a for a in annotations if not a.get("was_cancelled") and not a.get("skipped")]
    return max(kept, key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""), default=None)


@register("labelstudio")
class LabelStudio(Dataset):
    """Label Studio: a project exported as JSON; choices and boxes are image labels."""

    default_observe: ClassVar[str] = "all"
    default_orientation: ClassVar[Orientation] = "exif"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The export, and what of it is used."""
        parser.add_argument("--export", required=True, type=Path, help="the project, exported as JSON")
        parser.add_argument("--images", required=True, type=Path, help="folder that the images are in")
        parser.add_argument("--image-key", help="key of the image in a task's data (default: image, or the only one)")
        parser.add_argument("--from-name", help="only labels of this control of the labelling configuration")
        parser.add_argument("--split-key", help="key in a task's data that names its split")
        parser.add_argument("--classes", type=Path, help="class names, one per line; fixes their order, refuses others")
        add_unlisted(parser, "negative")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The export."""
        require_folder(options.images)
        tasks = read_json(options.export, "tasks")
        if not isinstance(tasks, list) or not tasks:
            raise UserError(f"{options.export} is no list of tasks; export the project as JSON")
        table = ImageTable()
        several = unlabelled = 0
        for number, task in enumerate(tasks):
            where = f"{options.export}, task {number}"
            if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
                raise UserError(f"{where} has no 'data'; export the project as JSON, not as JSON-MIN or CSV")
            annotations = task.get("annotations", task.get("completions"))
            annotation = newest(annotations, where)
            several += isinstance(annotations, list) and len(annotations) > 1
            unlabelled += annotation is None
            path = image_path(_image_of(task["data"], options.image_key, where), options.images, where)
            codes, boxes = _labels(annotation, where, options.from_name)
            split = _split(task["data"], options.split_key, where)
            table.add(split, ImageRow(path, where, codes, annotation is not None, boxes))
        if several:
            table.notes.append(f"{several:,} tasks have several annotations; the newest counts")
        if unlabelled:
            table.notes.append(f"{unlabelled:,} tasks have no annotation: all of their classes are unknown")
        classes = read_classes(options.classes) if options.classes else None
        return table.raw(folder_name(options.images), options.images, code_of(options.unlisted, NEGATIVE), classes)


def _image_of(data: dict[str, Any], key: str | None, where: str) -> Any:
    if key is None:
        key = "image" if "image" in data or len(data) != 1 else next(iter(data))
    if key not in data:
        raise UserError(f"{where}: its data have no {key!r}, only {', '.join(data)[:200]}; name it with --image-key")
    return data[key]


def _labels(annotation: dict[str, Any] | None, where: str, only: str | None) -> tuple[dict[str, int], list[NamedBox]]:
    """Codes and boxes of an annotation. Raises `UserError`."""
    codes: dict[str, int] = {}
    boxes: list[NamedBox] = []
    results = [] if annotation is None else annotation.get("result")
    if not isinstance(results, list):
        raise UserError(f"{where}: its annotation has no list 'result'")
    for number, result in enumerate(results):
        names, found = names_of(result, f"{where}, result {number}", only)
        codes.update(dict.fromkeys(names, POSITIVE))
        boxes += found
    return codes, boxes


def _split(data: dict[str, Any], key: str | None, where: str) -> str:
    if key is None:
        return "train"
    name = data.get(key)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w\-]*", name):
        raise UserError(f"{where}: {shown_value(name)} in {key!r} cannot be the name of a split")
    return SPLIT_NAMES.get(name.lower(), name)

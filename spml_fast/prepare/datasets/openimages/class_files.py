"""Class lists and class names of OpenImages."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spml_fast.core.errors import UserError
from spml_fast.core.io import read_lines, read_text
from spml_fast.prepare.datasets.openimages.ids import CLASS_ID


def read_classes(path: Path) -> list[str]:
    """Class ids, one per line; their order is that of the class numbers. Raises `UserError` naming file and line."""
    line_of: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), 1):
        name = line.strip()
        if not name or (number == 1 and name == "LabelName"):
            continue
        if not CLASS_ID.fullmatch(name.encode()):
            raise UserError(f"{path}, line {number}: {name[:60]!r} is not a class id such as /m/01g317")
        if name in line_of:
            raise UserError(f"{path}, line {number}: class {name} is already in line {line_of[name]}")
        line_of[name] = number
    if not line_of:
        raise UserError(f"{path} names no class")
    return list(line_of)


def read_descriptions(path: Path) -> dict[str, str]:
    """Class id -> display name, with or without the header `LabelName,DisplayName`. `UserError` names the line."""
    names: dict[str, str] = {}
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 0
    try:
        for fields in reader:
            line, before = reader.line_num, line
            if not fields or (before == 0 and fields == ["LabelName", "DisplayName"]):
                continue
            if len(fields) != 2 or not CLASS_ID.fullmatch(fields[0].encode()):
                raise UserError(f"{path}, line {before + 1}: expected a class id and its name, not {fields!r}")
            # classes.txt has one line per class.
            name = " ".join(fields[1].split())
            if names.setdefault(fields[0], name) != name:
                raise UserError(f"{path}, line {before + 1}: class {fields[0]} has the name {names[fields[0]]!r} above")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    return names


def class_names(ids: Sequence[str], descriptions: dict[str, str]) -> list[str]:
    """Display names in class order; the id where there is none, and behind names that several classes share."""
    names = [descriptions.get(class_id) or class_id for class_id in ids]
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({i})" if name in shared else name for name, i in zip(names, ids, strict=True)]

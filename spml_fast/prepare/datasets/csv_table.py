"""Any data set as a table: one row per image, class names separated by semicolons.

    path,positives,negatives,unknowns,split
    photos/001.jpg,cat;sofa,dog,,train

or as JSON lines or Parquet, where a field may be a list of names:

    {"path": "photos/001.jpg", "positives": ["cat", "sofa"], "negatives": ["dog"], "split": "train"}

Only `path` and `positives` must be there. What a row does not list is, unless --unlisted says otherwise: unknown
where the table has a `negatives` column; negative where it has none (with an `unknowns` column those are the
exceptions). The columns decide, never the values. Without a `split` column a fifth of the rows becomes validation,
drawn as in the papers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from spml_fast.core.errors import UserError
from spml_fast.core.io import read_lines
from spml_fast.core.progress import watched
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, register, require_folder
from spml_fast.prepare.raw import Orientation, RawDataset, RawSplit
from spml_fast.prepare.table_files import JSON_LINES, Value, read_rows, row_word

COLUMNS = {"path", "positives", "negatives", "unknowns", "split"}
LABEL_COLUMNS = {"positives": POSITIVE, "negatives": NEGATIVE, "unknowns": UNKNOWN}
GENERIC_FOLDERS = {"images", "image", "img", "photos", "pictures", "jpegimages"}
CODE_NAMES = {POSITIVE: "positive", NEGATIVE: "negative", UNKNOWN: "unknown"}


@dataclass
class Row:
    """One image: the line that named it first, its split, and the code of each class name listed."""

    line: int
    split: str
    codes: dict[str, int] = field(default_factory=dict)
    # The line that each code came from, for messages.
    lines: dict[str, int] = field(default_factory=dict)


@dataclass
class Table:
    """A parsed table.

    Attributes:
        rows: path -> row, in order of first appearance.
        columns: of the header.
        merged: lines that named an image again.
        conflicts: contradicting labels that were taken as positive.
    """

    rows: dict[str, Row]
    columns: list[str]
    merged: int = 0
    conflicts: int = 0


def read_table(path: Path, conflicts: str) -> Table:
    """Parse a table.

    Args:
        path: CSV, JSON lines (.jsonl) or Parquet.
        conflicts: `error`, or `positive` to let positive win where rows contradict each other.

    Raises:
        UserError: naming file, line and column or class.
    """
    columns, rows = read_rows(path)
    table = Table({}, columns)
    if path.suffix.lower() not in JSON_LINES:
        _check_columns(columns, f"{path}, line 1" if row_word(path) == "line" else str(path))
    with watched(rows, f"reading {path.name}", "rows") as read:
        for line, fields in read:
            if not COLUMNS.issuperset(fields):
                _refuse_unknown(fields, f"{path}, line {line}")
            _add(table, fields, line, path, conflicts)
    if table.rows:
        _check_columns(columns, str(path))
    return table


def _check_columns(columns: list[str], where: str) -> None:
    separator = next((mark for mark in (";", "\t") if len(columns) == 1 and mark in columns[0]), None)
    if separator is not None:
        name = "tabs" if separator == "\t" else "semicolons"
        raise UserError(f"{where}: fields are separated by {name}; save the table with commas between them")
    for required in ("path", "positives"):
        if required not in columns:
            raise UserError(f"{where}: there is no column {required!r}, only {', '.join(columns) or 'an empty line'}")
    _refuse_unknown(columns, where)
    if len(set(columns)) != len(columns):
        raise UserError(f"{where}: a column is listed twice")


def _refuse_unknown(columns: Iterable[str], where: str) -> None:
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise UserError(f"{where}: column {unknown[0]!r} is not one of path, positives, negatives, unknowns, split")


def _add(table: Table, fields: Mapping[str, Value], line: int, path: Path, conflicts: str) -> None:
    """Merge one line into the table."""
    where = f"{path}, {row_word(path)} {line}"
    image, split = (str(fields.get(name, "")).strip() for name in ("path", "split"))
    if not image or "\0" in image:
        raise UserError(f"{where}: the path is {'empty' if not image else 'no file name'}")
    if "split" in fields and (not split or "/" in split or split.startswith(".") or not split.isprintable()):
        raise UserError(f"{where}: {split!r} cannot be the name of a split")
    row = table.rows.get(image)
    if row is None:
        row = table.rows[image] = Row(line, split)
    else:
        table.merged += 1
        if row.split != split:
            raise UserError(f"{where}: image {image} is in split {split!r} and in line {row.line} in {row.split!r}")
    for column, code in LABEL_COLUMNS.items():
        for name in class_names(fields.get(column, ""), where):
            earlier = row.codes.get(name)
            if earlier is not None and earlier != code:
                if conflicts == "error":
                    raise UserError(
                        f"{where}: class {name!r} of image {image} is {CODE_NAMES[code]}, and "
                        f"{CODE_NAMES[earlier]} in line {row.lines[name]}; fix it or pass --conflicts positive"
                    )
                table.conflicts += 1
                code_kept = max(earlier, code)
            else:
                code_kept = code
            row.codes[name] = code_kept
            row.lines.setdefault(name, line)


def class_names(value: Value, where: str) -> list[str]:
    """Names in a field: a list, or a text with semicolons. Raises `UserError` where a list's name has one."""
    if isinstance(value, list):
        wrong = next((name for name in value if ";" in name), None)
        if wrong is not None:
            raise UserError(f"{where}: class {wrong!r} has a semicolon, which separates classes in tables")
    else:
        value = value.split(";")
    return [name for name in (part.strip() for part in value) if name]


def read_classes(path: Path) -> list[str]:
    """Class names, one per line. Raises `UserError` naming file and line."""
    lines = read_lines(path)
    # A dict keeps the order and finds repetitions at once.
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if ";" in name:
            raise UserError(f"{path}, line {number}: class {name!r} has a semicolon, which separates classes in tables")
        if name in names:
            raise UserError(f"{path}, line {number}: class {name!r} is already in line {names[name]}")
        names[name] = number
    if not names:
        raise UserError(f"{path} names no class")
    return list(names)


def folder_name(images: Path) -> str:
    """What a data set is called: all tables are called labels, but the images' folder, or the one above, has a name."""
    folder = images.resolve()
    return folder.parent.name if folder.name.lower() in GENERIC_FOLDERS and folder.parent.name else folder.name


def unlisted_code(columns: list[str], choice: str | None) -> int:
    """Code of classes that a row does not list: as chosen, else by the columns that the table has."""
    if choice is not None:
        return UNKNOWN if choice == "unknown" else NEGATIVE
    return UNKNOWN if "negatives" in columns else NEGATIVE


@register("csv")
class Csv(Dataset):
    """Your own images: a table (CSV, JSONL, Parquet) with one image per row and its known classes."""

    default_observe: ClassVar[str] = "all"
    default_orientation: ClassVar[Orientation] = "exif"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The table and how it is read."""
        parser.add_argument(
            "--table",
            required=True,
            type=Path,
            help="CSV, .jsonl or .parquet: path, positives[, negatives, unknowns, split]",
        )
        parser.add_argument("--images", required=True, type=Path, help="folder that the paths are relative to")
        parser.add_argument(
            "--classes", type=Path, help="class names, one per line; fixes their order and refuses others"
        )
        choices = ["unknown", "negative"]
        parser.add_argument(
            "--unlisted",
            choices=choices,
            help="what a class is that a row does not list (default: unknown when there is a negatives column, else "
            "negative)",
        )
        parser.add_argument("--unlisted-eval", choices=choices, help="the same for splits other than train")
        parser.add_argument(
            "--conflicts",
            choices=["error", "positive"],
            default="error",
            help="when rows contradict each other: stop (default), or let positive win",
        )

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The table."""
        require_folder(options.images)
        table = read_table(options.table, options.conflicts)
        if not table.rows:
            raise UserError(f"{options.table} has no rows")
        if not any(POSITIVE in row.codes.values() for row in table.rows.values()):
            raise UserError(f"{options.table}: no row has a positive class; there is nothing to learn from")
        named = {name: row.lines[name] for row in reversed(table.rows.values()) for name in row.codes}
        classes = read_classes(options.classes) if options.classes else sorted(named)
        class_id = {name: i for i, name in enumerate(classes)}
        for name, line in named.items():
            if name not in class_id:
                raise UserError(
                    f"{options.table}, {row_word(options.table)} {line}: class {name!r} is not in {options.classes}"
                )
        notes = []
        if table.merged:
            notes.append(f"{table.merged} rows named an image again and were merged with its first row")
        if table.conflicts:
            notes.append(f"{table.conflicts} contradicting labels were taken as positive (--conflicts positive)")
        odd = next((name for name in classes if "," in name), None)
        if odd is not None and not options.classes and all(len(row.codes) < 2 for row in table.rows.values()):
            notes.append(f"{odd!r} is one class: classes are separated by semicolons, not by commas")
        has_splits = "split" in table.columns
        by_split: dict[str, list[str]] = {}
        for image, row in table.rows.items():
            by_split.setdefault(row.split if has_splits else "train", []).append(image)
        if "train" not in by_split:
            raise UserError(f"{options.table}: no row has split train (only {', '.join(sorted(by_split))})")
        train_code = unlisted_code(table.columns, options.unlisted)
        eval_code = train_code if options.unlisted_eval is None else unlisted_code(table.columns, options.unlisted_eval)
        meaning = {UNKNOWN: "unknown", NEGATIVE: "absent (negative)"}
        notes.append(f"classes that a row does not list were read as {meaning[train_code]}")
        if eval_code != train_code:
            notes.append(f"in splits other than train as {meaning[eval_code]}")
        order = sorted(by_split, key=lambda s: (s != "train", s))
        splits = [
            self._split(name, by_split[name], table, class_id, train_code if name == "train" else eval_code)
            for name in order
        ]
        if not has_splits:
            notes.append("no split column: a fifth of the images is for validation, and there is no test split")
        elif missing := [name for name in ("val", "test") if name not in by_split]:
            notes.append(f"the split column names no {' and no '.join(missing)} split")
        carve = None if has_splits else ("train", "val")
        return RawDataset(
            folder_name(options.images) or options.table.stem, classes, options.images, splits, carve, notes
        )

    @staticmethod
    def _split(name: str, images: list[str], table: Table, class_id: dict[str, int], default: int) -> RawSplit:
        rows, ids, codes = [], [], []
        for number, image in enumerate(images):
            for class_name, code in table.rows[image].codes.items():
                if code != default:
                    rows.append(number)
                    ids.append(class_id[class_name])
                    codes.append(code)
        known = SparseLabels.from_entries(rows, ids, codes, len(images), len(class_id), default)
        return RawSplit(name, known, paths=images)

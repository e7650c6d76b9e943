"""OpenImages V6 as the authors of CSL packed it: images with a short side of 256, and one table.

    filepath,split_name,label,label_neg
    train/000002b66c9c498e.jpg,train,"['/m/01g317', ...]","['/m/04yx4']"

Both label columns are lists in Python's notation; what neither names is unknown. Other columns are ignored.

Source: docs/sources.md#openimages.
"""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import ClassVar

from spml_fast.core.errors import UserError
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels
from spml_fast.prepare.datasets.base import Dataset, register, require_folder
from spml_fast.prepare.datasets.csv_table import folder_name, read_classes
from spml_fast.prepare.datasets.openimages.class_files import class_names, read_descriptions
from spml_fast.prepare.raw import RawDataset, RawSplit
from spml_fast.prepare.table_files import read_rows

COLUMNS = ("filepath", "split_name", "label", "label_neg")
SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}


def read_names(text: str, where: str) -> list[str]:
    """A list of texts in Python's notation; nothing else is evaluated. Raises `UserError`."""
    if not text.strip():
        return []
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where} is not a list such as ['/m/01g317'], but {text[:60]!r}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where} is not a list of texts, but {text[:60]!r}")
    return names


class _Split:
    """Rows of one split as they are read; classes are numbered as they come."""

    def __init__(self) -> None:
        self.paths: dict[str, int] = {}
        self.rows: list[int] = []
        self.classes: list[int] = []
        self.codes: list[int] = []


@register("csl")
class Csl(Dataset):
    """OpenImages V6 as CSL packs it: data.csv with lists of positive and of negative classes."""

    default_observe: ClassVar[str] = "all"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The table, the images, and what the classes are called."""
        parser.add_argument("--table", required=True, type=Path, help="data.csv")
        parser.add_argument("--images", required=True, type=Path, help="folder that the file paths are relative to")
        parser.add_argument("--classes", type=Path, help="class names of the table, one per line; fixes their order")
        parser.add_argument("--descriptions", type=Path, help="OpenImages' names of its class ids")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The table."""
        require_folder(options.images)
        number: dict[str, int] = {}
        splits: dict[str, _Split] = {}
        columns, rows = read_rows(options.table)
        if missing := [name for name in COLUMNS if name not in columns]:
            raise UserError(f"{options.table}, line 1: there is no column {missing[0]!r}, only {', '.join(columns)}")
        for line, fields in rows:
            where = f"{options.table}, line {line}"
            path, official, *lists = (str(fields[name]).strip() for name in COLUMNS)
            if not path or official not in SPLITS:
                raise UserError(f"{where}: expected a path and train, val or test, not {path!r} and {official!r}")
            split = splits.setdefault(SPLITS[official], _Split())
            row = len(split.paths)
            if split.paths.setdefault(path, row) != row:
                raise UserError(f"{where}: image {path} is listed twice")
            codes: dict[str, int] = {}
            for text, column, code in zip(lists, COLUMNS[2:], (POSITIVE, NEGATIVE), strict=True):
                for name in read_names(text, f"{where}: {column}"):
                    if codes.setdefault(name, code) != code:
                        raise UserError(f"{where}: class {name!r} is both positive and negative")
            split.rows += [row] * len(codes)
            split.classes += [number.setdefault(name, len(number)) for name in codes]
            split.codes += codes.values()
        if "train" not in splits:
            raise UserError(f"{options.table} has no row of split train")
        return self._raw(options, number, splits)

    @staticmethod
    def _raw(options: argparse.Namespace, number: dict[str, int], splits: dict[str, _Split]) -> RawDataset:
        order = read_classes(options.classes) if options.classes else sorted(number)
        place = {name: i for i, name in enumerate(order)}
        if missing := [name for name in number if name not in place]:
            raise UserError(f"{options.table}: class {missing[0]!r} is not in {options.classes}")
        final = [place[name] for name in number]
        raw_splits = []
        for name in sorted(splits, key=["train", "val", "test"].index):
            split = splits[name]
            ids = [final[c] for c in split.classes]
            known = SparseLabels.from_entries(split.rows, ids, split.codes, len(split.paths), len(order), UNKNOWN)
            raw_splits.append(RawSplit(name, known, paths=list(split.paths)))
        names = class_names(order, read_descriptions(options.descriptions)) if options.descriptions else order
        notes = [f"the table has no {name} split" for name in ("val", "test") if name not in splits]
        return RawDataset(folder_name(options.images), names, options.images, raw_splits, None, notes)

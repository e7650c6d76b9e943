"""Data sets of Hugging Face: image folders with metadata files, Parquet files, and what `save_to_disk` writes.

    {"file_name": "train/0001.jpg", "labels": ["cat", "sofa"]}      names,
    {"file_name": "train/0002.jpg", "labels": [0, 3]}               class numbers,
    {"file_name": "train/0003.jpg", "labels": [1, 0, 0, 1]}         or multi-hot: 1, 0, and -1 or null for unknown

Names of numbered classes come from the data set's ClassLabel, or from `--classes`. Images inside of tables are written
into the Manifest as they are, never encoded again. An image whose labels are null (or -1, as in hidden test labels) has
unknown labels only.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN
from spml_fast.prepare.datasets.base import Dataset, register
from spml_fast.prepare.datasets.csv_table import folder_name, read_classes
from spml_fast.prepare.hub_files import (
    HubFiles,
    feature_at,
    find_tables,
    kind_name,
    shown_columns,
    split_of,
    value_at,
)
from spml_fast.prepare.image_table import ImageRow, ImageTable, add_unlisted, class_list, code_of, relative_to
from spml_fast.prepare.label_fields import KINDS, Field, codes_of, hot_code, kind_of, parse_field, unnamed_classes
from spml_fast.prepare.raw import Orientation, RawDataset
from spml_fast.prepare.table_files import read_rows, row_word, table_schema

LABEL_COLUMNS = ("labels", "label", "classes", "class", "tags", "positives", "categories")
IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo")


@dataclass
class HubImage:
    """One row.

    Attributes:
        table: the file.
        number: of the line or row.
        split: name.
        path: relative to the root; empty where the image is in the table.
        stored: the path that a table's image was stored with.
        labels: fields of the label columns.
        negatives: field of the negatives' column, if there is one.
    """

    table: Path
    number: int
    split: str
    path: str
    stored: str
    labels: list[Field]
    negatives: Field | None

    @property
    def where(self) -> str:
        """File and line or row, for messages."""
        return f"{self.table}, {row_word(self.table)} {self.number}"


@dataclass
class Embedded:
    """Images that are inside of tables: which file each row's image becomes.

    Attributes:
        column: of the images.
        names: table -> row number -> path below the images' folder.
    """

    column: str
    names: dict[Path, dict[int, str]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write every image as it is stored; where a row has only the path of an existing file, a link to it.

        An image that is nowhere is left out later, as a missing file.
        """
        total = sum(len(rows) for rows in self.names.values())
        with show_progress(total, "writing images", True) as advance:
            for table, names in self.names.items():
                for number, row in read_rows(table, _as_it_is, [self.column])[1]:
                    if number in names:
                        self._write_one(row.get(self.column), folder / names[number], table)
                        advance(1)

    @staticmethod
    def _write_one(value: Any, path: Path, table: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = image_bytes(value)
        if data is not None:
            path.write_bytes(data)
            return
        source = value.get("path") if isinstance(value, dict) else value
        if isinstance(source, str) and source and os.path.isfile(table.parent / source):
            path.symlink_to(os.path.abspath(table.parent / source))


@dataclass
class Labels:
    """What the labels of all images are.

    Attributes:
        rows: of the images, in order, without their paths.
        classes: names by number; None for those that are used.
        unlisted: code of the others.
        meaning: how they were read, for the summary; None for what `unlisted` means.
    """

    rows: list[ImageRow]
    classes: list[str] | None
    unlisted: int
    meaning: str | None = None


def image_bytes(value: Any) -> bytes | None:
    """The encoded image in a field: bytes, or {bytes, path}; None where there are none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    return bytes(data) if isinstance(data, (bytes, bytearray)) else None


def _as_it_is(value: Any, where: str) -> Any:
    return value


class _Reader:
    """Rows of a data set.

    Args:
        files: its tables.
        options: of the command line.
    """

    def __init__(self, files: HubFiles, options: argparse.Namespace) -> None:
        self.files, self.options = files, options
        self.image: str | None = None
        self.label_columns: list[str] = list(options.labels or [])

    def rows(self) -> Iterator[HubImage]:
        """All images, split by split. Raises `UserError`."""
        for split, tables in self.files.splits.items():
            for table in tables:
                yield from self._embedded(split, table) if self.files.embedded else self._listed(table)

    def _columns(self, table: Path, columns: list[str]) -> list[str]:
        """The label columns, chosen by the first table. Raises `UserError`."""
        if not self.label_columns:
            labelled = [c for c in columns if kind_name(feature_at(self.files.features, c)) == "ClassLabel"]
            usual = [c for c in LABEL_COLUMNS if c in columns]
            if not labelled and not usual:
                raise UserError(
                    f"{table}: no column is called {', '.join(LABEL_COLUMNS[:3])}; name those of the labels with "
                    f"--labels; there are {shown_columns(columns)}"
                )
            self.label_columns = [next((c for c in usual if c in labelled), (labelled or usual)[0])]
        if len(set(self.label_columns)) != len(self.label_columns):
            raise UserError("--labels names a column twice")
        return [*self.label_columns, *([self.options.negatives] if self.options.negatives else [])]

    def _check(self, table: Path, columns: list[str], wanted: list[str]) -> None:
        for name in wanted:
            if name not in columns and name.split(".")[0] not in columns:
                raise UserError(f"{table}: there is no column {name!r}; there are {shown_columns(columns)}")

    def _image(
        self, place: tuple[Path, int], row: dict[str, Any], split: str, path: str = "", stored: str = ""
    ) -> HubImage:
        where = f"{place[0]}, {row_word(place[0])} {place[1]}"
        labels = [parse_field(value_at(row, c), f"{where}: {c!r}") for c in self.label_columns]
        column = self.options.negatives
        negatives = parse_field(value_at(row, column), f"{where}: {column!r}") if column else None
        return HubImage(*place, split, path, stored, labels, negatives)

    def _listed(self, table: Path) -> Iterator[HubImage]:
        """Rows of a metadata file; the images' folders tell the split."""
        _, rows = read_rows(table, _as_it_is)
        wanted: list[str] | None = None
        for number, row in rows:
            where = f"{table}, {row_word(table)} {number}"
            if wanted is None or not row.keys() >= {"file_name"}:
                # Columns of JSON lines are known from the rows alone.
                self._check(table, list(row), ["file_name"])
            if wanted is None:
                wanted = self._columns(table, list(row))
                self._check(table, list(row), wanted)
            name = row["file_name"]
            if not isinstance(name, str) or not name.strip() or "\0" in name:
                raise UserError(f"{where}: 'file_name' is no file name, but {str(name)[:60]!r}")
            path = relative_to(self.files.root, table.parent / name.strip())
            split = "train" if os.path.isabs(path) else split_of(Path(path).parent.parts) or "train"
            yield self._image((table, number), row, split, path)

    def _embedded(self, split: str, table: Path) -> Iterator[HubImage]:
        """Rows of a table with the images in it (or their paths, where the bytes are absent)."""
        schema = table_schema(table)
        columns = list(schema.names)
        wanted = self._columns(table, columns)
        if self.image is None:
            self.image = self._image_column(table, columns)
        self._check(table, columns, [self.image, *wanted])
        image = schema.field(self.image).type
        parts = [image.field(i).name for i in range(image.num_fields)] if str(image).startswith("struct") else []
        # Labels first; images are read when they are written, one batch after the other.
        only = [*(c.split(".")[0] for c in wanted), *([f"{self.image}.path"] if "path" in parts else [])]
        for number, row in read_rows(table, _as_it_is, only)[1]:
            stored = value_at(row, f"{self.image}.path") if "path" in parts else None
            yield self._image((table, number), row, split, stored=stored if isinstance(stored, str) else "")

    def _image_column(self, table: Path, columns: list[str]) -> str:
        if self.options.image:
            return str(self.options.image)
        typed = [c for c in columns if kind_name(feature_at(self.files.features, c)) == "Image"]
        found = typed or [c for c in IMAGE_COLUMNS if c in columns]
        if not found:
            raise UserError(
                f"{table}: no column holds images; name it with --image; there are {shown_columns(columns)}"
            )
        return found[0]


def file_names(images: list[HubImage]) -> dict[str, list[str]]:
    """Split -> where its images from tables go: their stored names where each is its own, else their numbers."""
    out: dict[str, list[str]] = {}
    for split in dict.fromkeys(image.split for image in images):
        stored = [os.path.basename(image.stored) for image in images if image.split == split]
        fine = all(0 < len(name.encode("utf-8", "replace")) < 200 and name.isprintable() for name in stored)
        fine = fine and len({name.lower() for name in stored}) == len(stored) and not {".", ".."} & set(stored)
        if not fine:
            endings = [os.path.splitext(name)[1][:8] if name.isprintable() else "" for name in stored]
            stored = [f"{i:08d}{ending}" for i, ending in enumerate(endings)]
        out[split] = [f"{split}/{name}" for name in stored]
    return out


@register("huggingface")
class HuggingFace(Dataset):
    """Hugging Face: an image folder with metadata, Parquet files, or what save_to_disk wrote."""

    default_observe: ClassVar[str] = "all"
    default_orientation: ClassVar[Orientation] = "exif"

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Where it is, and which columns are what."""
        parser.add_argument("--data", required=True, type=Path, help="folder of the data set, or one Parquet file")
        parser.add_argument(
            "--labels",
            nargs="+",
            metavar="COLUMN",
            help="column of the labels (default: the one with class names, or labels, label, classes ...); "
            "objects.category is a part of one; several columns are a class each, 1 or 0",
        )
        parser.add_argument("--negatives", metavar="COLUMN", help="column of the classes that are known to be absent")
        parser.add_argument(
            "--image", metavar="COLUMN", help="column of the images in tables (default: the one that is)"
        )
        parser.add_argument("--classes", type=Path, help="class names, one per line, in the order of their numbers")
        parser.add_argument(
            "--label-kind", choices=KINDS, help="what the labels are, where it cannot be told: names, numbers, multihot"
        )
        add_unlisted(parser, "unknown when --negatives names a column, else negative")

    def read(self, options: argparse.Namespace) -> RawDataset:
        """The tables."""
        files = find_tables(options.data)
        reader = _Reader(files, options)
        images = list(reader.rows())
        if not images:
            raise UserError(f"{options.data} has no rows")
        labels = self._labels(images, reader, options)
        table = ImageTable(notes=_notes(labels))
        root: Path | None = files.root
        embedded = None
        if files.embedded:
            assert reader.image is not None
            root, embedded = None, _place(images, files, reader.image)
        for image, row in zip(images, labels.rows, strict=True):
            table.add(image.split, replace(row, path=image.path))
        raw = table.raw(folder_name(files.root), root, labels.unlisted, labels.classes, labels.meaning)
        raw.make_images = None if embedded is None else embedded.write
        return raw

    def _labels(self, images: list[HubImage], reader: _Reader, options: argparse.Namespace) -> Labels:
        """Codes of all images."""
        columns = reader.label_columns
        if len(columns) > 1:
            if options.unlisted or options.negatives:
                raise UserError("every class has a column: leave out --unlisted and --negatives")
            return _of_columns(images, columns)
        fields = [image.labels[0] for image in images]
        more = [image.negatives for image in images if image.negatives is not None]
        feature = feature_at(reader.files.features, columns[0])
        numbered = kind_name(feature) == "ClassLabel"
        named = read_classes(options.classes) if options.classes else None
        if named is None and numbered and feature.get("names"):
            named = class_list(feature["names"], f"{options.data}: the names of column {columns[0]!r}")
        kind = options.label_kind or kind_of([*fields, *more], numbered)
        unnamed = kind != "names" and named is None
        if unnamed:
            named = unnamed_classes([*fields, *more], kind)
        if kind == "multihot" and (options.unlisted or options.negatives):
            raise UserError("labels are multi-hot, which lists every class: leave out --unlisted and --negatives")
        unlisted = code_of(options.unlisted, UNKNOWN if options.negatives else NEGATIVE)
        rows = []
        for image, labels in zip(images, fields, strict=True):
            codes = dict(codes_of(labels, kind, named))
            if image.negatives is not None:
                for name in codes_of(image.negatives, kind, named):
                    if codes.setdefault(name, NEGATIVE) == POSITIVE:
                        raise UserError(f"{image.where}: class {name!r} is both positive and negative")
            kept = _but(codes, unlisted) if kind == "multihot" else codes
            rows.append(ImageRow("", image.where, kept, labels.values is not None or bool(codes)))
        meaning = "labels are multi-hot: 1 present, 0 absent, -1 unknown" if kind == "multihot" else None
        if unnamed:
            meaning = "; ".join(
                filter(None, [meaning, "the classes have numbers and no names (--classes FILE names them)"])
            )
        return Labels(rows, named, unlisted, meaning)


def _of_columns(images: list[HubImage], columns: list[str]) -> Labels:
    """Labels where every class has a column of its own."""
    rows = []
    for image in images:
        codes = {c: _column_code(f) for c, f in zip(columns, image.labels, strict=True)}
        rows.append(ImageRow("", image.where, _but(codes, NEGATIVE)))
    return Labels(rows, columns, NEGATIVE, "a column is a class: 1 present, 0 absent, -1 or empty unknown")


def _column_code(labels: Field) -> int:
    """Code of one class's own column."""
    if not labels.values:
        return UNKNOWN
    if len(labels.values) != 1:
        raise UserError(f"{labels.where} is a list; several --labels columns are a class each, 1 or 0")
    return hot_code(labels.values[0], labels.where)


def _notes(labels: Labels) -> list[str]:
    unlabelled = sum(not row.labelled for row in labels.rows)
    return [f"{unlabelled:,} images have no labels (null or -1): all classes are unknown"] if unlabelled else []


def _place(images: list[HubImage], files: HubFiles, column: str) -> Embedded:
    """Give every image of a table its file."""
    embedded = Embedded(column, {table: {} for tables in files.splits.values() for table in tables})
    names = {split: iter(listed) for split, listed in file_names(images).items()}
    for image in images:
        image.path = next(names[image.split])
        embedded.names[image.table][image.number] = image.path
    return embedded


def _but(codes: dict[str, int], code: int) -> dict[str, int]:
    """Codes without those that are `code`, which every class that is not listed has."""
    return {name: value for name, value in codes.items() if value != code}

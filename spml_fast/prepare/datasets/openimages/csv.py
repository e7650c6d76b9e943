"""Reads the official files of OpenImages V3 to V7: label CSVs, image lists, class lists, folders of images.

    label CSV          ImageID,Source,LabelName,Confidence    0 absent, 1 there; machine labels 0.5 to 1.0
    image list         11 columns in V3, 12 with Rotation from V4 on
    trainable classes  one class id (/m/01g317) a line
    class names        LabelName,DisplayName; V6 and V7 have that header, V3 to V5 none

Label files have up to 165 million rows, so they go through pyarrow in blocks, and what is kept of a row is one packed
number: its class and what it says. Image ids are 16 hexadecimal digits and are kept as uint64. pyarrow does not say in
which line it stopped; `_explain` reads the block again, line by line, to find out.
Source: spec/protocol.md, section 5; rotation: OpenImages' own page of 2018-05-17, "Rotated images in Open Images".
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress

LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
HUMAN_SOURCES = frozenset({b"verification", b"crowdsource-verification"})
MACHINE_SOURCES = frozenset({b"machine"})
# What a row says, in the two low bits of its packed number. Of the rows of one (image, class) in ascending order the
# first and the last then tell all: absent first and there last is a contradiction, a machine's word alone is neither.
ABSENT, MACHINE, THERE = 0, 1, 2
_DROPPED = 255
# EXIF orientation that turns an image by so many degrees counterclockwise.
ROTATIONS = {"0": 1, "90": 8, "180": 3, "270": 6}
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".JPG", ".JPEG", ".png", ".webp"})
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")

_CLASS_ID = re.compile(rb"/[a-z]/[0-9a-z_-]+")
_IMAGE_ID = re.compile(r"[0-9a-fA-F]{16}")
# Bytes parsed by both cores at a time, and bytes of one task of theirs.
_BLOCK, _TASK = 32 << 20, 4 << 20
_DICTIONARY = pa.dictionary(pa.int32(), pa.binary())

_NIBBLE = np.full(256, 255, np.uint8)
for _digits, _first in ((b"0123456789", 0), (b"abcdef", 10), (b"ABCDEF", 10)):
    _NIBBLE[list(_digits)] = np.arange(_first, _first + len(_digits))


def ids_from_hex(text: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Image ids from their digits.

    Args:
        text: uint8 [N, 16], ASCII.

    Returns:
        ids uint64 [N], and whether all 16 are hexadecimal digits, bool [N].
    """
    nibbles = _NIBBLE[text]
    valid: npt.NDArray[np.bool_] = nibbles.max(1, initial=0) < 16
    values = np.ascontiguousarray(nibbles[:, 0::2] << 4 | nibbles[:, 1::2] & 15)
    return values.view(">u8")[:, 0].astype(np.uint64), valid


@dataclass
class LabelRows:
    """Rows of label files, those of the wanted classes, in the order of the files.

    Attributes:
        run_ids: uint64 [R], image of each run of consecutive rows of one image; runs of no kept row are there too.
        run_counts: int32 [R], rows of each run that were kept.
        packed: uint16 or uint32 [n], class << 2 | ABSENT, MACHINE or THERE of each kept row.
        rows: rows read.
        other_classes: rows dropped because their class is none of those wanted.
        below_threshold: machine rows of wanted classes dropped because their confidence is too low.
        sources: rows by source.
    """

    run_ids: npt.NDArray[np.uint64]
    run_counts: npt.NDArray[np.int32]
    packed: npt.NDArray[np.unsignedinteger]
    rows: int = 0
    other_classes: int = 0
    below_threshold: int = 0
    sources: Counter[str] = field(default_factory=Counter)


def read_labels(paths: Sequence[Path], classes: Sequence[str], threshold: float | None = None) -> LabelRows:
    """Read label files, plain or gzipped.

    Args:
        paths: files of human-verified labels, or of machine labels.
        classes: wanted class ids; their places are the class numbers.
        threshold: None for human-verified labels. For machine labels the confidence from which on a row is kept.

    Raises:
        UserError: naming file and line of what is wrong.
    """
    parser = _LabelParser(classes, threshold)
    for path in paths:
        columns = _check_header(path, LABEL_COLUMNS)
        with ThreadPoolExecutor(1) as reader, show_progress(_megabytes(path), f"MB of {path.name}", True) as advance:
            # One block is parsed while the one before is packed.
            waiting: Future[tuple[int, bytes, Any]] | None = None
            for offset, data in _blocks(path):
                coming = reader.submit(parser.parse, path, columns, offset, data)
                if waiting is not None:
                    parser.take(path, columns, *waiting.result())
                waiting = coming
                advance(len(data) >> 20)
            if waiting is not None:
                parser.take(path, columns, *waiting.result())
    rows = parser.rows()
    # pyarrow keeps what it has freed, which is needed for other things now.
    pa.default_memory_pool().release_unused()
    return rows


class _Column:
    """An array that grows in place: many small ones, joined at the end, would take twice the memory."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._values, self._size = np.empty(1 << 16, dtype), 0

    def append(self, values: npt.NDArray[Any]) -> None:
        """Put values behind those that are there."""
        end = self._size + len(values)
        if end > len(self._values):
            self._values.resize(max(end, len(self._values) * 5 // 4), refcheck=False)
        self._values[self._size : end] = values
        self._size = end

    def finish(self) -> npt.NDArray[Any]:
        """Everything; nothing may be appended any more."""
        self._values.resize(self._size, refcheck=False)
        return self._values


class _LabelParser:
    """Turns blocks of label files into packed rows, and keeps them."""

    def __init__(self, classes: Sequence[str], threshold: float | None) -> None:
        self.threshold = threshold
        self.allowed = HUMAN_SOURCES if threshold is None else MACHINE_SOURCES
        self.wanted = pa.array([c.encode() for c in classes], pa.binary())
        self.packed_type = np.dtype(np.uint16 if len(classes) <= 1 << 14 else np.uint32)
        self.ids, self.counts, self.packed = _Column(np.uint64), _Column(np.int32), _Column(self.packed_type)
        self.kinds: dict[bytes, int | None] = {}
        self.good_names: set[bytes] = set()
        self.read = self.other = self.below = 0
        self.sources: Counter[str] = Counter()

    def rows(self) -> LabelRows:
        """Everything that was taken; the parser keeps none of it."""
        ids, counts, packed = self.ids.finish(), self.counts.finish(), self.packed.finish()
        return LabelRows(ids, counts, packed, self.read, self.other, self.below, self.sources)

    def kind(self, confidence: bytes) -> int | None:
        """What a confidence says: ABSENT, MACHINE, THERE or `_DROPPED`; None when it is none."""
        if confidence not in self.kinds:
            self.kinds[confidence] = None
            try:
                value = float(confidence)
            except ValueError:
                return None
            if self.threshold is None:
                self.kinds[confidence] = {0.0: ABSENT, 1.0: THERE}.get(value)
            elif 0 <= value <= 1:
                self.kinds[confidence] = MACHINE if value >= self.threshold else _DROPPED
        return self.kinds[confidence]

    def parse(self, path: Path, columns: list[str], offset: int, data: bytes) -> tuple[int, bytes, Any]:
        """One block as a table of an id and three dictionaries, with where it began."""
        try:
            table = pa.csv.read_csv(
                pa.BufferReader(data),
                pa.csv.ReadOptions(column_names=columns, block_size=_TASK),
                # Looking for quotes takes time, and official label files have none.
                pa.csv.ParseOptions(quote_char='"' if b'"' in data else False),
                pa.csv.ConvertOptions(
                    column_types={
                        "ImageID": pa.binary(16),
                        "Source": _DICTIONARY,
                        "LabelName": _DICTIONARY,
                        "Confidence": _DICTIONARY,
                    },
                    null_values=[],
                    check_utf8=False,
                ),
            )
        except pa.ArrowInvalid as error:
            raise self._explain(path, columns, offset, data, str(error)) from error
        return offset, data, table

    def take(self, path: Path, columns: list[str], offset: int, data: bytes, table: Any) -> None:
        """Pack the rows of a block."""
        for batch in table.to_batches():
            if not self._take_batch(*(batch.column(name) for name in LABEL_COLUMNS)):
                raise self._explain(path, columns, offset, data, "a row cannot be understood")

    def _explain(self, path: Path, columns: list[str], offset: int, data: bytes, otherwise: str) -> UserError:
        """The error that names the first wrong line of a block."""
        text = io.StringIO(data.decode("utf-8", "backslashreplace"), newline="")
        return _explain(path, columns, _line_at(path, offset), text, self.what_is_wrong, otherwise)

    def _take_batch(self, image: Any, source: Any, name: Any, confidence: Any) -> bool:
        """Pack some rows. Returns False if one of them is wrong."""
        number = len(image)
        if not number:
            return True
        names = {i: text for i, text in enumerate(source.dictionary.to_pylist())}
        if not self.allowed.issuperset(names.values()):
            return False
        for place, count in enumerate(np.bincount(source.indices.to_numpy(), minlength=len(names)).tolist()):
            self.sources[names[place].decode()] += count
        kinds = [self.kind(text) for text in confidence.dictionary.to_pylist()]
        class_of = pa.compute.index_in(name.dictionary, self.wanted).fill_null(-1).to_numpy()
        unknown = [name.dictionary[i].as_py() for i in np.flatnonzero(class_of < 0).tolist()]
        strange = {text for text in unknown if text not in self.good_names and not _CLASS_ID.fullmatch(text)}
        if None in kinds or strange:
            return False
        self.good_names.update(unknown)

        digits = np.frombuffer(image.buffers()[1], np.uint64)[2 * image.offset : 2 * (image.offset + number)]
        digits = digits.reshape(number, 2)
        begins = np.empty(number, np.bool_)
        begins[0] = True
        np.any(digits[1:] != digits[:-1], axis=1, out=begins[1:])
        starts = np.flatnonzero(begins)
        ids, valid = ids_from_hex(digits[starts].view(np.uint8))
        if not valid.all():
            return False

        classes = class_of[name.indices.to_numpy()]
        kind = np.array(kinds, np.uint8)[confidence.indices.to_numpy()]
        named = classes >= 0
        keep = named & (kind != _DROPPED)
        kept = int(keep.sum())
        self.read += number
        self.other += number - int(named.sum())
        self.below += int(named.sum()) - kept
        packed = classes.astype(self.packed_type) << 2 | kind
        self.ids.append(ids)
        self.counts.append(np.add.reduceat(keep, starts, dtype=np.int32))
        self.packed.append(packed if kept == number else packed[keep])
        return True

    def what_is_wrong(self, fields: dict[str, str]) -> str:
        """What is wrong with a row; empty when nothing is."""
        if not _IMAGE_ID.fullmatch(fields["ImageID"]):
            return f"the ImageID {fields['ImageID']!r} is not 16 hexadecimal digits"
        source = fields["Source"]
        if source.encode() not in self.allowed:
            if source == "machine":
                return "the Source is machine; give files of machine labels with --machine-labels"
            if source.encode() in HUMAN_SOURCES:
                return f"the Source is {source}; give files of human-verified labels with --labels"
            names = " or ".join(sorted(text.decode() for text in self.allowed))
            return f"the Source {source!r} is not {names}"
        if not _CLASS_ID.fullmatch(fields["LabelName"].encode()):
            return f"the LabelName {fields['LabelName']!r} is not a class id such as /m/01g317"
        if self.kind(fields["Confidence"].encode()) is None:
            wanted = "0 or 1, as human-verified labels are" if self.threshold is None else "between 0 and 1"
            return f"the Confidence {fields['Confidence']!r} is not {wanted}"
        return ""


def _megabytes(path: Path) -> int:
    try:
        return max(1, path.stat().st_size >> 20)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _open(path: Path) -> Any:
    """A file as a stream of bytes, unpacked if its name ends with .gz. Raises `UserError`."""
    try:
        return pa.input_stream(str(path), compression="detect")
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words; pyarrow's own exceptions have no `strerror`."""
    return getattr(error, "strerror", None) or str(error).split(". Detail:")[-1].strip()


def _read(stream: Any, size: int, path: Path) -> bytes:
    try:
        return bytes(stream.read(size))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset of the first byte, whole lines) of a file without its header line, some tens of MB at a time."""
    with _open(path) as stream:
        rest = b""
        while b"\n" not in rest and (data := _read(stream, _BLOCK, path)):
            rest += data
        offset = rest.find(b"\n") + 1 or len(rest)
        rest = rest[offset:]
        while data := _read(stream, _BLOCK, path):
            end = data.rfind(b"\n") + 1
            if end:
                whole = rest + data[:end]
                yield offset, whole
                offset += len(whole)
                rest = data[end:]
            else:
                rest += data
        if rest:
            yield offset, rest


def _check_header(path: Path, wanted: Sequence[str], exact: bool = True) -> list[str]:
    """The column names of a CSV. Raises `UserError` when one is missing, or when there is another (`exact`)."""
    with _open(path) as stream:
        line = _read(stream, 1 << 16, path).split(b"\n")[0]
    try:
        text = line.decode("utf-8-sig").strip("\r")
        columns = [name.strip() for name in next(csv.reader([text]), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}, line 1: not the header of a CSV in UTF-8 ({error})") from error
    missing = [name for name in wanted if name not in columns]
    if missing or len(set(columns)) != len(columns) or (exact and len(columns) != len(wanted)):
        shown = text if len(text) <= 100 else text[:100] + " ..."
        raise UserError(f"{path}, line 1: the header must be {','.join(wanted)}, not {shown!r}")
    return columns


def _explain(
    path: Path,
    columns: list[str],
    line: int,
    text: TextIO,
    what_is_wrong: Callable[[dict[str, str]], str],
    otherwise: str,
) -> UserError:
    """The error that names the first wrong line of a text that begins with that line of the file."""
    first = 0
    try:
        reader = csv.reader(text, strict=True)
        for fields in reader:
            if fields:
                wrong = (
                    f"{len(fields)} fields instead of {len(columns)}"
                    if len(fields) != len(columns)
                    else what_is_wrong(dict(zip(columns, fields, strict=True)))
                )
                if wrong:
                    return UserError(f"{path}, line {line + first}: {wrong}")
            first = reader.line_num
    except csv.Error as error:
        return UserError(f"{path}, line {line + first}: {error}")
    return UserError(f"{path}, in the lines from {line} on: {otherwise}")


def _line_at(path: Path, offset: int) -> int:
    """Number of the line that begins at a byte, counted from 1."""
    line = 1
    with _open(path) as stream:
        while offset > 0 and (data := _read(stream, min(offset, _BLOCK), path)):
            line += data.count(b"\n")
            offset -= len(data)
    return line


def read_rotations(path: Path) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]]:
    """Ids, uint64 [n], and EXIF orientations, uint8 [n] with 0 for unknown, of an image list, some at a time.

    `Rotation` is how many degrees an image must be turned counterclockwise to be upright; empty and nan mean unknown.

    Raises:
        UserError: there is no column Rotation; or naming file and line.
    """
    columns = _check_header(path, ("ImageID", "Rotation"), exact=False)

    def orientation(text: str) -> int | None:
        if text.strip().lower() in ("", "nan"):
            return 0
        return ROTATIONS.get(text.strip().removesuffix(".0"))

    def what_is_wrong(fields: dict[str, str]) -> str:
        if not _IMAGE_ID.fullmatch(fields["ImageID"]):
            return f"the ImageID {fields['ImageID']!r} is not 16 hexadecimal digits"
        if orientation(fields["Rotation"]) is None:
            return f"the Rotation {fields['Rotation']!r} is not 0, 90, 180, 270, nan or empty"
        return ""

    def failed(otherwise: str) -> UserError:
        # Titles may hold line ends, so only reading from the beginning tells the line.
        with io.TextIOWrapper(_open(path), "utf-8", "backslashreplace", newline="") as text:
            text.readline()
            return _explain(path, columns, 2, text, what_is_wrong, otherwise)

    with _open(path) as stream:
        try:
            batches = pa.csv.open_csv(
                stream,
                pa.csv.ReadOptions(block_size=_TASK),
                pa.csv.ParseOptions(newlines_in_values=True),
                pa.csv.ConvertOptions(
                    column_types={"ImageID": pa.binary(16), "Rotation": _DICTIONARY},
                    include_columns=["ImageID", "Rotation"],
                    null_values=[],
                    check_utf8=False,
                ),
            )
            for batch in batches:
                image, rotation = batch.column(0), batch.column(1)
                if not len(image):
                    continue
                codes = [orientation(v.decode("utf-8", "replace")) for v in rotation.dictionary.to_pylist()]
                digits = np.frombuffer(image.buffers()[1], np.uint8)[
                    16 * image.offset : 16 * (image.offset + len(image))
                ]
                ids, valid = ids_from_hex(digits.reshape(-1, 16))
                if None in codes or not valid.all():
                    raise failed("a row cannot be understood")
                yield ids, np.array(codes, np.uint8)[rotation.indices.to_numpy()]
        except pa.ArrowInvalid as error:
            raise failed(str(error)) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_classes(path: Path) -> list[str]:
    """Class ids, one a line; their order is that of the class numbers. Raises `UserError` naming file and line."""
    places: dict[str, int] = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        name = line.strip()
        if not name or (number == 1 and name == "LabelName"):
            continue
        if not _CLASS_ID.fullmatch(name.encode()):
            raise UserError(f"{path}, line {number}: {name[:60]!r} is not a class id such as /m/01g317")
        if name in places:
            raise UserError(f"{path}, line {number}: class {name} is already in line {places[name]}")
        places[name] = number
    if not places:
        raise UserError(f"{path} names no class")
    return list(places)


def read_descriptions(path: Path) -> dict[str, str]:
    """Class id -> display name, with or without the header `LabelName,DisplayName`. `UserError` names the line."""
    names: dict[str, str] = {}
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    line = 0
    try:
        for fields in reader:
            line, before = reader.line_num, line
            if not fields or (before == 0 and fields == ["LabelName", "DisplayName"]):
                continue
            if len(fields) != 2 or not _CLASS_ID.fullmatch(fields[0].encode()):
                raise UserError(f"{path}, line {before + 1}: expected a class id and its name, not {fields!r}")
            # One line a class in classes.txt.
            name = " ".join(fields[1].split())
            if names.setdefault(fields[0], name) != name:
                raise UserError(f"{path}, line {before + 1}: class {fields[0]} has the name {names[fields[0]]!r} above")
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error
    return names


@dataclass
class Images:
    """The images below a folder.

    Attributes:
        ids: uint64 [N], ascending, each once.
        template_of: uint32 [N], number of each image's template.
        templates: paths from an id, relative to the folder.
        twice: files whose id lies in another folder too; the first folder in alphabetical order is taken.
        archives: names of tar and zip files, relative to the folder.
        others: number of other files.
    """

    ids: npt.NDArray[np.uint64]
    template_of: npt.NDArray[np.uint32]
    templates: list[str]
    twice: int
    archives: list[str]
    others: int


def find_images(root: Path) -> Images:
    """Every file below `root` that is named ID.jpg (or another suffix of images), in any folders.

    Names are never kept as text: nine million of them would take a gigabyte.

    Raises:
        UserError: a folder cannot be read, or its name is not UTF-8.
    """
    templates: list[str] = []
    ids = [np.empty(0, np.uint64)]
    numbers = [np.empty(0, np.uint32)]
    archives: list[str] = []
    others = 0
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        stems: dict[str, list[str]] = {}
        inner: list[str] = []
        try:
            status = os.stat(root / folder)
            # Links may lead in a circle.
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = entry.name
                    if len(name) > 16 and name[16:] in IMAGE_SUFFIXES:
                        stems.setdefault(name[16:], []).append(name[:16])
                    elif entry.is_dir():
                        inner.append(os.path.join(folder, name))
                    elif name.endswith(_ARCHIVES):
                        archives.append(os.path.join(folder, name))
                    else:
                        others += 1
        except OSError as error:
            raise UserError(f"image folder {root / folder} cannot be read: {error.strerror}") from error
        waiting += sorted(inner, reverse=True)
        for suffix in sorted(stems):
            # A name of other letters than ASCII gives question marks, and those are no digits.
            text = np.frombuffer("".join(stems[suffix]).encode("ascii", "replace"), np.uint8).reshape(-1, 16)
            found, valid = ids_from_hex(text)
            valid &= ~((text >= ord("A")) & (text <= ord("F"))).any(1)
            others += int((~valid).sum())
            if valid.any():
                ids.append(found[valid])
                numbers.append(np.full(len(ids[-1]), len(templates), np.uint32))
                templates.append(_template(root, folder, suffix))
    all_ids, template_of = np.concatenate(ids), np.concatenate(numbers)
    del ids, numbers
    order = np.argsort(all_ids, kind="stable")
    all_ids, template_of = all_ids[order], template_of[order]
    first = np.ones(len(all_ids), np.bool_)
    first[1:] = all_ids[1:] != all_ids[:-1]
    twice = len(all_ids) - int(first.sum())
    return Images(all_ids[first], template_of[first], templates, twice, sorted(archives), others)


def _template(root: Path, folder: str, suffix: str) -> str:
    try:
        folder.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the name of image folder {root / folder!r} is not UTF-8; rename it") from error
    return os.path.join(folder.replace("{", "{{").replace("}", "}}"), "{id:016x}" + suffix)

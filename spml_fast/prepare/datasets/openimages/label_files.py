"""Label files of OpenImages: the rows of the wanted classes, packed.

Label files have up to 165 million rows, so they go through pyarrow in blocks, one on each core, and what is kept of a
row is one packed number: its class and what it says. Names are looked up once for each block, not for each row.

Source: docs/sources.md#openimages.
"""

from __future__ import annotations

import io
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from spml_fast.core.errors import UserError
from spml_fast.core.progress import show_progress
from spml_fast.prepare.datasets.openimages.csv_blocks import (
    DICTIONARY,
    check_header,
    explain_line,
    line_at,
    megabytes,
    read_blocks,
)
from spml_fast.prepare.datasets.openimages.growing_array import GrowingArray
from spml_fast.prepare.datasets.openimages.ids import CLASS_ID, IMAGE_ID, ids_from_hex

LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
HUMAN_SOURCES = frozenset({b"verification", b"crowdsource-verification"})
MACHINE_SOURCES = frozenset({b"machine"})
# What a row says, in the two low bits of its packed number. Of the rows of one (image, class) in ascending order the
# first and the last then tell all: ABSENT first and PRESENT last is a contradiction, MACHINE alone is neither.
ABSENT, MACHINE, PRESENT = 0, 1, 2
_DROPPED = 255
# More threads than that wait for the one that reads.
_MAX_THREADS = 8


@dataclass
class LabelRows:
    """Rows of label files, those of the wanted classes, in the order of the files.

    Attributes:
        run_ids: uint64 [R], image of each run of consecutive rows of one image; runs without a kept row are listed too.
        run_counts: int32 [R], rows of each run that were kept.
        packed: uint16 or uint32 [n], class << 2 | ABSENT, MACHINE or PRESENT of each kept row.
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
        classes: wanted class ids; their positions are the class numbers.
        threshold: None for human-verified labels. For machine labels the confidence from which on a row is kept.

    Raises:
        UserError: naming file and line of what is wrong.
    """
    parser, kept = _LabelParser(classes, threshold), _KeptRows(len(classes))
    for path in paths:
        columns = check_header(path, LABEL_COLUMNS)
        with show_progress(megabytes(path), f"reading {path.name}", unit="MB") as advance:
            for block, packed in _packed_blocks(parser, path, columns):
                kept.append(packed)
                advance((block.offset + len(block.data) >> 20) - (block.offset >> 20))
    # pyarrow keeps what it has freed, which is needed for other things now.
    pa.default_memory_pool().release_unused()
    return kept.finish()


def _packed_blocks(parser: _LabelParser, path: Path, columns: list[str]) -> Iterator[tuple[_Block, list[_Packed]]]:
    """The blocks of a file, each with its packed rows, in the order of the file; a few are packed at a time."""
    threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    waiting: deque[tuple[_Block, Future[list[_Packed]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for offset, data in read_blocks(path):
            block = _Block(path, columns, offset, data)
            waiting.append((block, pool.submit(parser.pack, block)))
            if len(waiting) > threads:
                first, packed = waiting.popleft()
                yield first, packed.result()
        for first, packed in waiting:
            yield first, packed.result()


@dataclass(frozen=True)
class _Block:
    """Some lines of a label file.

    Attributes:
        path: the file.
        columns: its column names.
        offset: of the first byte.
        data: the lines.
    """

    path: Path
    columns: list[str]
    offset: int
    data: bytes


@dataclass(frozen=True)
class _Packed:
    """What is kept of some rows: the columns and counts of `LabelRows`."""

    run_ids: npt.NDArray[np.uint64]
    run_counts: npt.NDArray[np.int32]
    packed: npt.NDArray[np.unsignedinteger]
    rows: int
    other_classes: int
    below_threshold: int
    sources: Counter[str]


class _KeptRows:
    """Puts the rows of one block after the other."""

    def __init__(self, num_classes: int) -> None:
        self._ids, self._counts = GrowingArray(np.uint64), GrowingArray(np.int32)
        self._packed = GrowingArray(packed_type(num_classes))
        self._totals = np.zeros(3, np.int64)
        self._sources: Counter[str] = Counter()

    def append(self, block: Sequence[_Packed]) -> None:
        """Add the rows of a block."""
        for part in block:
            self._ids.append(part.run_ids)
            self._counts.append(part.run_counts)
            self._packed.append(part.packed)
            self._totals += (part.rows, part.other_classes, part.below_threshold)
            self._sources.update(part.sources)

    def finish(self) -> LabelRows:
        """All rows; nothing may be appended afterwards."""
        rows, other_classes, below = self._totals.tolist()
        ids, counts, packed = self._ids.finish(), self._counts.finish(), self._packed.finish()
        return LabelRows(ids, counts, packed, rows, other_classes, below, self._sources)


def packed_type(num_classes: int) -> np.dtype[np.unsignedinteger]:
    """Type of packed numbers: a class and two bits."""
    return np.dtype(np.uint16 if num_classes <= 1 << 14 else np.uint32)


class _LabelParser:
    """Turns blocks of label files into packed rows. What it has learnt of names and confidences may be used by several
    threads: nothing of it is ever changed or removed."""

    def __init__(self, classes: Sequence[str], threshold: float | None) -> None:
        self.threshold = threshold
        self.allowed = HUMAN_SOURCES if threshold is None else MACHINE_SOURCES
        self.wanted = pa.array([c.encode() for c in classes], pa.binary())
        self.packed_type = packed_type(len(classes))
        self.kinds: dict[bytes, int | None] = {}
        self.other_names: set[bytes] = set()

    def kind(self, confidence: bytes) -> int | None:
        """What a confidence says: ABSENT, MACHINE, PRESENT or `_DROPPED`; None when it is none."""
        if confidence not in self.kinds:
            self.kinds[confidence] = self._kind_of(confidence)
        return self.kinds[confidence]

    def _kind_of(self, confidence: bytes) -> int | None:
        try:
            value = float(confidence)
        except ValueError:
            return None
        if self.threshold is None:
            return {0.0: ABSENT, 1.0: PRESENT}.get(value)
        if not 0 <= value <= 1:
            return None
        return MACHINE if value >= self.threshold else _DROPPED

    def pack(self, block: _Block) -> list[_Packed]:
        """The rows of a block. Raises `UserError` naming the first wrong line."""
        try:
            table = pa.csv.read_csv(
                pa.BufferReader(block.data),
                # The other cores have blocks of their own.
                pa.csv.ReadOptions(column_names=block.columns, block_size=len(block.data) + 1, use_threads=False),
                # Looking for quotes takes time, and official label files have none.
                pa.csv.ParseOptions(quote_char='"' if b'"' in block.data else False),
                pa.csv.ConvertOptions(
                    column_types={
                        "ImageID": pa.binary(16),
                        "Source": DICTIONARY,
                        "LabelName": DICTIONARY,
                        "Confidence": DICTIONARY,
                    },
                    null_values=[],
                    check_utf8=False,
                ),
            )
        except pa.ArrowInvalid as error:
            raise self._wrong_line(block, str(error)) from error
        out = []
        for batch in table.to_batches():
            packed = self._pack_batch(*(batch.column(name) for name in LABEL_COLUMNS)) if len(batch) else None
            if packed is not None:
                out.append(packed)
            elif len(batch):
                raise self._wrong_line(block, "a row cannot be parsed")
        return out

    def _wrong_line(self, block: _Block, otherwise: str) -> UserError:
        """The error that names the first wrong line of a block."""
        text = io.StringIO(block.data.decode("utf-8", "backslashreplace"), newline="")
        line = line_at(block.path, block.offset)
        return explain_line(block.path, block.columns, line, text, self.find_fault, otherwise)

    def _pack_batch(self, image: Any, source: Any, name: Any, confidence: Any) -> _Packed | None:
        """Pack some rows, given as four columns, at least one. Returns None if one of them is wrong."""
        number = len(image)
        source_names = source.dictionary.to_pylist()
        if not self.allowed.issuperset(source_names):
            return None
        counts = np.bincount(source.indices.to_numpy(), minlength=len(source_names)).tolist()
        sources = Counter({text.decode(): n for text, n in zip(source_names, counts, strict=True)})
        kinds = [self.kind(text) for text in confidence.dictionary.to_pylist()]
        class_of = self._classes_of(name.dictionary)
        runs = _runs_of_images(image)
        if None in kinds or class_of is None or runs is None:
            return None
        run_ids, starts = runs
        classes = class_of[name.indices.to_numpy()]
        kind = np.array(kinds, np.uint8)[confidence.indices.to_numpy()]
        named = classes >= 0
        keep = named & (kind != _DROPPED)
        kept, wanted = int(np.count_nonzero(keep)), int(np.count_nonzero(named))
        packed = classes.astype(self.packed_type) << 2 | kind
        if kept < number:
            packed = packed[keep]
        run_counts = np.add.reduceat(keep, starts, dtype=np.int32)
        return _Packed(run_ids, run_counts, packed, number, number - wanted, wanted - kept, sources)

    def _classes_of(self, names: Any) -> npt.NDArray[np.int32] | None:
        """Class numbers of different names, int32, -1 for those that are not wanted; None if one is no class id."""
        classes = pa.compute.index_in(names, self.wanted).fill_null(-1).to_numpy()
        unknown = set(names.take(pa.array(np.flatnonzero(classes < 0))).to_pylist()) - self.other_names
        if not all(CLASS_ID.fullmatch(text) for text in unknown):
            return None
        self.other_names |= unknown
        return classes

    def find_fault(self, fields: dict[str, str]) -> str:
        """What is wrong with a row; empty when nothing is."""
        if not IMAGE_ID.fullmatch(fields["ImageID"]):
            return f"the ImageID {fields['ImageID']!r} is not 16 hexadecimal digits"
        source = fields["Source"]
        if source.encode() not in self.allowed:
            if source == "machine":
                return "the Source is machine; give files of machine labels with --machine-labels"
            if source.encode() in HUMAN_SOURCES:
                return f"the Source is {source}; give files of human-verified labels with --labels"
            if source == "human":
                return (
                    "the Source is human, as in V1 and V2, whose classes and splits are others; only V3 to V7 are read"
                )
            names = " or ".join(sorted(text.decode() for text in self.allowed))
            return f"the Source {source!r} is not {names}"
        if not CLASS_ID.fullmatch(fields["LabelName"].encode()):
            return f"the LabelName {fields['LabelName']!r} is not a class id such as /m/01g317"
        if self.kind(fields["Confidence"].encode()) is None:
            wanted = "0 or 1, as human-verified labels are" if self.threshold is None else "between 0 and 1"
            return f"the Confidence {fields['Confidence']!r} is not {wanted}"
        return ""


def _runs_of_images(image: Any) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None:
    """Id, uint64, and first row, int64, of every run of rows of one image; None if an id is not 16 digits."""
    digits = np.frombuffer(image.buffers()[1], np.uint64)[2 * image.offset : 2 * (image.offset + len(image))]
    first, second = digits[0::2], digits[1::2]
    begins = np.ones(len(image), np.bool_)
    np.logical_or(first[1:] != first[:-1], second[1:] != second[:-1], out=begins[1:])
    starts = np.flatnonzero(begins)
    ids, valid = ids_from_hex(digits.reshape(-1, 2)[starts].view(np.uint8))
    return (ids, starts) if valid.all() else None

"""Label files of OpenImages: the rows of the wanted classes, packed.

Label files have up to 165 million rows, so they go through pyarrow in blocks, and what is kept of a row is one packed
number: its class and what it says.

Source: docs/sources.md#openimages.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
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
    TASK,
    check_header,
    explain_line,
    line_at,
    megabytes,
    read_blocks,
)
from spml_fast.prepare.datasets.openimages.ids import CLASS_ID, IMAGE_ID, ids_from_hex

LABEL_COLUMNS = ("ImageID", "Source", "LabelName", "Confidence")
HUMAN_SOURCES = frozenset({b"verification", b"crowdsource-verification"})
MACHINE_SOURCES = frozenset({b"machine"})
# What a row says, in the two low bits of its packed number. Of the rows of one (image, class) in ascending order the
# first and the last then tell all: ABSENT first and PRESENT last is a contradiction, MACHINE alone is neither.
ABSENT, MACHINE, PRESENT = 0, 1, 2
_DROPPED = 255


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
    parser = _LabelParser(classes, threshold)
    for path in paths:
        columns = check_header(path, LABEL_COLUMNS)
        with (
            ThreadPoolExecutor(1) as reader,
            show_progress(megabytes(path), f"reading {path.name}", unit="MB") as advance,
        ):
            # One block is parsed while the one before is packed.
            previous: Future[_Block] | None = None
            for offset, data in read_blocks(path):
                parsed = reader.submit(parser.parse, _Block(path, columns, offset, data))
                if previous is not None:
                    parser.pack(previous.result())
                previous = parsed
                advance(len(data) >> 20)
            if previous is not None:
                parser.pack(previous.result())
    rows = parser.rows()
    # pyarrow keeps what it has freed, which is needed for other things now.
    pa.default_memory_pool().release_unused()
    return rows


class _Column:
    """An array that grows in place: many small ones, joined at the end, would take twice the memory."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._values, self._size = np.empty(1 << 16, dtype), 0

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values at the end."""
        end = self._size + len(values)
        if end > len(self._values):
            self._values.resize(max(end, len(self._values) * 5 // 4), refcheck=False)
        self._values[self._size : end] = values
        self._size = end

    def finish(self) -> npt.NDArray[Any]:
        """All values; nothing may be appended afterwards."""
        self._values.resize(self._size, refcheck=False)
        return self._values


@dataclass
class _Block:
    """Some lines of a label file.

    Attributes:
        path: the file.
        columns: its column names.
        offset: of the first byte.
        data: the lines.
        table: the parsed lines: an id and three dictionaries.
    """

    path: Path
    columns: list[str]
    offset: int
    data: bytes
    table: Any = None


class _LabelParser:
    """Turns blocks of label files into packed rows, and keeps them."""

    def __init__(self, classes: Sequence[str], threshold: float | None) -> None:
        self.threshold = threshold
        self.allowed = HUMAN_SOURCES if threshold is None else MACHINE_SOURCES
        self.wanted = pa.array([c.encode() for c in classes], pa.binary())
        self.packed_type = np.dtype(np.uint16 if len(classes) <= 1 << 14 else np.uint32)
        self.ids, self.counts, self.packed = _Column(np.uint64), _Column(np.int32), _Column(self.packed_type)
        self.kinds: dict[bytes, int | None] = {}
        self.other_names: set[bytes] = set()
        self.read = self.other = self.below = 0
        self.sources: Counter[str] = Counter()

    def rows(self) -> LabelRows:
        """All packed rows; the parser keeps none of them."""
        ids, counts, packed = self.ids.finish(), self.counts.finish(), self.packed.finish()
        return LabelRows(ids, counts, packed, self.read, self.other, self.below, self.sources)

    def kind(self, confidence: bytes) -> int | None:
        """What a confidence says: ABSENT, MACHINE, PRESENT or `_DROPPED`; None when it is none."""
        if confidence not in self.kinds:
            self.kinds[confidence] = None
            try:
                value = float(confidence)
            except ValueError:
                return None
            if self.threshold is None:
                self.kinds[confidence] = {0.0: ABSENT, 1.0: PRESENT}.get(value)
            elif 0 <= value <= 1:
                self.kinds[confidence] = MACHINE if value >= self.threshold else _DROPPED
        return self.kinds[confidence]

    def parse(self, block: _Block) -> _Block:
        """Fill in the block's table. Raises `UserError` naming the wrong line."""
        try:
            block.table = pa.csv.read_csv(
                pa.BufferReader(block.data),
                pa.csv.ReadOptions(column_names=block.columns, block_size=TASK),
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
        return block

    def pack(self, block: _Block) -> None:
        """Keep the rows of a parsed block. Raises `UserError` naming the wrong line."""
        for batch in block.table.to_batches():
            if not self._pack_batch(*(batch.column(name) for name in LABEL_COLUMNS)):
                raise self._wrong_line(block, "a row cannot be parsed")

    def _wrong_line(self, block: _Block, otherwise: str) -> UserError:
        """The error that names the first wrong line of a block."""
        text = io.StringIO(block.data.decode("utf-8", "backslashreplace"), newline="")
        line = line_at(block.path, block.offset)
        return explain_line(block.path, block.columns, line, text, self.find_fault, otherwise)

    def _pack_batch(self, image: Any, source: Any, name: Any, confidence: Any) -> bool:
        """Pack some rows, given as four columns. Returns False if one of them is wrong."""
        number = len(image)
        if not number:
            return True
        source_names = source.dictionary.to_pylist()
        if not self.allowed.issuperset(source_names):
            return False
        counts = np.bincount(source.indices.to_numpy(), minlength=len(source_names)).tolist()
        for source_name, count in zip(source_names, counts, strict=True):
            self.sources[source_name.decode()] += count
        kinds = [self.kind(text) for text in confidence.dictionary.to_pylist()]
        class_of = pa.compute.index_in(name.dictionary, self.wanted).fill_null(-1).to_numpy()
        unknown = [name.dictionary[i].as_py() for i in np.flatnonzero(class_of < 0).tolist()]
        if None in kinds or any(text not in self.other_names and not CLASS_ID.fullmatch(text) for text in unknown):
            return False
        self.other_names.update(unknown)

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

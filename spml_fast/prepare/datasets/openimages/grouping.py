"""Rows of OpenImages' label files, grouped by image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from spml_fast.data.labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype
from spml_fast.prepare.datasets.openimages.label_files import ABSENT, MACHINE, PRESENT, LabelRows

Conflicts = Literal["positive", "negative", "last", "drop"]
# Runs or rows handled at a time: temporary arrays of 32 MB.
_CHUNK = 1 << 22


@dataclass
class Grouped:
    """Labels by image.

    Attributes:
        ids: uint64 [N], ascending: the images with a label of the wanted classes.
        human: verified labels, N rows.
        machine: machine labels of the same rows, none on a (image, class) that a person has verified; None without
            machine labels.
        named: number of images that the files name.
        repeated: verified rows on a (image, class) that an earlier row names.
        conflicts: (image, class) pairs on which verified rows contradict each other.
        overruled: machine rows on pairs that a person has verified.
    """

    ids: npt.NDArray[np.uint64]
    human: SparseLabels
    machine: SparseLabels | None
    named: int
    repeated: int
    conflicts: int
    overruled: int


def group_rows(rows: LabelRows, machine: LabelRows | None, num_classes: int, conflicts: Conflicts) -> Grouped:
    """Group rows by image; the files need not be sorted.

    Args:
        rows: verified rows.
        machine: machine rows, or None.
        num_classes: C.
        conflicts: which of contradicting verified rows counts; `last` is the last one in the order of the files,
            `drop` makes the pair unknown.
    """
    row_keys = _RowKeys(rows, machine, num_classes)
    ids, bits = row_keys.ids, row_keys.bits
    pairs = _merge_rows(row_keys)
    verified, contradicted = pairs.verified, pairs.contradicted
    repeated = len(rows.packed) - int(verified.sum())
    machine_labels = None
    if machine is not None:
        unverified = pairs.keys[~verified]
        codes = np.full(len(unverified), POSITIVE, np.int8)
        machine_labels = _from_keys(unverified, codes, len(ids), num_classes, bits)
        del unverified, codes
    if conflicts == "negative":
        pairs.codes[contradicted] = NEGATIVE
    elif conflicts == "last" and len(contradicted):
        pairs.codes[contradicted] = _last_codes(pairs.keys[contradicted], row_keys.first(len(rows.run_ids)))
    elif conflicts == "drop":
        verified[contradicted] = False
    if not verified.all():
        pairs.keys, pairs.codes = pairs.keys[verified], pairs.codes[verified]
    human = _from_keys(pairs.keys, pairs.codes, len(ids), num_classes, bits)
    overruled = pairs.overruled
    del verified, pairs
    labelled = np.diff(human.indptr) > 0
    if machine_labels is not None:
        labelled |= np.diff(machine_labels.indptr) > 0
        machine_labels = _without(machine_labels, labelled)
    return Grouped(
        ids[labelled], _without(human, labelled), machine_labels, len(ids), repeated, len(contradicted), overruled
    )


class _RowKeys:
    """Each row as one number, image << (bits + 2) | class << 2 | ABSENT, MACHINE or PRESENT: sorting these in place
    needs no second array, and is several times as fast as sorting positions.

    Attributes:
        ids: uint64 [N], ascending: the images that the files name.
        bits: that a class number takes.
        has_machine_rows: whether some of the rows may be machine labels.
    """

    def __init__(self, rows: LabelRows, machine: LabelRows | None, num_classes: int) -> None:
        self.has_machine_rows = machine is not None
        self.bits = max(1, (num_classes - 1).bit_length())
        run_ids, self._run_counts, self._packed = rows.run_ids, rows.run_counts, rows.packed
        if machine is not None:
            run_ids = np.concatenate([run_ids, machine.run_ids])
            self._run_counts = np.concatenate([self._run_counts, machine.run_counts])
            self._packed = np.concatenate([self._packed, machine.packed])
        self.ids, self._run_rows = _number_runs(run_ids)

    def first(self, runs: int) -> npt.NDArray[np.int64]:
        """Keys of the rows of the first runs, in the order of the files; verified rows come before machine rows."""
        keys = np.empty(int(self._run_counts[:runs].sum(dtype=np.int64)), np.int64)
        done = 0
        for start in range(0, runs, _CHUNK):
            stop = min(start + _CHUNK, runs)
            images = self._run_rows[start:stop].astype(np.int64) << (self.bits + 2)
            part = np.repeat(images, self._run_counts[start:stop])
            np.bitwise_or(part, self._packed[done : done + len(part)], out=keys[done : done + len(part)])
            done += len(part)
        return keys

    def sorted(self) -> npt.NDArray[np.int64]:
        """Keys of all rows, ascending."""
        keys = self.first(len(self._run_rows))
        keys.sort()
        return keys


@dataclass
class _Pairs:
    """Every (image, class) that a row names.

    Attributes:
        keys: int64 [P], ascending, image << bits | class.
        codes: int8 [P], POSITIVE where a verified row says so, NEGATIVE elsewhere.
        verified: bool [P], whether a person has verified it.
        contradicted: int64, positions of pairs on which verified rows contradict each other.
        overruled: machine rows on verified pairs.
    """

    keys: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int8]
    verified: npt.NDArray[np.bool_]
    contradicted: npt.NDArray[np.int64]
    overruled: int


def _merge_rows(row_keys: _RowKeys) -> _Pairs:
    """The rows of each (image, class), as one entry."""
    keys = row_keys.sorted()
    kinds = (keys & 3).astype(np.uint8)
    keys >>= 2
    new = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    overruled = 0
    if new.all():
        lowest = highest = kinds
        verified = kinds != MACHINE
    else:
        starts = np.flatnonzero(new)
        lowest, highest = kinds[starts], kinds[np.append(starts[1:], len(kinds)) - 1]
        keys = keys[starts]
        verified = (lowest == ABSENT) | (highest == PRESENT)
        if row_keys.has_machine_rows:
            overruled = int(np.add.reduceat(kinds == MACHINE, starts, dtype=np.int64)[verified].sum())
    contradicted = np.flatnonzero((lowest == ABSENT) & (highest == PRESENT))
    return _Pairs(keys, (highest == PRESENT).astype(np.int8), verified, contradicted, overruled)


def _number_runs(run_ids: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Different ids, uint64 ascending, and the position of each run's id among them, int32."""
    sorted_already = bool((run_ids[1:] >= run_ids[:-1]).all())
    ordered = run_ids if sorted_already else np.sort(run_ids)
    new = np.ones(len(run_ids), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    ids = ordered[new]
    if sorted_already:
        # As official files are.
        return ids, np.cumsum(new, dtype=np.int32) - np.int32(1)
    del ordered, new
    positions = np.empty(len(run_ids), np.int32)
    for start in range(0, len(run_ids), _CHUNK):
        part = run_ids[start : start + _CHUNK]
        # Searching in order keeps to the cache, and is several times as fast.
        order = np.argsort(part)
        positions[start : start + _CHUNK][order] = np.searchsorted(ids, part[order])
    return ids, positions


def _last_codes(pairs: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
    """Codes of some (image, class) pairs, ascending, by the last row on each in the order of the files."""
    out = np.zeros(len(pairs), np.int8)
    for start in range(0, len(keys), _CHUNK):
        part = keys[start : start + _CHUNK]
        position = np.minimum(np.searchsorted(pairs, part >> 2), len(pairs) - 1)
        hit = pairs[position] == part >> 2
        # Of several assignments to one position the last stays.
        out[position[hit]] = (part[hit] & 3) == PRESENT
    return out


def _from_keys(
    keys: npt.NDArray[np.int64], codes: npt.NDArray[np.int8], num_rows: int, num_classes: int, bits: int
) -> SparseLabels:
    """Labels from ascending (row, class) keys, each once; `keys` is overwritten."""
    indptr = np.searchsorted(keys, np.arange(num_rows + 1) << bits).astype(np.int64, copy=False)
    keys &= (1 << bits) - 1
    return SparseLabels(indptr, keys.astype(class_dtype(num_classes)), codes, num_classes, UNKNOWN)


def _without(labels: SparseLabels, kept: npt.NDArray[np.bool_]) -> SparseLabels:
    """The rows that are kept, bool [N]; the others must be empty."""
    indptr = labels.indptr[np.append(kept, True)]
    return SparseLabels(indptr, labels.classes, labels.codes, labels.num_classes, labels.default)

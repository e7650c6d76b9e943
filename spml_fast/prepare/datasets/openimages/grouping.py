"""Rows of OpenImages' label files, grouped by image: the rows of some images at a time, on several cores.

Where rows are in the order of their images, as in official files, those of some images are a slice, which a core's
cache holds while it is sorted. Where they are not, they are picked out of all rows, in a few passes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype
from spml_fast.prepare.datasets.openimages.growing_array import GrowingArray
from spml_fast.prepare.datasets.openimages.label_files import ABSENT, MACHINE, PRESENT, LabelRows

Conflicts = Literal["positive", "negative", "last", "drop"]
# Rows that are grouped at a time where they are in order.
_CHUNK = 1 << 15
# Passes over rows that are not: each one needs memory for its own part of them.
_PASSES = 8
# Ids that are looked up at a time.
_SEARCHED = 1 << 22
_MAX_THREADS = 4


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
    keys = _RowKeys(rows, machine, num_classes)
    human, extra = _Labels(num_classes, keys.bits), _Labels(num_classes, keys.bits)
    repeated = contradictions = overruled = 0
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MAX_THREADS)) as pool:
        pairs_of = pool.map(lambda images: _merge_rows(keys.of(images), conflicts), keys.parts)
        for images, pairs in zip(keys.parts, pairs_of, strict=True):
            human.append(pairs.verified, pairs.codes, len(images))
            extra.append(pairs.unverified, np.full(len(pairs.unverified), POSITIVE, np.int8), len(images))
            repeated += pairs.repeated
            contradictions += pairs.contradictions
            overruled += pairs.overruled
    ids, human_labels, machine_labels = keys.ids, human.finish(), None
    labelled = np.diff(human_labels.indptr) > 0
    if machine is not None:
        machine_labels = extra.finish()
        labelled |= np.diff(machine_labels.indptr) > 0
        machine_labels = _without(machine_labels, labelled)
    human_labels = _without(human_labels, labelled)
    return Grouped(ids[labelled], human_labels, machine_labels, len(ids), repeated, contradictions, overruled)


class _RowKeys:
    """Each row as one number, image << (bits + 2) | class << 2 | ABSENT, MACHINE or PRESENT: sorting these in place
    needs no second array, and is several times as fast as sorting positions.

    Attributes:
        ids: uint64 [N], ascending: the images that the files name.
        bits: that a class number takes.
        parts: ranges of images whose rows are handled together; all of them, in ascending order.
    """

    def __init__(self, rows: LabelRows, machine: LabelRows | None, num_classes: int) -> None:
        self.bits = max(1, (num_classes - 1).bit_length())
        run_ids, self._run_counts, self._packed = rows.run_ids, rows.run_counts, rows.packed
        if machine is not None:
            run_ids = np.concatenate([run_ids, machine.run_ids])
            self._run_counts = np.concatenate([self._run_counts, machine.run_counts])
            self._packed = np.concatenate([self._packed, machine.packed])
        self._in_order = bool((run_ids[1:] >= run_ids[:-1]).all())
        self.ids, self._run_images = _number_runs(run_ids, self._in_order)
        size = len(self.ids)
        if self._in_order:
            # First row of every run, and the end.
            self._starts = np.zeros(len(run_ids) + 1, np.int64)
            np.cumsum(self._run_counts, out=self._starts[1:])
            runs = np.searchsorted(self._starts[:-1], np.arange(0, len(self._packed), _CHUNK))
            bounds = np.unique(np.append(self._run_images.take(runs, mode="clip"), (0, size)))
        else:
            bounds = np.unique(np.linspace(0, size, _PASSES + 1).astype(np.int64))
        self.parts = [range(a, b) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]

    def of(self, images: range) -> npt.NDArray[np.integer]:
        """Keys of the rows of some images, counted from the first of them, uint32 or int64; in the order of the files,
        verified rows before machine rows."""
        if self._in_order:
            # Of the same type, or NumPy would convert all of them.
            bounds = np.array((images.start, images.stop), self._run_images.dtype)
            first, stop = np.searchsorted(self._run_images, bounds).tolist()
            of_runs, counts = self._run_images[first:stop], self._run_counts[first:stop]
            packed = self._packed[self._starts[first] : self._starts[stop]]
        else:
            chosen = (self._run_images >= images.start) & (self._run_images < images.stop)
            of_runs, counts = self._run_images[chosen], self._run_counts[chosen]
            packed = self._packed[np.repeat(chosen, self._run_counts)]
        shift = self.bits + 2
        key_type: Any = np.uint32 if len(images) << shift <= 1 << 32 else np.int64
        keys = np.repeat((of_runs - images.start).astype(key_type) << key_type(shift), counts)
        keys |= packed
        return keys


@dataclass
class _Pairs:
    """Every (image, class) that a row of some images names, as ascending keys image << bits | class.

    Attributes:
        verified: uint32 or int64, the pairs that a person has verified and that have a label.
        codes: int8, their labels.
        unverified: uint32 or int64, the pairs that only a machine names.
        repeated: verified rows on a pair that an earlier row names.
        contradictions: pairs on which verified rows contradict each other.
        overruled: machine rows on verified pairs.
    """

    verified: npt.NDArray[np.integer]
    codes: npt.NDArray[np.int8]
    unverified: npt.NDArray[np.integer]
    repeated: int
    contradictions: int
    overruled: int


def _merge_rows(keys: npt.NDArray[np.integer], conflicts: Conflicts) -> _Pairs:
    """One entry for each (image, class); `keys` are those of rows in the order of the files, and are overwritten."""
    in_file_order = keys.copy() if conflicts == "last" else keys
    keys.sort()
    kinds = (keys & 3).astype(np.uint8)
    keys >>= 2
    new = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    starts = np.flatnonzero(new)
    lowest, highest = kinds[starts], kinds[np.append(starts[1:], len(kinds)) - 1] if len(kinds) else kinds
    pairs = keys[starts]
    verified = (lowest == ABSENT) | (highest == PRESENT)
    by_machine = kinds == MACHINE
    repeated = len(kinds) - int(np.count_nonzero(by_machine)) - int(np.count_nonzero(verified))
    overruled = int(np.count_nonzero(by_machine & np.repeat(verified, np.diff(np.append(starts, len(kinds))))))
    unverified = pairs[~verified]
    codes = (highest == PRESENT).astype(np.int8)
    contradicted = np.flatnonzero((lowest == ABSENT) & (highest == PRESENT))
    if conflicts == "negative":
        codes[contradicted] = NEGATIVE
    elif conflicts == "last" and len(contradicted):
        codes[contradicted] = _last_codes(pairs[contradicted], in_file_order)
    elif conflicts == "drop":
        verified[contradicted] = False
    return _Pairs(pairs[verified], codes[verified], unverified, repeated, len(contradicted), overruled)


def _number_runs(
    run_ids: npt.NDArray[np.uint64], in_order: bool
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Different ids, uint64 ascending, and the position of each run's id among them, int32."""
    ordered = run_ids if in_order else np.sort(run_ids)
    new = np.ones(len(run_ids), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    ids = ordered[new]
    if in_order:
        return ids, np.cumsum(new, dtype=np.int32) - np.int32(1)
    del ordered, new
    positions = np.empty(len(run_ids), np.int32)
    for start in range(0, len(run_ids), _SEARCHED):
        part = run_ids[start : start + _SEARCHED]
        # Searching in order keeps to the cache, and is several times as fast.
        order = np.argsort(part)
        positions[start : start + _SEARCHED][order] = np.searchsorted(ids, part[order])
    return ids, positions


def _last_codes(pairs: npt.NDArray[np.integer], keys: npt.NDArray[np.integer]) -> npt.NDArray[np.int8]:
    """Codes of some (image, class) pairs, ascending, by the last verified row on each in the order of the files."""
    out = np.zeros(len(pairs), np.int8)
    keys = keys[(keys & 3) != MACHINE]
    position = np.minimum(np.searchsorted(pairs, keys >> 2), len(pairs) - 1)
    hit = pairs[position] == keys >> 2
    # Of several assignments to one position the last stays.
    out[position[hit]] = (keys[hit] & 3) == PRESENT
    return out


class _Labels:
    """Labels of some images after the other.

    Args:
        num_classes: C.
        bits: that a class takes in a key.
    """

    def __init__(self, num_classes: int, bits: int) -> None:
        self._num_classes, self._bits = num_classes, bits
        self._counts, self._codes = GrowingArray(np.int32), GrowingArray(np.int8)
        self._classes = GrowingArray(class_dtype(num_classes))

    def append(self, keys: npt.NDArray[np.integer], codes: npt.NDArray[np.int8], images: int) -> None:
        """Add the labels of some images.

        Args:
            keys: ascending, image << bits | class, each once.
            codes: int8, of each.
            images: number of images.
        """
        self._counts.append(np.bincount(keys >> self._bits, minlength=images))
        self._classes.append(keys & ((1 << self._bits) - 1))
        self._codes.append(codes)

    def finish(self) -> SparseLabels:
        """All labels; nothing may be added afterwards."""
        counts = self._counts.finish()
        indptr = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        return SparseLabels(indptr, self._classes.finish(), self._codes.finish(), self._num_classes, UNKNOWN)


def _without(labels: SparseLabels, kept: npt.NDArray[np.bool_]) -> SparseLabels:
    """The rows that are kept, bool [N]; the others must be empty."""
    indptr = labels.indptr[np.append(kept, True)]
    return SparseLabels(indptr, labels.classes, labels.codes, labels.num_classes, labels.default)

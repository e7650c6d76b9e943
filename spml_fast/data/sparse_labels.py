"""Label codes and sparse label arrays, without PyTorch: preparing and checking labels need not wait for it.

One int8 code per (sample, class) everywhere: 1 observed positive, 0 observed negative, -1 unknown.
Treating an unknown label as a negative is a method's decision, never the data's.

Source: docs/sources.md#label-encodings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from spml_fast.data.manifest_check import check_labels, load_array, read_meta

POSITIVE, NEGATIVE, UNKNOWN = 1, 0, -1


def class_dtype(num_classes: int) -> np.dtype:
    """The smallest signed integer type that holds every class id: int16 up to 32,767 classes, int32 beyond."""
    return np.dtype(np.int16 if num_classes <= np.iinfo(np.int16).max else np.int32)


@dataclass(frozen=True)
class SparseLabels:
    """Label codes of N samples over C classes in CSR form; entries that are not listed have the code `default`.

    A fully annotated set lists its positives and has `default` 0; a partly annotated one lists what is known and has
    `default` -1. Nothing is ever stored densely in N x C.

    Attributes:
        indptr: int64 [N + 1], entries of row i are `indptr[i]:indptr[i + 1]`.
        classes: int16 or int32 [nnz], ascending and unique within a row.
        codes: int8 [nnz].
        num_classes: C.
        default: code of unlisted entries, 0 or -1.
    """

    indptr: npt.NDArray[np.int64]
    classes: npt.NDArray[np.signedinteger]
    codes: npt.NDArray[np.int8]
    num_classes: int
    default: int

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @classmethod
    def from_entries(
        cls,
        rows: npt.ArrayLike,
        classes: npt.ArrayLike,
        codes: npt.ArrayLike,
        num_rows: int,
        num_classes: int,
        default: int = UNKNOWN,
    ) -> SparseLabels:
        """Build from coordinate lists in any order.

        Args:
            rows: row of each entry, int [nnz].
            classes: class id of each entry, int [nnz].
            codes: code of each entry, 1, 0 or -1, [nnz].
            num_rows: N.
            num_classes: C.
            default: code of entries that are not listed.

        Raises:
            ValueError: a (row, class) is listed twice, or a value is out of range.
        """
        rows_a = np.asarray(rows, dtype=np.int64)
        classes_a = np.asarray(classes, dtype=np.int64)
        codes_a = np.asarray(codes, dtype=np.int8)
        if len(classes_a) and (classes_a.min() < 0 or classes_a.max() >= num_classes):
            raise ValueError(f"class id outside 0..{num_classes - 1}")
        if len(rows_a) and (rows_a.min() < 0 or rows_a.max() >= num_rows):
            raise ValueError(f"row outside 0..{num_rows - 1}")
        if len(codes_a) and (codes_a.min() < UNKNOWN or codes_a.max() > POSITIVE):
            raise ValueError("a code is not 1, 0 or -1")
        key = rows_a * num_classes + classes_a
        order = np.argsort(key, kind="stable")
        key = key[order]
        if (key[1:] == key[:-1]).any():
            raise ValueError("the same (row, class) is listed twice")
        indptr = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows_a, minlength=num_rows), out=indptr[1:])
        return cls(indptr, classes_a[order].astype(class_dtype(num_classes)), codes_a[order], num_classes, default)

    @classmethod
    def from_positives(cls, positives: Sequence[Iterable[int]], num_classes: int, default: int) -> SparseLabels:
        """Build from one collection of positive class ids per row; repeated ids count once."""
        unique = [sorted(set(p)) for p in positives]
        rows = np.repeat(np.arange(len(unique)), np.array([len(p) for p in unique], np.int64))
        flat = [c for p in unique for c in p]
        return cls.from_entries(rows, flat, np.ones(len(flat), np.int8), len(unique), num_classes, default)

    @classmethod
    def from_dense(cls, codes: npt.NDArray[np.int8], default: int = UNKNOWN) -> SparseLabels:
        """Build from a dense code array [N, C]; meant for small published label arrays and tests."""
        rows, classes = np.nonzero(codes != default)
        return cls.from_entries(rows, classes, codes[rows, classes], codes.shape[0], codes.shape[1], default)

    def rows(self, index: npt.ArrayLike) -> npt.NDArray[np.int8]:
        """Dense codes int8 [len(index), C] of the given rows; for reports and tests, not for the training step."""
        index_a = np.asarray(index, dtype=np.int64)
        out = np.full((len(index_a), self.num_classes), self.default, dtype=np.int8)
        for i, row in enumerate(index_a):
            entries = slice(int(self.indptr[row]), int(self.indptr[row + 1]))
            out[i, self.classes[entries]] = self.codes[entries]
        return out

    def select(self, index: npt.ArrayLike) -> SparseLabels:
        """The sub-set of rows `index`, in that order."""
        index_a = np.asarray(index, dtype=np.int64)
        counts = (self.indptr[1:] - self.indptr[:-1])[index_a]
        indptr = np.zeros(len(index_a) + 1, dtype=np.int64)
        np.cumsum(counts, out=indptr[1:])
        if len(index_a) and index_a[0] >= 0 and (np.diff(index_a) > 0).all():
            # A mask of the entries takes an eighth of the memory of their places.
            kept = np.zeros(len(self), np.bool_)
            kept[index_a] = True
            mask = np.repeat(kept, np.diff(self.indptr))
            return SparseLabels(indptr, self.classes[mask], self.codes[mask], self.num_classes, self.default)
        entries = np.repeat(np.asarray(self.indptr)[:-1][index_a] - indptr[:-1], counts) + np.arange(indptr[-1])
        return SparseLabels(indptr, self.classes[entries], self.codes[entries], self.num_classes, self.default)

    def codes_at(self, rows: npt.ArrayLike, classes: npt.ArrayLike) -> npt.NDArray[np.int8]:
        """Codes int8 [n] of pairs: their rows, int [n], and classes, int [n]."""
        pairs = list(zip(np.asarray(rows).tolist(), np.asarray(classes).tolist(), strict=True))
        out = np.full(len(pairs), self.default, np.int8)
        for i, (row, wanted) in enumerate(pairs):
            start, stop = int(self.indptr[row]), int(self.indptr[row + 1])
            place = start + int(np.searchsorted(self.classes[start:stop], wanted))
            if place < stop and self.classes[place] == wanted:
                out[i] = self.codes[place]
        return out

    def with_codes(self, rows: npt.ArrayLike, classes: npt.ArrayLike, codes: npt.ArrayLike) -> SparseLabels:
        """The same labels but for some pairs, each given once: rows, classes and new codes, int [n]."""
        changed = np.asarray(rows, np.int64) * self.num_classes + np.asarray(classes, np.int64)
        order = np.argsort(changed)
        changed, new = changed[order], np.asarray(codes, np.int8)[order]
        keys = self.entry_rows() * self.num_classes + self.classes
        places = np.searchsorted(keys, changed)
        listed = places[places < len(keys)][keys[places[places < len(keys)]] == changed[places < len(keys)]]
        keys, kept = np.delete(keys, listed), np.delete(self.codes, listed)
        changed, new = changed[new != self.default], new[new != self.default]
        places = np.searchsorted(keys, changed)
        keys, kept = np.insert(keys, places, changed), np.insert(kept, places, new)
        indptr = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.bincount(keys // self.num_classes, minlength=len(self)), out=indptr[1:])
        ids = (keys % self.num_classes).astype(self.classes.dtype)
        return SparseLabels(indptr, ids, kept, self.num_classes, self.default)

    def class_counts(self, code: int) -> npt.NDArray[np.int64]:
        """Number of listed entries with `code` per class, int64 [C] (unlisted entries are not counted)."""
        return np.bincount(self.classes[self.codes == code], minlength=self.num_classes).astype(np.int64)

    def row_counts(self, code: int) -> npt.NDArray[np.int64]:
        """Number of listed entries with `code` per row, int64 [N]."""
        # The narrowest type that holds their number.
        running = np.zeros(len(self.codes) + 1, np.min_scalar_type(len(self.codes)))
        np.cumsum(self.codes == code, out=running[1:])
        ends = running[self.indptr]
        return np.diff(ends).astype(np.int64)

    def entry_rows(self) -> npt.NDArray[np.int64]:
        """Row of every listed entry, int64 [nnz]."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    def save(self, folder: Path) -> None:
        """Write `indptr.npy`, `classes.npy`, `codes.npy` and `labels.json` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "indptr.npy", self.indptr)
        np.save(folder / "classes.npy", self.classes)
        np.save(folder / "codes.npy", self.codes)
        (folder / "labels.json").write_text(json.dumps({"num_classes": self.num_classes, "default": self.default}))

    @classmethod
    def load(cls, folder: Path) -> SparseLabels:
        """Open what `save` wrote, memory-mapped, and check it. Raises `UserError` when a file is missing or damaged.

        The mapping is private and writable (copy on write): the files never change, and PyTorch takes such memory as it
        is, so that all ranks of a machine without GPUs share one copy of the labels.
        """
        indptr, classes, codes = (load_array(folder / f"{name}.npy", "c") for name in ("indptr", "classes", "codes"))
        num_classes, default = check_labels(folder, indptr, classes, codes, read_meta(folder / "labels.json"))
        return cls(indptr, classes, codes, num_classes, default)

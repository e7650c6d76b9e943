"""Label codes, sparse label arrays, and the label store that turns sample indices into code rows on the device.

One int8 code per (sample, class) everywhere: 1 observed positive, 0 observed negative, -1 unknown.
Treating an unknown label as a negative is a method's decision, never the data's. Source: spec/README.md, "Label code".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from spml_kernels import label_rows
from torch import Tensor

from spml_fast.distributed import all_gather_rows
from spml_fast.errors import UserError

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
        """Build from coordinate lists in any order. Raises `ValueError` on a repeated (row, class) or a bad value."""
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
        if len(key) > 1 and (key[1:] == key[:-1]).any():
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
        take = np.repeat(np.asarray(self.indptr)[:-1][index_a] - indptr[:-1], counts) + np.arange(indptr[-1])
        return SparseLabels(indptr, self.classes[take], self.codes[take], self.num_classes, self.default)

    def class_counts(self, code: int) -> npt.NDArray[np.int64]:
        """Number of listed entries with `code` per class, int64 [C] (unlisted entries are not counted)."""
        return np.bincount(self.classes[self.codes == code], minlength=self.num_classes).astype(np.int64)

    def row_counts(self, code: int) -> npt.NDArray[np.int64]:
        """Number of listed entries with `code` per row, int64 [N]."""
        running = np.concatenate([[0], np.cumsum(self.codes == code, dtype=np.int64)])
        return running[self.indptr[1:]] - running[self.indptr[:-1]]

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
        """Open what `save` wrote, memory-mapped. Raises `UserError` when a file is missing or damaged."""
        try:
            meta = json.loads((folder / "labels.json").read_text())
            indptr, classes, codes = (
                np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("indptr", "classes", "codes")
            )
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the label files in {folder} cannot be read ({error}); prepare the data again") from error
        return cls(indptr, classes, codes, int(meta["num_classes"]), int(meta["default"]))


class LabelStore:
    """Label codes resident on a device, with an overlay of corrections kept beside the observed codes.

    `correct` collects changes of the running epoch; they take effect when `commit` merges them at the epoch's end,
    gathered over all ranks (an image is on another rank next epoch). Observed codes are never written.

    Args:
        labels: the sparse labels of one split.
        device: where rows are made.
    """

    def __init__(self, labels: SparseLabels, device: torch.device | str = "cpu") -> None:
        self.num_classes = labels.num_classes
        self.default = labels.default
        self.device = torch.device(device)
        self._indptr = torch.from_numpy(np.array(labels.indptr)).to(self.device)
        self._classes = torch.from_numpy(np.array(labels.classes)).to(self.device)
        self._codes = torch.from_numpy(np.array(labels.codes)).to(self.device)
        self._max_row = int(np.diff(labels.indptr).max()) if len(labels) else 0
        self._pending: list[tuple[Tensor, Tensor, Tensor, int]] = []
        self._set_overlay(np.empty(0, np.int64), np.empty(0, np.int8))

    def __len__(self) -> int:
        return len(self._indptr) - 1

    def max_row_count(self, code: int) -> int:
        """The largest number of entries with `code` that any sample has, unlisted entries and corrections left out."""
        width = torch.int32 if len(self._codes) < 2**31 else torch.int64
        running = torch.nn.functional.pad((self._codes == code).cumsum(0, dtype=width), (1, 0))
        counts = running[self._indptr[1:]] - running[self._indptr[:-1]]
        return int(counts.max()) if len(counts) else 0

    @property
    def num_corrections(self) -> int:
        """Number of corrected entries that are in effect."""
        return len(self._overlay_keys)

    def class_counts(self, code: int) -> Tensor:
        """Observed entries with `code` per class, unlisted ones included, int64 [C]."""
        counts = torch.bincount(self._classes[self._codes == code].long(), minlength=self.num_classes)
        if code == self.default:
            counts += len(self) - torch.bincount(self._classes.long(), minlength=self.num_classes)
        return counts

    def rows(self, index: Tensor, corrected: bool = True) -> Tensor:
        """Codes int8 [B, C] of the samples `index` (int64 [B], on the store's device).

        Args:
            corrected: with the overlay of committed corrections (default), or the observed codes alone.
        """
        out = label_rows(self._indptr, self._classes, self._codes, index, self.num_classes, self.default, self._max_row)
        if corrected and self.num_corrections:
            base = self._overlay
            over = label_rows(base[0], base[1], base[2], index, self.num_classes, -2, self._overlay_max_row)
            out = torch.where(over == -2, out, over)
        return out

    def correct(self, index: Tensor, classes: Tensor, code: int, valid: Tensor | None = None) -> None:
        """Remember corrections of this epoch; no host-device synchronisation.

        Args:
            index: int64 [K] sample indices.
            classes: int64 [K] class ids.
            code: the new code of all of them.
            valid: bool [K]; entries that are False are padding and dropped at `commit`.
        """
        if valid is None:
            valid = torch.ones_like(index, dtype=torch.bool)
        self._pending.append((index.detach(), classes.detach(), valid.detach(), code))

    def _pending_entries(self) -> tuple[Tensor, Tensor]:
        """Keys (index * C + class, int64) and codes (int8) of this rank's pending corrections."""
        keys = [(i * self.num_classes + c)[v] for i, c, v, _ in self._pending]
        codes = [torch.full_like(k, code, dtype=torch.int8) for k, (*_, code) in zip(keys, self._pending, strict=True)]
        if not keys:
            empty = torch.empty(0, dtype=torch.int64, device=self.device)
            return empty, empty.to(torch.int8)
        return torch.cat(keys), torch.cat(codes)

    def commit(self) -> int:
        """Merge the pending corrections of all ranks into the overlay (collective). Returns how many were new."""
        keys, codes = (all_gather_rows(t).cpu().numpy() for t in self._pending_entries())
        self._pending.clear()
        before = self.num_corrections
        self._set_overlay(np.concatenate([self._overlay_keys, keys]), np.concatenate([self._overlay_codes, codes]))
        return self.num_corrections - before

    def _set_overlay(self, keys: npt.NDArray[np.int64], codes: npt.NDArray[np.int8]) -> None:
        """Replace the overlay; of several corrections of one entry the last wins."""
        unique, last = np.unique(keys[::-1], return_index=True)
        self._overlay_keys, self._overlay_codes = unique, codes[::-1][last]
        rows, classes = np.divmod(unique, self.num_classes)
        if len(rows) and rows[-1] >= len(self):
            raise UserError(f"a label correction names sample {rows[-1]}, but the data have only {len(self)} samples")
        sparse = SparseLabels.from_entries(rows, classes, self._overlay_codes, len(self), self.num_classes)
        self._overlay = (
            tuple(
                torch.from_numpy(np.ascontiguousarray(a)).to(self.device)
                for a in (sparse.indptr, sparse.classes, sparse.codes)
            )
            if len(unique)
            else ()
        )
        self._overlay_max_row = int(np.diff(sparse.indptr).max()) if len(unique) else 0

    def state_dict(self) -> dict[str, Tensor]:
        """Committed corrections, and those of all ranks still pending, as CPU tensors (collective)."""
        keys, codes = (all_gather_rows(t) for t in self._pending_entries())
        return {
            "keys": torch.from_numpy(self._overlay_keys.copy()),
            "codes": torch.from_numpy(self._overlay_codes.copy()),
            "pending_keys": keys.cpu(),
            "pending_codes": codes.cpu(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; every rank takes all pending corrections, which `commit` merges to one of each."""
        self._set_overlay(state["keys"].numpy(), state["codes"].numpy())
        self._pending.clear()
        for code in state["pending_codes"].unique().tolist():
            keys = state["pending_keys"][state["pending_codes"] == code].to(self.device)
            self.correct(keys // self.num_classes, keys % self.num_classes, int(code))

"""The label store, which turns sample indices into code rows on the device; with the codes and arrays it is made of.

Code that needs no PyTorch imports those from `sparse_labels`.

Source: docs/sources.md#label-encodings.
"""

from __future__ import annotations

import zlib
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from spml_kernels import label_rows
from torch import Tensor

from spml_fast.core.distributed import all_gather_rows, is_main
from spml_fast.core.errors import UserError
from spml_fast.data.sparse_labels import NEGATIVE, POSITIVE, UNKNOWN, SparseLabels, class_dtype

__all__ = ["NEGATIVE", "POSITIVE", "UNKNOWN", "LabelStore", "SparseLabels", "class_dtype"]

# Corrections, padding included, that may wait on the device before they are packed: about 40 MB.
_MAX_WAITING = 1 << 22
# Rows whose entries are counted at a time.
_COUNT_ROWS = 1 << 20


class LabelStore:
    """Label codes resident on a device, with an overlay of corrections kept beside the observed codes.

    `correct` collects changes of the running epoch; they take effect when `commit` merges them at the epoch's end,
    gathered over all ranks (an image is on another rank next epoch). Observed codes are never written.

    A listed label takes 3 bytes (5 from 32,768 classes on) and a row 8; a correction takes 9 bytes on the host and in a
    checkpoint, and as much as a label on the device. On a CPU the arrays are used where they are, without a copy.

    Args:
        labels: the sparse labels of one split.
        device: where rows are made.
    """

    def __init__(self, labels: SparseLabels, device: torch.device | str = "cpu") -> None:
        self._labels = labels
        self.num_classes = labels.num_classes
        self.default = labels.default
        self.device = torch.device(device)
        self._indptr = self._resident(labels.indptr)
        self._classes = self._resident(labels.classes)
        self._codes = self._resident(labels.codes)
        self._max_row = int(np.diff(labels.indptr).max()) if len(labels) else 0
        # Corrections of this epoch as `correct` got them: keys, which of them are no padding, code, number of the call.
        self._waiting: list[tuple[Tensor, Tensor | None, int, int]] = []
        self._waiting_size = 0
        # The same without padding: keys int64, codes int8, calls int32.
        self._packed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._calls = 0
        self._overlay_keys, self._overlay_codes = np.empty(0, np.int64), np.empty(0, np.int8)
        self._rebuild_overlay()

    def _resident(self, array: npt.NDArray[Any]) -> Tensor:
        """The array as a tensor on the device; copied on a CPU only where it may not be written."""
        shared = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else np.array(array))
        return shared.to(self.device)

    def __len__(self) -> int:
        return len(self._indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes on the device that labels and committed corrections take."""
        return sum(t.nbytes for t in (self._indptr, self._classes, self._codes, *self._overlay))

    def max_row_count(self, code: int) -> int:
        """The largest number of entries with `code` that any sample has, unlisted entries and corrections left out."""
        largest = 0
        for start in range(0, len(self), _COUNT_ROWS):
            bounds = self._indptr[start : start + _COUNT_ROWS + 1]
            first, last = int(bounds[0]), int(bounds[-1])
            running = torch.nn.functional.pad((self._codes[first:last] == code).cumsum(0), (1, 0))
            counts = running[bounds[1:] - first] - running[bounds[:-1] - first]
            largest = max(largest, int(counts.max()))
        return largest

    @property
    def num_corrections(self) -> int:
        """Number of corrected entries that are in effect."""
        return len(self._overlay_keys)

    def class_counts(self, code: int) -> Tensor:
        """Observed entries with `code` per class, unlisted ones included, int64 [C]."""
        counts = torch.bincount(self._classes[self._codes == code], minlength=self.num_classes)
        if code == self.default:
            counts += len(self) - torch.bincount(self._classes, minlength=self.num_classes)
        return counts

    def rows(self, index: Tensor, corrected: bool = True) -> Tensor:
        """Codes int8 [B, C] of samples.

        Args:
            index: int64 [B] sample indices, on the store's device.
            corrected: with the overlay of committed corrections (default), or the observed codes alone.
        """
        out = label_rows(self._indptr, self._classes, self._codes, index, self.num_classes, self.default, self._max_row)
        if corrected and self.num_corrections:
            base = self._overlay
            over = label_rows(base[0], base[1], base[2], index, self.num_classes, -2, self._overlay_max_row)
            out = torch.where(over == -2, out, over)
        return out

    def correct(self, index: Tensor, classes: Tensor, code: int, valid: Tensor | None = None) -> None:
        """Remember corrections of this epoch, for `commit`.

        Nothing is read back from the device, except once in some thousand steps: padding is dropped when four million
        corrections wait, or the lists of methods that cannot bound their corrections well would fill the memory.

        Args:
            index: int64 [K] sample indices.
            classes: int64 [K] class ids.
            code: the new code of all of them.
            valid: bool [K]; entries that are False are padding and dropped.
        """
        keys = index.detach() * self.num_classes + classes.detach()
        self._waiting.append((keys, None if valid is None else valid.detach(), code, self._calls))
        self._calls += 1
        self._waiting_size += len(keys)
        if self._waiting_size > _MAX_WAITING:
            self._pack()

    def _pack(self) -> None:
        """Drop the padding of the corrections that wait."""
        if not self._waiting:
            return
        lengths = torch.tensor([len(k) for k, *_ in self._waiting], device=self.device)
        size = self._waiting_size
        keys = torch.cat([k for k, *_ in self._waiting])
        valid = torch.cat([torch.ones_like(k, dtype=torch.bool) if v is None else v for k, v, *_ in self._waiting])
        columns = (
            torch.tensor([w[at] for w in self._waiting], dtype=dtype, device=self.device)
            for at, dtype in ((2, torch.int8), (3, torch.int32))
        )
        codes, calls = (c.repeat_interleave(lengths, output_size=size)[valid] for c in columns)
        self._packed.append((keys[valid], codes, calls))
        self._waiting.clear()
        self._waiting_size = 0

    def _gather_pending(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], npt.NDArray[np.int32]]:
        """Keys (index * C + class), codes and call numbers of all ranks' pending corrections, in rank order."""
        self._pack()
        columns = [
            torch.cat([p[at] for p in self._packed]) if self._packed else torch.empty(0, dtype=dtype)
            for at, dtype in enumerate((torch.int64, torch.int8, torch.int32))
        ]
        keys, codes, calls = (all_gather_rows(c.to(self.device)).cpu().numpy() for c in columns)
        return keys, codes, calls

    def commit(self) -> int:
        """Merge the pending corrections of all ranks into the overlay (collective). Returns how many were new.

        Of several corrections of one entry the last call of `correct` wins, and of one call the highest rank.
        """
        keys, codes, calls = self._gather_pending()
        self._packed.clear()
        self._calls = 0
        before = self.num_corrections
        if len(keys):
            # Stable, so that equal keys of one call stay in rank order.
            order = np.lexsort((calls, keys))
            keys, codes = keys[order], codes[order]
            last = np.append(keys[1:] != keys[:-1], True)
            self._merge(keys[last], codes[last])
            self._rebuild_overlay()
        return self.num_corrections - before

    def _merge(self, keys: npt.NDArray[np.int64], codes: npt.NDArray[np.int8]) -> None:
        """Put ascending, unique keys into the ascending ones of the overlay; they replace equal ones."""
        position = np.searchsorted(self._overlay_keys, keys)
        known = np.zeros(len(keys), np.bool_)
        inside = position < len(self._overlay_keys)
        known[inside] = self._overlay_keys[position[inside]] == keys[inside]
        self._overlay_codes[position[known]] = codes[known]
        self._overlay_codes = np.insert(self._overlay_codes, position[~known], codes[~known])
        self._overlay_keys = np.insert(self._overlay_keys, position[~known], keys[~known])

    def _rebuild_overlay(self) -> None:
        """Make the overlay's CSR arrays on the device from its keys."""
        keys = self._overlay_keys
        self._overlay: tuple[Tensor, ...] = ()
        self._overlay_max_row = 0
        if not len(keys):
            return
        rows = keys // self.num_classes
        counts = np.bincount(rows, minlength=len(self))
        indptr = np.zeros(len(self) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        classes = (keys - rows * self.num_classes).astype(class_dtype(self.num_classes))
        # The codes are copied: a later merge writes into the host's.
        arrays = (indptr, classes, self._overlay_codes.copy())
        self._overlay = tuple(torch.from_numpy(a).to(self.device) for a in arrays)
        self._overlay_max_row = int(counts.max())

    @cached_property
    def fingerprint(self) -> Tensor:
        """Samples, classes, listed labels and a checksum of the labels, int64 [4]: corrections belong to no others."""
        labels, checksum = self._labels, 0
        for array in (labels.indptr, labels.classes, labels.codes):
            checksum = zlib.crc32(np.ascontiguousarray(array).data, checksum)
        return torch.tensor([len(labels), labels.num_classes, len(labels.codes), checksum])

    def state_dict(self) -> dict[str, Tensor]:
        """Committed corrections, and those of all ranks still pending, as CPU tensors (collective)."""
        keys, codes, calls = self._gather_pending()
        return {
            "fingerprint": self.fingerprint,
            "keys": torch.from_numpy(self._overlay_keys.copy()),
            "codes": torch.from_numpy(self._overlay_codes.copy()),
            "pending_keys": torch.from_numpy(keys.copy()),
            "pending_codes": torch.from_numpy(codes.copy()),
            "pending_calls": torch.from_numpy(calls.copy()),
            "calls": torch.tensor(self._calls),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; rank 0 takes all pending corrections, so that each is gathered once.

        Raises:
            UserError: it belongs to other labels.
        """
        if not torch.equal(state["fingerprint"].cpu(), self.fingerprint):
            theirs, ours = state["fingerprint"].tolist(), self.fingerprint.tolist()
            raise UserError(
                f"the checkpoint belongs to other training labels ({theirs[0]:,} samples, {theirs[1]:,} classes, "
                f"{theirs[2]:,} labels; now {ours[0]:,}, {ours[1]:,} and {ours[2]:,}"
                + (" with other content" if theirs[:3] == ours[:3] else "")
                + "); resume with the data set it was trained on, or start a new run in another --run.dir"
            )
        self._overlay_keys, self._overlay_codes = state["keys"].numpy().copy(), state["codes"].numpy().copy()
        self._rebuild_overlay()
        self._waiting.clear()
        self._waiting_size = 0
        self._packed.clear()
        self._calls = int(state["calls"])
        if is_main():
            keys, codes, calls = (state[f"pending_{n}"].to(self.device) for n in ("keys", "codes", "calls"))
            self._packed.append((keys, codes, calls))

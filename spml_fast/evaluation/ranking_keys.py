"""Known entries as integers that ascend in ranking order: class, descending score, row, label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class _Entries(NamedTuple):
    """Arrays of one length; rows where they order ties."""

    class_id: npt.NDArray[np.integer]
    score: npt.NDArray[np.floating]
    code: npt.NDArray[np.integer]
    row: npt.NDArray[np.integer] | None


class Pairs:
    """Annotated pairs in any order, of which blocks of classes are ranked.

    Args:
        class_id: integer [M].
        score: floating [M].
        code: integer [M], 1 or 0.
        row: integer [M], what orders ties; None for the order of the pairs.
        parts: runs of pairs that are looked through at once.
        stable: whether ties have an order.
    """

    def __init__(
        self,
        class_id: npt.NDArray[np.integer],
        score: npt.NDArray[np.floating],
        code: npt.NDArray[np.integer],
        row: npt.NDArray[np.integer] | None,
        parts: list[slice],
        stable: bool,
    ) -> None:
        self.class_id, self.score, self.code, self.row = class_id, score, code, row
        self.parts, self.stable = parts, stable
        self.row_bits = _row_bits(row, stable)

    def sorted_keys(self, low: int, high: int, number: int) -> npt.NDArray[np.uint64]:
        """The `sorted_keys` of the `number` pairs of classes low..high-1, as classes 0..high-low-1."""
        if self.score.dtype == np.float64 or not _fit(high - low, self.row_bits):
            class_id, score, code, row = zip(*self._of_classes(low, high), strict=True)
            rows = None if self.row is None else np.concatenate(row)
            joined = (np.concatenate(class_id), np.concatenate(score), np.concatenate(code), rows)
            return sorted_keys(*joined, high - low, self.stable)
        # Beside the keys there is only what one part has of these classes.
        keys, last = np.empty(number, np.uint64), 0
        for entries in self._of_classes(low, high):
            first, last = last, last + len(entries.code)
            _write_keys(keys[first:last], entries, self.row_bits)
        keys.sort()
        return keys

    def _of_classes(self, low: int, high: int) -> Iterator[_Entries]:
        for part in self.parts:
            class_part = self.class_id[part]
            inside = np.flatnonzero((class_part >= low) & (class_part < high))
            class_id = np.subtract(class_part[inside], low, dtype=np.int64)
            row = None if self.row is None else self.row[part][inside]
            yield _Entries(class_id, self.score[part][inside], self.code[part][inside], row)


def _descending_bits(score: npt.NDArray[np.floating]) -> npt.NDArray[np.uint32]:
    """uint32 codes that ascend where the scores descend; equal exactly where the scores are equal."""
    if score.dtype == np.float64:
        # No room for 64 bits of score beside the class id: the place among the distinct values orders as exactly.
        values, place = np.unique(score, return_inverse=True)
        return (len(values) - 1 - place).astype(np.uint32)
    # Adding zero makes -0.0 the same as 0.0, which compares equal and so must tie.
    bits = np.add(score, np.float32(0), dtype=np.float32).view(np.int32)
    # The bits of non-negative floats ascend with the value: turn them round below the sign. Those of negative floats
    # descend already, and their sign bit puts them after.
    bits ^= ~(bits >> 31) & np.int32(0x7FFFFFFF)
    return bits.view(np.uint32)


def sorted_keys(
    class_id: npt.NDArray[np.integer],
    score: npt.NDArray[np.floating],
    code: npt.NDArray[np.integer],
    row: npt.NDArray[np.integer] | None,
    num_classes: int,
    stable: bool,
) -> npt.NDArray[np.uint64]:
    """Known entries in ranking order, uint64 [M]: class id, descending score, (row,) label from high bits to low.

    Bit 0 is the label, so that the negatives of a tie come before its positives when there is no row in between.

    Args:
        class_id: integer [M], 0..num_classes-1.
        score: floating [M] without NaN.
        code: integer [M], 1 or 0.
        row: non-negative integer [M], what orders ties; None for the order of the entries.
        num_classes: above every class id.
        stable: whether ties have an order.
    """
    keys = np.empty(len(class_id), np.uint64)
    row_bits = _row_bits(row, stable)
    if _fit(num_classes, row_bits):
        _write_keys(keys, _Entries(class_id, score, code, row), row_bits)
        keys.sort()
        return keys
    keys[:] = class_id
    keys <<= 32
    keys |= _descending_bits(score)
    order = np.argsort(keys, kind="stable") if row is None else np.lexsort((row, keys))
    keys = keys[order]
    keys <<= 1
    keys |= code.astype(np.uint8)[order]
    return keys


def _row_bits(row: npt.NDArray[np.integer] | None, stable: bool) -> int:
    """Bits of a row in the keys; all of them where the order of the input stands for it."""
    if not stable:
        return 0
    return 64 if row is None or not len(row) else int(row.max()).bit_length()


def _fit(num_classes: int, row_bits: int) -> bool:
    """Whether a class id, 32 bits of score, a row and a label fit into a key."""
    return (num_classes - 1).bit_length() + 32 + row_bits + 1 <= 64


def _write_keys(keys: npt.NDArray[np.uint64], entries: _Entries, row_bits: int) -> None:
    """Write keys in the order of the entries, where they fit."""
    class_id, score, code, row = entries
    keys[:] = class_id
    keys <<= 32
    keys |= _descending_bits(score)
    if row is not None:
        keys <<= row_bits
        keys |= row.astype(np.uint64)
    keys <<= 1
    keys |= code.astype(np.uint8)

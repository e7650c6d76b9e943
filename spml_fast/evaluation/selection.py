"""Which entries of fully annotated classes have to be sorted for average precision, and how many of the others count.

Average precision asks, of every positive, how many entries rank at or above it. Cut the range of a class's scores into
about as many equal bins as the class has entries. A bin without a positive need not be looked into: its entries are
negatives that rank above all positives of lower bins and below all of higher ones, so that their number is enough. What
is sorted are the entries of bins with a positive: for classes of which a few per cent are positive, a tenth.

A bin is floor((highest - score) * scale). Subtraction and product are rounded, but neither ever puts a lower score
before a higher one, and equal scores share a bin; so nothing here is approximate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spml_fast.evaluation.entries import BoolArray, IntArray

# Fewer entries are sorted as fast as they are counted.
_FEWEST = 4096
# Bins of a class are 2^20 at most, so that fp32 cannot round the lowest score's place up to 2^20.
_MOST_BITS = 20
_NARROWEST = np.float32(1e-30)


class Selection(NamedTuple):
    """The entries of some classes that have to be sorted.

    Attributes:
        entries: int64 [S], their places among the b x N of the classes.
        skipped: int64 [P], for every positive, in ranking order class after class, how many of the others rank above.
    """

    entries: IntArray
    skipped: IntArray


def select_entries(scores: npt.NDArray[np.float32], positive: BoolArray) -> Selection | None:
    """What has to be sorted; None where everything is, since nothing would be saved or a score is infinite.

    Args:
        scores: fp32 [b, N], contiguous, without NaN: a class a row.
        positive: bool [b, N], contiguous.
    """
    classes, count = scores.shape
    if count < _FEWEST or 8 * np.count_nonzero(positive) > positive.size:
        return None
    highest, lowest = scores.max(1, keepdims=True), scores.min(1, keepdims=True)
    bins = 1 << min(count.bit_length(), _MOST_BITS)
    with np.errstate(over="ignore", invalid="ignore"):
        width = highest - lowest
    if not np.isfinite(width).all():
        return None
    # Of a width that is nearly 0 the quotient would be infinite; so few bins are used then.
    scale = np.float32(bins - 1) / np.maximum(width, _NARROWEST)
    place = ((highest - scores) * scale).astype(np.int64)
    place += np.arange(classes)[:, None] * bins
    flat = place.ravel()
    of_positives = np.sort(flat[positive.ravel()])
    touched = np.zeros(classes * bins, np.bool_)
    touched[of_positives] = True
    entries = np.flatnonzero(touched[flat])
    if 2 * len(entries) > len(flat):
        return None
    others = np.bincount(flat, minlength=classes * bins)
    others[touched] = 0
    before = np.cumsum(others)
    # A bin with a positive has none of the others, so that the sum up to it is the sum above it.
    start = np.concatenate([[0], before[bins - 1 : -1 : bins]])
    return Selection(entries, before[of_positives] - start[of_positives // bins])

"""Average precision per class, over dense scores or over annotated pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from spml_fast.evaluation.entries import (
    BLOCK_ENTRIES,
    BoolArray,
    Definition,
    EmptyClasses,
    FloatArray,
    IntArray,
    as_dense,
    as_pairs,
    check_choice,
    dense_label_counts,
    in_threads,
    row_chunks,
)
from spml_fast.evaluation.ranking_keys import Pairs, sorted_keys
from spml_fast.evaluation.selection import select_entries

# Pairs whose classes are ranked at once, and the most blocks of them.
PAIR_BLOCK_ENTRIES = 1 << 18
_MOST_PAIR_BLOCKS = 16
# Entries whose ranks are counted at once, few enough for what is between the passes to stay close to the processor.
_NEAR_ENTRIES = 1 << 15


@dataclass(frozen=True)
class ClassAP:
    """Average precision of every class, with what is needed to average it honestly.

    Attributes:
        ap: float64 [C], fractions 0..1; NaN for a class without a known positive, where AP is not defined.
        positives: int64 [C], known positives of each class.
        negatives: int64 [C], known negatives of each class.
        definition: which of the three definitions `ap` follows.
    """

    ap: FloatArray
    positives: IntArray
    negatives: IntArray
    definition: Definition

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.ap)

    @property
    def defined(self) -> BoolArray:
        """bool [C]: the class has a known positive, so that `ap` holds a number."""
        return self.positives > 0

    @property
    def labelled(self) -> BoolArray:
        """bool [C]: the class has a known label, positive or negative."""
        return (self.positives + self.negatives) > 0

    def included(self, empty_classes: EmptyClasses = "zero") -> BoolArray:
        """The classes that are in the mean, bool [C].

        Args:
            empty_classes: what becomes of classes whose AP is not defined:
                `"zero"`: they count 0 and stay (protocol of the single-positive papers; IMCL on OpenImages);
                `"skip_unlabelled"`: those without any known label are left out, those with negatives alone count 0
                and stay (Large Loss and BoostLU on OpenImages V3);
                `"skip"`: all of them are left out (mlcpl);
                `"skip_one_sided"`: classes lacking a positive or a negative are left out (CSL on OpenImages V6).

        Raises:
            UserError: unknown convention.
        """
        check_choice("empty_classes", empty_classes, get_args(EmptyClasses))
        if empty_classes == "zero":
            return np.ones(self.num_classes, dtype=np.bool_)
        if empty_classes == "skip_unlabelled":
            return self.labelled
        return self.defined if empty_classes == "skip" else self.defined & (self.negatives > 0)

    def mean(self, empty_classes: EmptyClasses = "zero", subset: npt.NDArray[Any] | None = None) -> float:
        """Mean AP, a fraction; NaN when no class is left to average.

        Args:
            empty_classes: see `included`.
            subset: bool [C] or class ids; the mean is taken over these classes only.
        """
        values, included = np.where(self.defined, self.ap, 0.0), self.included(empty_classes)
        if subset is not None:
            values, included = values[subset], included[subset]
        return float(values[included].mean()) if included.any() else math.nan

    def weighted_mean(self) -> float:
        """Mean AP weighted by the number of known positives (CSL), a fraction; NaN without any positive."""
        total = int(self.positives.sum())
        return float(np.where(self.defined, self.ap, 0.0) @ self.positives / total) if total else math.nan


def average_precision(
    scores: npt.ArrayLike,
    codes: npt.ArrayLike,
    definition: Definition = "sklearn",
    *,
    class_names: Sequence[str] | None = None,
) -> ClassAP:
    """Average precision of every class from dense scores, over known entries.

    Extra memory: some tens of bytes for each of about 2^20 known entries (or of N, where N is larger), never an
    array of N x C.

    Args:
        scores: floating [N, C], logits (any increasing function of the probability ranks alike). fp16 and fp32 are
            ranked by their own bits; float64 is ranked exactly too, more slowly. Infinities are allowed.
        codes: int8, any integer, or bool [N, C]: 1 positive, 0 negative, -1 unknown.
        definition: with tp and n the positives and the entries seen down to a rank,
            `"sklearn"`: sum (R_n - R_{n-1}) P_n over distinct scores, ties grouped, equal to
            `sklearn.metrics.average_precision_score`;
            `"rank"`: mean over positives of tp / n at the positive's own rank, ties in row order;
            `"voc"`: all-points interpolation of VOC 2010 and later, mean over positives of the largest precision at
            this or any later rank, ties in row order.
        class_names: names for error messages.

    Returns:
        `ClassAP` over C classes.

    Raises:
        UserError: a NaN score, a code outside {1, 0, -1}, or an unknown definition.
        ValueError: wrong shape or dtype.

    Source: docs/sources.md#metrics.
    """
    check_choice("definition", definition, get_args(Definition))
    scores_a, codes_a = as_dense(scores, codes)
    positives, known = dense_label_counts(scores_a, codes_a, class_names)
    ap = np.full(scores_a.shape[1], np.nan)

    def fill(block: tuple[int, int]) -> None:
        part = slice(*block)
        whole = definition == "sklearn" and bool((known[part] == len(scores_a)).all())
        block_ap = _whole_block_ap if whole else _block_ap
        ap[part] = block_ap(scores_a[:, part], codes_a[:, part], known[part], definition)

    in_threads(fill, list(_class_blocks(known)))
    return ClassAP(ap, positives, known - positives, definition)


def average_precision_pairs(
    class_id: npt.ArrayLike,
    score: npt.ArrayLike,
    code: npt.ArrayLike,
    num_classes: int,
    definition: Definition = "sklearn",
    *,
    row: npt.ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> ClassAP:
    """Average precision of every class from annotated pairs in any order; equal to the dense form, bit for bit.

    A (row, class) given twice counts twice: the caller drops what a sampler repeated.

    Args:
        class_id: integer [M], 0..C-1.
        score: floating [M], as in `average_precision`.
        code: integer or bool [M]: 1 positive, 0 negative; entries with -1 are dropped.
        num_classes: C.
        definition: see `average_precision`.
        row: non-negative integer [M], which sample a pair belongs to; read by `"rank"` and `"voc"` only, to order
            ties. Without it the order of the input decides.
        class_names: names for error messages.

    Returns:
        `ClassAP` over C classes.

    Raises:
        UserError: a NaN score, a code outside {1, 0, -1}, a class outside 0..C-1, or an unknown definition.
        ValueError: wrong shape or dtype.
    """
    check_choice("definition", definition, get_args(Definition))
    class_a, score_a, code_a, row_a = as_pairs(class_id, score, code, num_classes, row, class_names)
    if len(code_a) and code_a.min() < 0:
        known_entries = code_a >= 0
        class_a, score_a, code_a = class_a[known_entries], score_a[known_entries], code_a[known_entries]
        row_a = None if row_a is None else row_a[known_entries]
    stable = definition != "sklearn"
    # One part at least, so that there is something to join where there are no pairs.
    parts = [slice(start, start + PAIR_BLOCK_ENTRIES) for start in range(0, len(class_a) or 1, PAIR_BLOCK_ENTRIES)]
    pairs = Pairs(class_a, score_a, code_a, row_a if stable else None, parts, stable)
    # In parts, since NumPy counts int64 and copies other integers.
    counts = in_threads(lambda part: np.bincount(class_a[part], minlength=num_classes), parts)
    known = sum(counts, np.zeros(num_classes, np.int64))
    ap, positives = np.full(num_classes, np.nan), np.zeros(num_classes, np.int64)

    def fill(block: tuple[int, int]) -> None:
        low, high = block
        keys = pairs.sorted_keys(low, high, int(known[low:high].sum()))
        first = 0
        for start, stop in _class_blocks(known[low:high], _NEAR_ENTRIES):
            part = slice(low + start, low + stop)
            last = first + int(known[part].sum())
            ap[part], positives[part] = _segment_ap(keys[first:last], known[part], definition)
            first = last

    # Each block looks through all pairs for its own, so they are few.
    entries = max(PAIR_BLOCK_ENTRIES, len(class_a) // _MOST_PAIR_BLOCKS)
    in_threads(fill, list(_class_blocks(known, entries)))
    return ClassAP(ap, positives, known - positives, definition)


def _class_blocks(known: IntArray, entries: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut the classes into runs [low, high) of at most so many known entries (`BLOCK_ENTRIES`), or of one class."""
    entries = BLOCK_ENTRIES if entries is None else entries
    low, held = 0, 0
    for c, count in enumerate(known.tolist()):
        if c > low and held + count > entries:
            yield low, c
            low, held = c, 0
        held += count
    yield low, len(known)


def _block_ap(
    scores: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], known: IntArray, definition: Definition
) -> FloatArray:
    """AP float64 [b] of a block of classes, scores and codes [N, b], known int64 [b]."""
    num_rows, width = scores.shape
    total = int(known.sum())
    stable = definition != "sklearn"
    class_id = np.empty(total, np.uint32)
    score = np.empty(total, scores.dtype)
    code = np.empty(total, np.int8)
    row = np.empty(total, np.int64) if stable else None
    ids = np.arange(width, dtype=np.uint32)
    filled = 0
    # A block of rarely annotated classes is wide, so it is gathered a few rows at a time.
    for start, stop in row_chunks(num_rows, width):
        code_chunk = codes[start:stop]
        mask = code_chunk >= 0
        if mask.all():
            out = slice(filled, filled + mask.size)
            class_id[out].reshape(mask.shape)[:] = ids
            score[out].reshape(mask.shape)[:] = scores[start:stop]
            code[out].reshape(mask.shape)[:] = code_chunk
            if row is not None:
                row[out].reshape(mask.shape)[:] = np.arange(start, stop)[:, None]
        else:
            rows, columns = np.nonzero(mask)
            out = slice(filled, filled + len(rows))
            class_id[out] = columns
            score[out] = scores[start:stop][rows, columns]
            code[out] = code_chunk[rows, columns]
            if row is not None:
                np.add(rows, start, out=row[out])
        filled = out.stop
    return _segment_ap(sorted_keys(class_id, score, code, row, width, stable), known, definition)[0]


def _whole_block_ap(
    scores: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], known: IntArray, definition: Definition
) -> FloatArray:
    """`_block_ap` of classes that are annotated in every row, by scikit-learn's definition, which has no row order."""
    if scores.dtype == np.float64:
        return _block_ap(scores, codes, known, definition)
    score = np.ascontiguousarray(scores.T, dtype=np.float32)
    positive = np.ascontiguousarray((codes == 1).T)
    selection = select_entries(score, positive)
    if selection is None:
        return _block_ap(scores, codes, known, definition)
    chosen = selection.entries
    class_id = chosen // len(scores)
    keys = sorted_keys(class_id, score.ravel()[chosen], positive.ravel()[chosen], None, len(known), stable=False)
    return _segment_ap(keys, np.bincount(class_id, minlength=len(known)), definition, selection.skipped)[0]


def _segment_ap(
    keys: npt.NDArray[np.uint64], known: IntArray, definition: Definition, skipped: IntArray | None = None
) -> tuple[FloatArray, IntArray]:
    """AP float64 [C] (NaN without positives) and positives int64 [C].

    Precision changes its weight in AP at positives only, so all arithmetic is on them.

    Args:
        keys: sorted, uint64 [M].
        known: int64 [C], the number of keys of each class.
        definition: of AP.
        skipped: int64 [P], entries without a key that rank above each positive; None for none.
    """
    # NumPy finds what is true several times faster than what is not 0.
    positions = np.flatnonzero((keys & np.uint64(1)).astype(np.bool_))
    starts = np.concatenate([[0], np.cumsum(known)])
    bounds = np.searchsorted(positions, starts)
    positives = np.diff(bounds)
    first = bounds[:-1]
    ap = np.full(len(known), np.nan)
    has = np.flatnonzero(positives)
    if not len(has):
        return ap, positives
    tp = np.arange(1, len(positions) + 1) - np.repeat(first, positives)
    seen = positions + 1 - np.repeat(starts[:-1], positives)
    if skipped is not None:
        seen += skipped
    if definition == "sklearn":
        # The negatives of a tie lie before its positives, so the last positive of a tie is the end of the tie.
        tie = keys[positions]
        ends = np.append(tie[1:] != tie[:-1], True)
        if ends.all():
            terms, segments = tp / seen, first[has]
        else:
            last = np.flatnonzero(ends)
            terms = np.diff(last, prepend=-1) * (tp[last] / seen[last])
            segments = np.searchsorted(last, first[has])
    else:
        terms, segments = tp / seen, first[has]
        if definition == "voc":
            terms = _precision_envelope(terms, positives)
    ap[has] = np.add.reduceat(terms, segments) / positives[has]
    return ap, positives


def _precision_envelope(precision: FloatArray, positives: IntArray) -> FloatArray:
    """Largest precision at this or a later positive of the same class, float64 [P].

    Between two positives precision only falls, so later positives are the only ranks to look at.
    """
    # A running maximum that starts anew with each class, exact: the place of a value among the distinct values, made
    # larger by a whole range for each class that is passed (on the way from the last class to the first).
    values, place = np.unique(precision, return_inverse=True)
    class_id = np.repeat(np.arange(len(positives)), positives)
    levels = (len(positives) - 1 - class_id) * len(values) + place
    running = np.maximum.accumulate(levels[::-1])[::-1]
    return values[running % len(values)]

"""Multi-label metrics over known labels only: average precision in three definitions, threshold metrics, groups.

Everything works on fp32 logits, on the CPU, with NumPy. An entry whose code is -1 (unknown) is dropped everywhere and
never counted as a negative. There is one core: each known entry becomes one unsigned integer (class id in the high
bits, then the order-preserving bits of the score, then the label), one sort puts every class in ranking order, and
what remains is arithmetic on the positives alone; no Python loop runs over classes. Both input forms use it:

* dense, scores and codes [N, C] (VOC, COCO, NUS-WIDE, CUB), worked off in blocks of classes so that the extra memory
  stays at some tens of MB whatever N x C is;
* pairs, one (class, score, code) for every annotated entry (OpenImages: two million pairs of 125 thousand pictures
  times ten thousand classes).

Definitions, conventions and golden values: spec/protocol.md, sections 3 and 4.

Input order. `"sklearn"` groups ties, so its result is bit-identical for every order of the rows. `"rank"` and `"voc"`
depend on the order within a tie: among equal scores of a class the smaller row comes first (the place in the input
where pairs are given without rows). Every other figure of this file is made of integer counts and independent of
row order.

Units: functions that return arrays or `ClassAP` give fractions 0..1; the dictionaries of `evaluate_scores` and
`evaluate_pairs` give per cent, like published tables, beside plain counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError

Definition = Literal["sklearn", "rank", "voc"]
EmptyClasses = Literal["zero", "skip_unlabelled", "skip", "skip_one_sided"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Known entries that are sorted at once in the dense form: 8 MB of keys, which a sort keeps close to the processor.
_BLOCK_ENTRIES = 1 << 20


# --------------------------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------------------------


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
        _check_choice("empty_classes", empty_classes, get_args(EmptyClasses))
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


@dataclass(frozen=True)
class ThresholdCounts:
    """Counts over known entries at one threshold, each int64 [C].

    Attributes:
        true_positives: predicted and known positive.
        predicted: predicted, known positive or negative.
        positives: known positive.
        known: known.
    """

    true_positives: IntArray
    predicted: IntArray
    positives: IntArray
    known: IntArray

    def __add__(self, other: ThresholdCounts) -> ThresholdCounts:
        """Counts of two disjoint sets of rows together."""
        return ThresholdCounts(
            self.true_positives + other.true_positives,
            self.predicted + other.predicted,
            self.positives + other.positives,
            self.known + other.known,
        )

    def metrics(self) -> dict[str, float]:
        """OP, OR, OF1, CP, CR, CF1 and CF1_mean, fractions 0..1.

        A ratio whose denominator is 0 (nothing predicted, no positive) is 0. CF1 is the harmonic mean of CP and CR
        (SSGRL, HCP, Query2Label), CF1_mean the mean over classes of F1 (ASL, SPLC). Class means run over the classes
        with a known label, which are all classes of a fully annotated set; NaN when there is none.
        Source: protocol.md, 3.2.
        """
        overall_p = _ratio(self.true_positives.sum(), self.predicted.sum())
        overall_r = _ratio(self.true_positives.sum(), self.positives.sum())
        labelled = self.known > 0
        if not labelled.any():
            class_p = class_r = class_f1 = math.nan
        else:
            class_p = float(_ratios(self.true_positives, self.predicted)[labelled].mean())
            class_r = float(_ratios(self.true_positives, self.positives)[labelled].mean())
            # F1 = 2 TP / (predicted + positives): the harmonic mean of precision and recall without their divisions.
            class_f1 = float(_ratios(2 * self.true_positives, self.predicted + self.positives)[labelled].mean())
        return {
            "OP": overall_p,
            "OR": overall_r,
            "OF1": _harmonic(overall_p, overall_r),
            "CP": class_p,
            "CR": class_r,
            "CF1": _harmonic(class_p, class_r),
            "CF1_mean": class_f1,
        }


# --------------------------------------------------------------------------------------------------------------------
# Average precision
# --------------------------------------------------------------------------------------------------------------------


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

    Source: protocol.md, 3.1.
    """
    _check_choice("definition", definition, get_args(Definition))
    scores_a, codes_a = _as_dense(scores, codes)
    positives, known = _dense_label_counts(scores_a, codes_a, class_names)
    ap = np.full(scores_a.shape[1], np.nan)
    for low, high in _class_blocks(known):
        ap[low:high] = _block_ap(scores_a[:, low:high], codes_a[:, low:high], known[low:high], definition)
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
    _check_choice("definition", definition, get_args(Definition))
    class_a, score_a, code_a, row_a = _as_pairs(class_id, score, code, num_classes, row, class_names)
    known_entries = code_a >= 0
    if not known_entries.all():
        class_a, score_a, code_a = class_a[known_entries], score_a[known_entries], code_a[known_entries]
        row_a = None if row_a is None else row_a[known_entries]
    known = np.bincount(class_a, minlength=num_classes)
    keys = _sorted_keys(class_a, score_a, code_a, row_a, num_classes, stable=definition != "sklearn")
    ap, positives = _segment_ap(keys, known, definition)
    return ClassAP(ap, positives, known - positives, definition)


def _class_blocks(known: IntArray) -> Iterator[tuple[int, int]]:
    """Cut the classes into runs [low, high) of at most `_BLOCK_ENTRIES` known entries, or of one class."""
    low, held = 0, 0
    for c, count in enumerate(known.tolist()):
        if c > low and held + count > _BLOCK_ENTRIES:
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
    for start, stop in _row_chunks(num_rows, width):
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
    return _segment_ap(_sorted_keys(class_id, score, code, row, width, stable), known, definition)[0]


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


def _sorted_keys(
    class_id: npt.NDArray[np.integer],
    score: npt.NDArray[np.floating],
    code: npt.NDArray[np.integer],
    row: npt.NDArray[np.integer] | None,
    num_classes: int,
    stable: bool,
) -> npt.NDArray[np.uint64]:
    """Known entries in ranking order, uint64 [M]: class id, descending score, (row,) label from high bits to low.

    Bit 0 is the label, so that the negatives of a tie come before its positives when there is no row in between.
    """
    keys = class_id.astype(np.uint64)
    keys <<= 32
    keys |= _descending_bits(score)
    label = code.astype(np.uint8)
    if stable:
        row_bits = 64 if row is None or not len(row) else int(row.max()).bit_length()
        if (num_classes - 1).bit_length() + 32 + row_bits + 1 > 64:
            order = np.argsort(keys, kind="stable") if row is None else np.lexsort((row, keys))
            keys, label = keys[order], label[order]
            keys <<= 1
            keys |= label
            return keys
        assert row is not None
        keys <<= row_bits
        keys |= row.astype(np.uint64)
    keys <<= 1
    keys |= label
    keys.sort()
    return keys


def _segment_ap(keys: npt.NDArray[np.uint64], known: IntArray, definition: Definition) -> tuple[FloatArray, IntArray]:
    """AP float64 [C] (NaN without positives) and positives int64 [C] of sorted keys uint64 [M].

    `known` int64 [C] is the number of keys of each class. Precision changes its weight in AP at positives only, so
    all arithmetic is on them.
    """
    positions = np.flatnonzero(keys & np.uint64(1))
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
    if definition == "sklearn":
        # The negatives of a tie lie before its positives, so the last positive of a tie is the end of the tie.
        tie = keys[positions] >> np.uint64(1)
        last = np.flatnonzero(np.append(tie[1:] != tie[:-1], True))
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


# --------------------------------------------------------------------------------------------------------------------
# Threshold metrics
# --------------------------------------------------------------------------------------------------------------------


def logit_threshold(probability: float) -> float:
    """The logit that stands for a probability threshold; `UserError` unless 0 < probability < 1."""
    if not 0 < probability < 1:
        raise UserError(f"a probability threshold lies between 0 and 1, not at {probability}")
    return math.log(probability) - math.log1p(-probability)


def top_k_mask(scores: npt.NDArray[np.floating], k: int = 3) -> BoolArray:
    """The k highest scores of each row, bool [N, C]; of equal scores the smaller class id comes first.

    Args:
        scores: floating [N, C] without NaN.
        k: how many; all classes when C <= k.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    num_classes = scores.shape[1]
    if num_classes <= k:
        return np.ones(scores.shape, dtype=np.bool_)
    edge = np.partition(scores, num_classes - k, axis=1)[:, num_classes - k, None]
    mask = scores >= edge
    crowded = np.flatnonzero(mask.sum(axis=1) > k)
    if len(crowded):
        # More scores tie at the k-th place than there are places: fill those that are left in class order.
        above, level = scores[crowded] > edge[crowded], scores[crowded] == edge[crowded]
        places = k - above.sum(axis=1, keepdims=True)
        mask[crowded] = above | (level & (np.cumsum(level, axis=1) <= places))
    return mask


def count_at_threshold(
    scores: npt.ArrayLike,
    codes: npt.ArrayLike,
    threshold: float = 0.0,
    *,
    inclusive: bool = False,
    top_k: int | None = None,
    class_names: Sequence[str] | None = None,
) -> ThresholdCounts:
    """True positives, predictions and positives of each class at a threshold, over known entries.

    Args:
        scores: floating [N, C] logits.
        codes: integer or bool [N, C]: 1, 0, -1 (unknown).
        threshold: logit; 0 is p = 0.5 (`logit_threshold` gives others).
        inclusive: predict at score >= threshold (HCP, mmpretrain) instead of score > threshold (SPLC).
        top_k: predict only what is besides among the k highest scores of its row (HCP's top-3). The k are taken over
            all classes, known or not: they are the model's choice; unknown ones are then left out of the counts.
        class_names: names for error messages.

    Raises:
        UserError: a NaN score or a code outside {1, 0, -1}.
        ValueError: wrong shape or dtype.
    """
    scores_a, codes_a = _as_dense(scores, codes)
    return _dense_threshold_counts(scores_a, codes_a, threshold, inclusive, [top_k], class_names)[0]


def count_at_threshold_pairs(
    class_id: npt.ArrayLike,
    score: npt.ArrayLike,
    code: npt.ArrayLike,
    num_classes: int,
    threshold: float = 0.0,
    *,
    inclusive: bool = False,
    in_top_k: npt.ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> ThresholdCounts:
    """`count_at_threshold` from annotated pairs.

    Args:
        in_top_k: bool [M], whether the pair's class was among the k highest of its picture over all classes, which
            the pairs alone cannot tell (`top_k_mask` of the picture's whole row); None: no such condition.
        class_id, score, code, num_classes: as in `average_precision_pairs`.
        threshold, inclusive, class_names: as in `count_at_threshold`.

    Raises:
        UserError, ValueError: as `average_precision_pairs`.
    """
    class_a, score_a, code_a, _ = _as_pairs(class_id, score, code, num_classes, None, class_names)
    predicted = score_a >= threshold if inclusive else score_a > threshold
    if in_top_k is not None:
        allowed = np.asarray(in_top_k)
        if allowed.shape != class_a.shape or allowed.dtype != np.bool_:
            raise ValueError(f"in_top_k must be bool {class_a.shape}, not {allowed.dtype} {allowed.shape}")
        predicted &= allowed

    def count(mask: BoolArray) -> IntArray:
        return np.bincount(class_a[mask], minlength=num_classes)

    known, positive = code_a >= 0, code_a == 1
    return ThresholdCounts(count(predicted & positive), count(predicted & known), count(positive), count(known))


def _dense_threshold_counts(
    scores: npt.NDArray[np.floating],
    codes: npt.NDArray[np.integer],
    threshold: float,
    inclusive: bool,
    top_ks: Sequence[int | None],
    class_names: Sequence[str] | None,
) -> list[ThresholdCounts]:
    """Counts for each of `top_ks` (None: no top-k condition) in one pass over the rows."""
    num_rows, num_classes = scores.shape
    sums = np.zeros((2 + 2 * len(top_ks), num_classes), dtype=np.int64)
    for start, stop in _row_chunks(num_rows, num_classes):
        score, code = scores[start:stop], codes[start:stop]
        _check_dense(score, code, start, class_names)
        known, positive = code >= 0, code == 1
        sums[0] += np.count_nonzero(known, axis=0)
        sums[1] += np.count_nonzero(positive, axis=0)
        above = score >= threshold if inclusive else score > threshold
        for i, k in enumerate(top_ks):
            predicted = above if k is None else above & top_k_mask(score, k)
            sums[2 + 2 * i] += np.count_nonzero(predicted & positive, axis=0)
            sums[3 + 2 * i] += np.count_nonzero(predicted & known, axis=0)
    return [ThresholdCounts(sums[2 + 2 * i], sums[3 + 2 * i], sums[1], sums[0]) for i in range(len(top_ks))]


# --------------------------------------------------------------------------------------------------------------------
# Groups of classes, pseudo-labels
# --------------------------------------------------------------------------------------------------------------------


def groups_by_count(counts: npt.ArrayLike, num_groups: int = 5) -> IntArray:
    """Cut the classes, sorted ascending by a count, into groups of equal size (OpenImages: five of 1000).

    The source does not say whether "number of annotations in the training set" means positives and negatives or
    positives alone; give the sum for the first reading (the one we take) and the positives for the second.

    Args:
        counts: integer [C], for instance `labels.class_counts(1) + labels.class_counts(0)` of the training split.
        num_groups: G. When C is not a multiple of it, the first groups have one class more.

    Returns:
        int64 [C], group of each class, 0 the rarest; equal counts stay in the order of the class ids.

    Source: protocol.md, section 4.
    """
    counts_a = np.asarray(counts)
    if counts_a.ndim != 1 or counts_a.dtype.kind not in "iu":
        raise ValueError(f"counts must be integers [C], not {counts_a.dtype} {counts_a.shape}")
    if not 1 <= num_groups <= max(len(counts_a), 1):
        raise UserError(f"{len(counts_a)} classes cannot be cut into {num_groups} groups")
    groups = np.empty(len(counts_a), dtype=np.int64)
    for group, members in enumerate(np.array_split(np.argsort(counts_a, kind="stable"), num_groups)):
        groups[members] = group
    return groups


def group_means(result: ClassAP, groups: npt.ArrayLike, empty_classes: EmptyClasses = "zero") -> FloatArray:
    """Mean AP of each group of classes, float64 [G], fractions; NaN where a group has no class to average.

    Args:
        result: AP of C classes.
        groups: integer [C], group 0..G-1 of each class; a class with a negative group belongs to none.
        empty_classes: see `ClassAP.included`.
    """
    groups_a = _as_groups(groups, result.num_classes)
    count = int(groups_a.max(initial=-1)) + 1
    return np.array([result.mean(empty_classes, groups_a == g) for g in range(count)], dtype=np.float64)


def selection_quality(correct: int, selected: int, relevant: int) -> dict[str, float]:
    """Precision, recall and F1 (fractions) of a selection, such as the entries a method took for hidden positives.

    Args:
        correct: selected entries that are right.
        selected: selected entries.
        relevant: entries that should have been selected.

    Raises:
        ValueError: counts that cannot be (negative, or more correct than selected or relevant).
    """
    if not 0 <= correct <= min(selected, relevant):
        raise ValueError(f"{correct} correct of {selected} selected and {relevant} relevant entries cannot be")
    precision, recall = _ratio(correct, selected), _ratio(correct, relevant)
    return {"precision": precision, "recall": recall, "f1": _harmonic(precision, recall)}


# --------------------------------------------------------------------------------------------------------------------
# Everything at once
# --------------------------------------------------------------------------------------------------------------------


def evaluate_scores(
    scores: npt.ArrayLike,
    codes: npt.ArrayLike,
    *,
    definition: Definition = "sklearn",
    empty_classes: EmptyClasses = "zero",
    threshold: float = 0.0,
    inclusive: bool = False,
    top_k: int = 3,
    groups: npt.ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """All metrics of a dense evaluation, ready for JSON: figures in per cent, None where one is not defined.

    Args:
        scores: floating [N, C] logits, fp32 wherever published numbers are compared.
        codes: integer or bool [N, C]: 1, 0, -1 (unknown).
        definition: of average precision, see `average_precision`.
        empty_classes: convention of `map`, see `ClassAP.included`; the other conventions are reported beside it.
        threshold, inclusive: see `count_at_threshold`.
        top_k: of the top-k variants of the threshold metrics.
        groups: integer [C], see `group_means`; None: no groups.
        class_names: names for error messages.

    Returns:
        `definition`, `empty_classes`, `threshold` as given;
        `map` under `empty_classes`; `map_zero`, `map_skip_unlabelled`, `map_skipping` (classes without positives left
        out), `map_skip_one_sided`, `map_weighted` (by positives);
        `num_classes`, `num_positives`, `num_negatives` (known entries), `classes_without_positive`,
        `classes_without_negative`, `classes_without_label` (the last are in the two before as well);
        `OP`, `OR`, `OF1`, `CP`, `CR`, `CF1`, `CF1_mean`, and the same with `_top3`;
        `groups`: a list of {`group`, `num_classes`, `map`, `map_zero`, ...}, when groups are given;
        `per_class_ap`: a list of C, None for a class without positives.

    Raises:
        UserError: a NaN score, a code outside {1, 0, -1}, an unknown definition or convention.
        ValueError: wrong shape or dtype.
    """
    _check_choice("empty_classes", empty_classes, get_args(EmptyClasses))
    scores_a, codes_a = _as_dense(scores, codes)
    result = average_precision(scores_a, codes_a, definition, class_names=class_names)
    plain, top = _dense_threshold_counts(scores_a, codes_a, threshold, inclusive, [None, top_k], class_names)
    return _report(result, empty_classes, threshold, {"": plain, f"_top{top_k}": top}, groups)


def evaluate_pairs(
    class_id: npt.ArrayLike,
    score: npt.ArrayLike,
    code: npt.ArrayLike,
    num_classes: int,
    *,
    row: npt.ArrayLike | None = None,
    in_top_k: npt.ArrayLike | None = None,
    definition: Definition = "sklearn",
    empty_classes: EmptyClasses = "skip_unlabelled",
    threshold: float = 0.0,
    inclusive: bool = False,
    top_k: int = 3,
    groups: npt.ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """`evaluate_scores` from annotated pairs; the top-k variants are there when `in_top_k` is given.

    Args:
        class_id, score, code, num_classes, row: as in `average_precision_pairs`.
        in_top_k: bool [M], as in `count_at_threshold_pairs`, made with the same `top_k`.
        empty_classes: the default here is the convention of the partially annotated sets.
        definition, threshold, inclusive, top_k, groups, class_names: as in `evaluate_scores`.

    Raises:
        UserError, ValueError: as `average_precision_pairs`.
    """
    _check_choice("empty_classes", empty_classes, get_args(EmptyClasses))
    pairs = (class_id, score, code, num_classes)
    result = average_precision_pairs(*pairs, definition, row=row, class_names=class_names)
    conditions = {"": None} if in_top_k is None else {"": None, f"_top{top_k}": in_top_k}
    counts = {
        suffix: count_at_threshold_pairs(
            *pairs, threshold, inclusive=inclusive, in_top_k=allowed, class_names=class_names
        )
        for suffix, allowed in conditions.items()
    }
    return _report(result, empty_classes, threshold, counts, groups)


def _report(
    result: ClassAP,
    empty_classes: EmptyClasses,
    threshold: float,
    counts: dict[str, ThresholdCounts],
    groups: npt.ArrayLike | None,
) -> dict[str, Any]:
    """The dictionary of `evaluate_scores`; the keys of `counts` are suffixes."""
    out: dict[str, Any] = {"definition": result.definition, "empty_classes": empty_classes, "threshold": threshold}
    out.update(_mean_figures(result, empty_classes, None))
    out["map_weighted"] = _per_cent(result.weighted_mean())
    out["num_classes"] = result.num_classes
    out["num_positives"] = int(result.positives.sum())
    out["num_negatives"] = int(result.negatives.sum())
    out["classes_without_positive"] = int((result.positives == 0).sum())
    out["classes_without_negative"] = int((result.negatives == 0).sum())
    out["classes_without_label"] = int((~result.labelled).sum())
    for suffix, count in counts.items():
        out.update({name + suffix: _per_cent(value) for name, value in count.metrics().items()})
    if groups is not None:
        groups_a = _as_groups(groups, result.num_classes)
        out["groups"] = [
            {"group": g, "num_classes": int((groups_a == g).sum())}
            | _mean_figures(result, empty_classes, groups_a == g)
            for g in range(int(groups_a.max(initial=-1)) + 1)
        ]
    out["per_class_ap"] = [_per_cent(value) for value in result.ap.tolist()]
    return out


def _mean_figures(result: ClassAP, empty_classes: EmptyClasses, subset: BoolArray | None) -> dict[str, float | None]:
    """Mean AP under the chosen convention and under each by name, per cent."""
    names: dict[str, EmptyClasses] = {
        "map": empty_classes,
        "map_zero": "zero",
        "map_skip_unlabelled": "skip_unlabelled",
        "map_skipping": "skip",
        "map_skip_one_sided": "skip_one_sided",
    }
    return {name: _per_cent(result.mean(convention, subset)) for name, convention in names.items()}


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic and checks
# --------------------------------------------------------------------------------------------------------------------


def _ratio(part: Any, whole: Any) -> float:
    """part / whole, 0 when whole is 0."""
    return float(part) / float(whole) if whole else 0.0


def _ratios(part: IntArray, whole: IntArray) -> FloatArray:
    """Element-wise part / whole, 0 where whole is 0 (part is 0 there too)."""
    return part / np.maximum(whole, 1)


def _harmonic(a: float, b: float) -> float:
    """Harmonic mean, 0 when both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def _per_cent(fraction: float) -> float | None:
    """100 x fraction; None for NaN, which JSON does not know."""
    return None if math.isnan(fraction) else 100 * fraction


def _row_chunks(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Runs [start, stop) of rows that hold about `_BLOCK_ENTRIES` entries of `width` columns."""
    step = max(1, _BLOCK_ENTRIES // max(width, 1))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{what} is {value!r}; choose one of {', '.join(choices)}")


def _check_dtypes(score: npt.NDArray[Any], code: npt.NDArray[Any]) -> None:
    if score.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(f"scores must be float32 (or float16, float64), not {score.dtype}")
    if code.dtype.kind not in "iub":
        raise ValueError(f"label codes must be integers 1, 0, -1, not {code.dtype}")


def _as_dense(scores: npt.ArrayLike, codes: npt.ArrayLike) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.integer]]:
    """Arrays of checked shape and dtype; values are checked chunk by chunk, where they are read."""
    scores_a, codes_a = np.asarray(scores), np.asarray(codes)
    if scores_a.ndim != 2 or scores_a.shape != codes_a.shape:
        raise ValueError(f"scores and codes must both be [N, C], not {scores_a.shape} and {codes_a.shape}")
    if scores_a.shape[1] == 0:
        raise ValueError("there must be at least one class")
    _check_dtypes(scores_a, codes_a)
    return scores_a, codes_a.view(np.int8) if codes_a.dtype == np.bool_ else codes_a


def _as_pairs(
    class_id: npt.ArrayLike,
    score: npt.ArrayLike,
    code: npt.ArrayLike,
    num_classes: int,
    row: npt.ArrayLike | None,
    class_names: Sequence[str] | None,
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.floating], npt.NDArray[np.integer], npt.NDArray[np.integer] | None]:
    """Checked one-dimensional arrays of one length."""
    class_a, score_a, code_a = np.asarray(class_id), np.asarray(score), np.asarray(code)
    row_a = None if row is None else np.asarray(row)
    arrays = [class_a, score_a, code_a] + ([] if row_a is None else [row_a])
    if any(a.ndim != 1 or len(a) != len(class_a) for a in arrays):
        raise ValueError(f"class ids, scores, codes (and rows) must be [M], not {[a.shape for a in arrays]}")
    if num_classes < 1:
        raise ValueError("there must be at least one class")
    _check_dtypes(score_a, code_a)
    if class_a.dtype.kind not in "iu" or (row_a is not None and row_a.dtype.kind not in "iu"):
        raise ValueError("class ids and rows must be integers")
    if not len(class_a):
        return class_a, score_a, code_a, row_a
    if class_a.min() < 0 or class_a.max() >= num_classes:
        at = int(np.flatnonzero((class_a < 0) | (class_a >= num_classes))[0])
        raise UserError(f"pair {at} names class {class_a[at]}; the classes are 0..{num_classes - 1}")
    if row_a is not None and row_a.min() < 0:
        raise ValueError(f"pair {int(row_a.argmin())} has the negative row {row_a.min()}")

    def where(at: int) -> str:
        place = f"pair {at}" if row_a is None else f"row {row_a[at]}"
        return f"of class {_class_text(int(class_a[at]), class_names)} in {place}"

    bad = np.isnan(score_a)
    if bad.any():
        raise UserError(f"the score {where(int(bad.argmax()))} is NaN; {_NAN_ADVICE}")
    if code_a.dtype == np.bool_:
        return class_a, score_a, code_a.view(np.int8), row_a
    if code_a.min() < -1 or code_a.max() > 1:
        at = int(np.flatnonzero((code_a < -1) | (code_a > 1))[0])
        raise UserError(f"the label code {where(at)} is {code_a[at]}; {_CODE_ADVICE}")
    return class_a, score_a, code_a, row_a


_NAN_ADVICE = "the model has diverged or was loaded wrongly, so there is nothing to rank"
_CODE_ADVICE = "codes are 1 (positive), 0 (negative) and -1 (unknown): convert the labels first"


def _check_dense(
    scores: npt.NDArray[np.floating],
    codes: npt.NDArray[np.integer],
    start: int,
    class_names: Sequence[str] | None,
) -> None:
    """Refuse NaN scores and impossible codes in the rows from `start` on."""
    bad = np.isnan(scores)
    if bad.any():
        r, c = (int(i[0]) for i in np.nonzero(bad))
        raise UserError(f"the score of class {_class_text(c, class_names)} in row {start + r} is NaN; {_NAN_ADVICE}")
    if codes.min(initial=0) < -1 or codes.max(initial=0) > 1:
        r, c = (int(i[0]) for i in np.nonzero((codes < -1) | (codes > 1)))
        text = f"the label code of class {_class_text(c, class_names)} in row {start + r} is {codes[r, c]}"
        raise UserError(f"{text}; {_CODE_ADVICE}")


def _class_text(c: int, class_names: Sequence[str] | None) -> str:
    return str(c) if class_names is None or c >= len(class_names) else f"{c} ({class_names[c]})"


def _dense_label_counts(
    scores: npt.NDArray[np.floating], codes: npt.NDArray[np.integer], class_names: Sequence[str] | None
) -> tuple[IntArray, IntArray]:
    """Known positives and known entries of each class, int64 [C]; refuses bad values on the way."""
    num_rows, num_classes = codes.shape
    positives, known = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    for start, stop in _row_chunks(num_rows, num_classes):
        code = codes[start:stop]
        _check_dense(scores[start:stop], code, start, class_names)
        positives += np.count_nonzero(code == 1, axis=0)
        known += np.count_nonzero(code >= 0, axis=0)
    return positives, known


def _as_groups(groups: npt.ArrayLike, num_classes: int) -> IntArray:
    groups_a = np.asarray(groups)
    if groups_a.shape != (num_classes,) or groups_a.dtype.kind not in "iu":
        raise ValueError(f"groups must be integers [{num_classes}], not {groups_a.dtype} {groups_a.shape}")
    return groups_a.astype(np.int64)

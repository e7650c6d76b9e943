"""Counts at a threshold or over each image's top k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.evaluation.entries import (
    BoolArray,
    IntArray,
    as_dense,
    as_pairs,
    check_dense,
    harmonic,
    in_threads,
    ratio,
    ratios,
    row_chunks,
)


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

        Source: docs/sources.md#metrics.
        """
        overall_p = ratio(self.true_positives.sum(), self.predicted.sum())
        overall_r = ratio(self.true_positives.sum(), self.positives.sum())
        labelled = self.known > 0
        if not labelled.any():
            class_p = class_r = class_f1 = math.nan
        else:
            class_p = float(ratios(self.true_positives, self.predicted)[labelled].mean())
            class_r = float(ratios(self.true_positives, self.positives)[labelled].mean())
            # F1 = 2 TP / (predicted + positives): the harmonic mean of precision and recall without their divisions.
            class_f1 = float(ratios(2 * self.true_positives, self.predicted + self.positives)[labelled].mean())
        return {
            "OP": overall_p,
            "OR": overall_r,
            "OF1": harmonic(overall_p, overall_r),
            "CP": class_p,
            "CR": class_r,
            "CF1": harmonic(class_p, class_r),
            "CF1_mean": class_f1,
        }


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
    scores_a, codes_a = as_dense(scores, codes)
    return dense_threshold_counts(scores_a, codes_a, threshold, inclusive, [top_k], class_names)[0]


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
        class_id: integer [M], 0..C-1.
        score: floating [M] logits.
        code: integer or bool [M]: 1, 0, -1 (unknown).
        num_classes: C.
        threshold: as in `count_at_threshold`.
        inclusive: as in `count_at_threshold`.
        in_top_k: bool [M], whether the pair's class was among the k highest of its image over all classes, which
            the pairs alone cannot tell (`top_k_mask` of the image's whole row); None: no such condition.
        class_names: names for error messages.

    Raises:
        UserError, ValueError: as `average_precision_pairs`.
    """
    class_a, score_a, code_a, _ = as_pairs(class_id, score, code, num_classes, None, class_names)
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


def dense_threshold_counts(
    scores: npt.NDArray[np.floating],
    codes: npt.NDArray[np.integer],
    threshold: float,
    inclusive: bool,
    top_ks: Sequence[int | None],
    class_names: Sequence[str] | None,
) -> list[ThresholdCounts]:
    """Counts for each of `top_ks` in one pass over the rows.

    Args:
        scores: floating [N, C] logits.
        codes: integer [N, C]: 1, 0, -1 (unknown).
        threshold: as in `count_at_threshold`.
        inclusive: as in `count_at_threshold`.
        top_ks: numbers of highest scores of a row that may be predicted; None: no such condition.
        class_names: names for error messages.
    """

    def count(rows: tuple[int, int]) -> IntArray:
        score, code = scores[slice(*rows)], codes[slice(*rows)]
        check_dense(score, code, rows[0], class_names)
        known, positive = code >= 0, code == 1
        above = score >= threshold if inclusive else score > threshold
        masks = [known, positive]
        for k in top_ks:
            predicted = above if k is None else above & top_k_mask(score, k)
            masks += [predicted & positive, predicted & known]
        return np.stack([np.count_nonzero(mask, axis=0) for mask in masks])

    counts = in_threads(count, list(row_chunks(*scores.shape)))
    sums = sum(counts, np.zeros((2 + 2 * len(top_ks), scores.shape[1]), np.int64))
    return [ThresholdCounts(sums[2 + 2 * i], sums[3 + 2 * i], sums[1], sums[0]) for i in range(len(top_ks))]

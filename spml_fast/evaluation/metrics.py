"""Multi-label metrics over known labels only: average precision in three definitions, threshold metrics, groups.

Everything works on fp32 logits, on the CPU, with NumPy. An entry whose code is -1 (unknown) is dropped everywhere and
never counted as a negative. There is one core: each known entry becomes one unsigned integer (class id in the high
bits, then the order-preserving bits of the score, then the label), one sort puts every class in ranking order, and
what remains is arithmetic on the positives alone; no Python loop runs over classes. Both input forms use it:

* dense, scores and codes [N, C] (VOC, COCO, NUS-WIDE, CUB), worked off in blocks of classes so that the extra memory
  stays at some tens of MB whatever N x C is;
* pairs, one (class, score, code) for every annotated entry (OpenImages: two million pairs of 125 thousand images
  times ten thousand classes).

Source of definitions, conventions and golden values: docs/sources.md#metrics.

Input order. `"sklearn"` groups ties, so its result is bit-identical for every order of the rows. `"rank"` and `"voc"`
depend on the order within a tie: among equal scores of a class the smaller row comes first (the place in the input
where pairs are given without rows). Every other figure of this file is made of integer counts and independent of
row order.

Units: functions that return arrays or `ClassAP` give fractions 0..1; the dictionaries of `evaluate_scores` and
`evaluate_pairs` give per cent, like published tables, beside plain counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.evaluation.average_precision import ClassAP, average_precision, average_precision_pairs
from spml_fast.evaluation.entries import (
    BoolArray,
    Definition,
    EmptyClasses,
    FloatArray,
    IntArray,
    as_dense,
    as_groups,
    harmonic,
    per_cent,
    ratio,
)
from spml_fast.evaluation.thresholds import ThresholdCounts, count_at_threshold_pairs, dense_threshold_counts


def groups_by_count(counts: npt.ArrayLike, num_groups: int = 5) -> IntArray:
    """Cut the classes, sorted ascending by a count, into groups of equal size (OpenImages: five of 1000).

    The source does not say whether "number of annotations in the training set" means positives and negatives or
    positives alone; give the sum for the first reading (the one we take) and the positives for the second.

    Args:
        counts: integer [C], for instance `labels.class_counts(1) + labels.class_counts(0)` of the training split.
        num_groups: G. When C is not a multiple of it, the first groups have one class more.

    Returns:
        int64 [C], group of each class, 0 the rarest; equal counts stay in the order of the class ids.

    Source: the groups of BoostLU's and Large Loss's OpenImages V3 tables; docs/sources.md#openimages.
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
    groups_a = as_groups(groups, result.num_classes)
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
    precision, recall = ratio(correct, selected), ratio(correct, relevant)
    return {"precision": precision, "recall": recall, "f1": harmonic(precision, recall)}


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
        threshold: logit from which a class counts as predicted, see `count_at_threshold`.
        inclusive: whether the threshold itself counts.
        top_k: of the top-k variants of the threshold metrics.
        groups: integer [C], see `group_means`; None: no groups.
        class_names: names for error messages.

    Returns:
        `definition`, `empty_classes` as given, `threshold_probability` (of the logit `threshold`);
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
    scores_a, codes_a = as_dense(scores, codes)
    result = average_precision(scores_a, codes_a, definition, class_names=class_names)
    plain, top = dense_threshold_counts(scores_a, codes_a, threshold, inclusive, [None, top_k], class_names)
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
        class_id: integer [M], 0..C-1.
        score: floating [M], fp32 logits wherever published numbers are compared.
        code: integer or bool [M]: 1, 0, -1 (dropped).
        num_classes: C.
        row: integer [M], which sample a pair belongs to; see `average_precision_pairs`.
        in_top_k: bool [M], as in `count_at_threshold_pairs`, made with the same `top_k`.
        definition: of average precision, see `average_precision`.
        empty_classes: the default here is the convention of the partially annotated sets.
        threshold: as in `evaluate_scores`.
        inclusive: as in `evaluate_scores`.
        top_k: as in `evaluate_scores`; names the variants.
        groups: integer [C], see `group_means`; None: no groups.
        class_names: names for error messages.

    Raises:
        UserError, ValueError: as `average_precision_pairs`.
    """
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
    out: dict[str, Any] = {"definition": result.definition, "empty_classes": empty_classes}
    # A probability, as in the options; 12 digits undo the rounding of its logit.
    out["threshold_probability"] = round(0.5 + 0.5 * math.tanh(threshold / 2), 12)
    out.update(_mean_figures(result, empty_classes, None))
    out["map_weighted"] = per_cent(result.weighted_mean())
    out["num_classes"] = result.num_classes
    out["num_positives"] = int(result.positives.sum())
    out["num_negatives"] = int(result.negatives.sum())
    out["classes_without_positive"] = int((result.positives == 0).sum())
    out["classes_without_negative"] = int((result.negatives == 0).sum())
    out["classes_without_label"] = int((~result.labelled).sum())
    for suffix, count in counts.items():
        out.update({name + suffix: per_cent(value) for name, value in count.metrics().items()})
    if groups is not None:
        groups_a = as_groups(groups, result.num_classes)
        out["groups"] = [
            {"group": g, "num_classes": int((groups_a == g).sum())}
            | _mean_figures(result, empty_classes, groups_a == g)
            for g in range(int(groups_a.max(initial=-1)) + 1)
        ]
    out["per_class_ap"] = [per_cent(value) for value in result.ap.tolist()]
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
    return {name: per_cent(result.mean(convention, subset)) for name, convention in names.items()}

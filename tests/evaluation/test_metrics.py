"""Metrics: golden values of the specification, equality with scikit-learn, conventions, invariances, bad input."""

from __future__ import annotations

import json
import math
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from spml_fast.core.errors import UserError
from spml_fast.evaluation import average_precision as average_precision_module
from spml_fast.evaluation import entries
from spml_fast.evaluation.average_precision import ClassAP, average_precision, average_precision_pairs
from spml_fast.evaluation.metrics import (
    evaluate_pairs,
    evaluate_scores,
    group_means,
    groups_by_count,
    selection_quality,
)
from spml_fast.evaluation.thresholds import count_at_threshold, count_at_threshold_pairs, logit_threshold, top_k_mask

DEFINITIONS = ("sklearn", "rank", "voc")
INF = np.float32(np.inf)


def sklearn_ap(scores, codes):
    """scikit-learn class by class over known entries; NaN without positives."""
    out = []
    for s, y in zip(scores.T, codes.T, strict=True):
        known = y >= 0
        out.append(average_precision_score(y[known], s[known]) if (y == 1).any() else np.nan)
    return np.array(out)


def slow_ap(scores, codes, definition):
    """The two tie-ordered definitions by the letter, one entry after another."""
    out = []
    for s, y in zip(scores.T, codes.T, strict=True):
        known = np.flatnonzero(y >= 0)
        order = sorted(known.tolist(), key=lambda r, s=s: (-s[r], r))
        tp, precision = 0, []
        for n, r in enumerate(order, 1):
            tp += int(y[r] == 1)
            precision.append(tp / n)
        at = [n for n, r in enumerate(order) if y[r] == 1]
        terms = [precision[n] if definition == "rank" else max(precision[n:]) for n in at]
        out.append(sum(terms) / len(terms) if terms else np.nan)
    return np.array(out)


def pairs_of(scores, codes, rng=None):
    """Every known entry as (class, score, code, row), in random order when `rng` is given."""
    rows, classes = np.nonzero(codes >= 0)
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    rows, classes = rows[order], classes[order]
    return classes, scores[rows, classes], codes[rows, classes], rows


@st.composite
def problems(draw):
    """Scores with many ties and codes with unknown entries, classes without positives and without labels."""
    num_rows, num_classes = draw(st.integers(0, 40)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 3, 10, 10_000]))
    values = rng.normal(scale=draw(st.sampled_from([1e-40, 1e-3, 1.0, 1e30])), size=levels).astype(np.float32)
    values[rng.random(levels) < 0.2] = 0.0
    values[rng.random(levels) < 0.2] = -0.0
    scores = rng.choice(values, size=(num_rows, num_classes))
    codes = rng.choice(
        np.array([1, 0, -1], np.int8),
        p=draw(st.sampled_from([[0.3, 0.7, 0], [0.2, 0.2, 0.6], [0.05, 0.05, 0.9]])),
        size=(num_rows, num_classes),
    )
    kind = rng.integers(0, 5, num_classes)
    codes[:, kind == 0] = np.minimum(codes[:, kind == 0], 0)
    codes[:, kind == 1] = np.where(codes[:, kind == 1] == 0, 1, codes[:, kind == 1])
    return scores, codes


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few entries, so that small arrays go through many of them."""
    for module in (entries, average_precision_module):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 7)


# --- golden values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        # The tie with its positive first, then with its negative first.
        ([1, 1, 0, 0, 0], [0.9, 0.8, 0.8, 0.3, 0.1], {"sklearn": 0.8333333333, "rank": 1.0, "voc": 1.0}),
        (
            [1, 0, 1, 0, 0],
            [0.9, 0.8, 0.8, 0.3, 0.1],
            {"sklearn": 0.8333333333, "rank": 0.8333333333, "voc": 0.8333333333},
        ),
        (
            [0, 1, 0, 1, 1, 0],
            [0.95, 0.9, 0.7, 0.6, 0.5, 0.2],
            {"sklearn": 0.5333333333, "rank": 0.5333333333, "voc": 0.6},
        ),
    ],
)
def test_golden_average_precision(labels, scores, expected, dtype):
    dense = np.array(scores, dtype)[:, None], np.array(labels, np.int8)[:, None]
    for definition, value in expected.items():
        assert average_precision(*dense, definition).ap[0] == pytest.approx(value, abs=1e-9), definition


def test_golden_threshold_metrics():
    codes = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], np.int8)
    p = np.array([[0.9, 0.6, 0.1], [0.4, 0.8, 0.2], [0.7, 0.9, 0.1], [0.2, 0.1, 0.3]])
    logits = np.log(p / (1 - p)).astype(np.float32)
    counts = count_at_threshold(logits, codes)
    assert counts.true_positives.tolist() == [1, 2, 0]
    assert counts.predicted.tolist() == [2, 3, 0]
    assert counts.positives.tolist() == [2, 2, 1]
    expected = {
        "OP": 0.6, "OR": 0.6, "OF1": 0.6, "CP": 0.3888888889, "CR": 0.5, "CF1": 0.4375, "CF1_mean": 0.4333333333,
    }  # fmt: skip
    assert counts.metrics() == pytest.approx(expected, abs=1e-9)
    report = evaluate_scores(logits, codes)
    assert {name: report[name] for name in expected} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}, abs=1e-7
    )


# --- against the definitions -----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_definition_on_random_problems(problem):
    scores, codes = problem
    result = average_precision(scores, codes)
    np.testing.assert_allclose(result.ap, sklearn_ap(scores, codes), rtol=0, atol=1e-12)
    assert (np.isnan(result.ap) == ~result.defined).all()
    assert result.positives.tolist() == (codes == 1).sum(0).tolist()
    assert result.negatives.tolist() == (codes == 0).sum(0).tolist()
    for definition in ("rank", "voc"):
        np.testing.assert_allclose(
            average_precision(scores, codes, definition).ap, slow_ap(scores, codes, definition), rtol=0, atol=1e-12
        )


@settings(max_examples=80, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_pairs_equal_dense_bit_for_bit_in_any_order(problem, seed):
    scores, codes = problem
    classes, score, code, row = pairs_of(scores, codes, np.random.default_rng(seed))
    for definition in DEFINITIONS:
        dense = average_precision(scores, codes, definition)
        pairs = average_precision_pairs(classes, score, code, scores.shape[1], definition, row=row)
        np.testing.assert_array_equal(pairs.ap, dense.ap)
        np.testing.assert_array_equal(pairs.positives, dense.positives)
        np.testing.assert_array_equal(pairs.negatives, dense.negatives)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_row_order_does_not_change_a_bit(problem, seed):
    scores, codes = problem
    order = np.random.default_rng(seed).permutation(len(scores))
    before, after = evaluate_scores(scores, codes), evaluate_scores(scores[order], codes[order])
    assert before == after


def test_without_ties_all_orders_of_the_tie_ordered_definitions_agree():
    rng = np.random.default_rng(0)
    scores = rng.permutation(np.arange(600, dtype=np.float32)).reshape(100, 6)
    codes = rng.integers(-1, 2, scores.shape).astype(np.int8)
    order = rng.permutation(100)
    for definition in ("rank", "voc"):
        np.testing.assert_array_equal(
            average_precision(scores, codes, definition).ap,
            average_precision(scores[order], codes[order], definition).ap,
        )
    np.testing.assert_allclose(
        average_precision(scores, codes, "rank").ap, average_precision(scores, codes).ap, rtol=0, atol=1e-12
    )
    assert (average_precision(scores, codes, "voc").ap >= average_precision(scores, codes).ap - 1e-12).all()


def test_pairs_without_rows_tie_in_input_order():
    classes, code = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 1])
    score = np.full(4, 0.5, np.float32)
    assert average_precision_pairs(classes, score, code, 2, "rank").ap.tolist() == [0.5, 1.0]
    assert average_precision_pairs(classes, score, code, 2, "rank", row=[7, 3, 9, 1]).ap.tolist() == [1.0, 0.5]


def test_rows_too_large_to_pack_give_the_same():
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 3, (50, 4)).astype(np.float32)
    codes = rng.integers(-1, 2, scores.shape).astype(np.int8)
    classes, score, code, row = pairs_of(scores, codes, rng)
    for definition in ("rank", "voc"):
        packed = average_precision_pairs(classes, score, code, 4, definition, row=row)
        wide = average_precision_pairs(classes, score, code, 4, definition, row=row + 2**40)
        np.testing.assert_array_equal(packed.ap, wide.ap)


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_small_blocks_change_nothing(problem):
    scores, codes = problem
    for definition in DEFINITIONS:
        blocked = average_precision(scores, codes, definition)
        classes, score, code, row = pairs_of(scores, codes)
        whole = average_precision_pairs(classes, score, code, scores.shape[1], definition, row=row)
        np.testing.assert_array_equal(blocked.ap, whole.ap)
    assert evaluate_scores(scores, codes, top_k=2)["OP_top2"] is not None


def test_known_entries_only():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(200, 5)).astype(np.float32)
    truth = (rng.random(scores.shape) < 0.3).astype(np.int8)
    codes = np.where(rng.random(scores.shape) < 0.5, truth, np.int8(-1))
    changed = np.where(codes < 0, np.float32(50), scores)
    for definition in DEFINITIONS:
        np.testing.assert_array_equal(
            average_precision(scores, codes, definition).ap, average_precision(changed, codes, definition).ap
        )
    before, after = count_at_threshold(scores, codes).metrics(), count_at_threshold(changed, codes).metrics()
    assert before == after
    as_negative = average_precision(changed, np.maximum(codes, 0)).mean()
    assert as_negative < average_precision(scores, codes).mean()


def test_infinities_zeros_and_tiny_scores_rank_as_floats_do():
    tiny = np.float32(1e-45)
    column = np.array([INF, 3.0, tiny, 0.0, -0.0, -tiny, -3.0, -INF], np.float32)
    codes = np.array([0, 1, 0, 1, 0, 1, 0, 1], np.int8)
    expected = (1 / 2 + 2 / 5 + 3 / 6 + 4 / 8) / 4
    for permutation in (np.arange(8), np.arange(8)[::-1], np.array([4, 1, 7, 3, 0, 6, 2, 5])):
        result = average_precision(column[permutation][:, None], codes[permutation][:, None])
        assert result.ap[0] == pytest.approx(expected, abs=1e-15)


def test_float_types():
    rng = np.random.default_rng(3)
    half = rng.normal(size=(100, 3)).astype(np.float16)
    codes = rng.integers(0, 2, half.shape).astype(np.int8)
    for definition in DEFINITIONS:
        expected = average_precision(half.astype(np.float32), codes, definition).ap
        np.testing.assert_array_equal(average_precision(half, codes, definition).ap, expected)
        np.testing.assert_array_equal(average_precision(half.astype(np.float64), codes, definition).ap, expected)
    # Two doubles that fp32 cannot tell apart still rank.
    close = np.array([[1.0], [1.0 + 1e-12]])
    assert average_precision(close, np.array([[0], [1]])).ap[0] == 1.0
    assert average_precision(close, np.array([[False], [True]])).ap[0] == 1.0


def test_strided_input_is_read_as_it_is():
    rng = np.random.default_rng(4)
    wide = rng.normal(size=(60, 20)).astype(np.float32)
    codes = rng.integers(0, 2, (20, 60)).astype(np.int8).T
    view = wide[::2, ::3]
    np.testing.assert_allclose(
        average_precision(view, codes[::2, ::3]).ap, sklearn_ap(view, codes[::2, ::3]), rtol=0, atol=1e-12
    )


# --- conventions -----------------------------------------------------------------------------------------------------


def four_classes() -> ClassAP:
    """AP 0.5 with both signs; AP 1 with positives alone; negatives alone; no label at all."""
    codes = np.array([[0, 1, 0, -1], [1, -1, 0, -1], [-1, 1, -1, -1]], np.int8)
    scores = np.array([[2, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    return average_precision(scores, codes)


@pytest.mark.parametrize(
    ("convention", "expected"),
    [("zero", 1.5 / 4), ("skip_unlabelled", 1.5 / 3), ("skip", 1.5 / 2), ("skip_one_sided", 0.5)],
)
def test_conventions_for_empty_classes(convention, expected):
    result = four_classes()
    np.testing.assert_array_equal(result.ap, [0.5, 1.0, np.nan, np.nan])
    assert result.mean(convention) == pytest.approx(expected, abs=1e-15)


def test_weighted_mean():
    assert four_classes().weighted_mean() == pytest.approx((0.5 * 1 + 1.0 * 2) / 3)
    assert math.isnan(average_precision(np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int8)).weighted_mean())


def test_report_has_both_means_and_the_numbers_of_classes():
    codes = np.array([[0, 1, 0, -1], [1, -1, 0, -1], [-1, 1, -1, -1]], np.int8)
    scores = np.array([[2, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    report = evaluate_scores(scores, codes)
    assert report["map"] == report["map_zero"] == pytest.approx(37.5)
    assert report["map_skipping"] == pytest.approx(75)
    assert report["map_skip_unlabelled"] == pytest.approx(50)
    assert report["map_skip_one_sided"] == pytest.approx(50)
    assert report["map_weighted"] == pytest.approx(250 / 3)
    assert report["per_class_ap"] == [50.0, 100.0, None, None]
    names = ("num_classes", "num_positives", "num_negatives")
    assert [report[n] for n in names] == [4, 3, 3]
    names = ("classes_without_positive", "classes_without_negative", "classes_without_label")
    assert [report[n] for n in names] == [2, 2, 1]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    partial = evaluate_scores(scores, codes, empty_classes="skip_unlabelled")
    assert partial["map"] == pytest.approx(50)
    classes, score, code, row = pairs_of(scores, codes)
    pairs = evaluate_pairs(classes, score, code, 4, row=row, in_top_k=top_k_mask(scores)[row, classes])
    assert pairs == partial


# --- threshold metrics -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([None, 1, 3]), st.booleans())
def test_threshold_counts_by_the_letter(problem, k, inclusive):
    scores, codes = problem
    known, positive = codes >= 0, codes == 1
    predicted = scores >= 0 if inclusive else scores > 0
    if k is not None:
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        allowed = np.zeros(scores.shape, bool)
        np.put_along_axis(allowed, order, True, axis=1)
        np.testing.assert_array_equal(top_k_mask(scores, k), allowed)
        predicted = predicted & allowed
    counts = count_at_threshold(scores, codes, inclusive=inclusive, top_k=k)
    assert counts.true_positives.tolist() == (predicted & positive).sum(0).tolist()
    assert counts.predicted.tolist() == (predicted & known).sum(0).tolist()
    assert counts.positives.tolist() == positive.sum(0).tolist()
    assert counts.known.tolist() == known.sum(0).tolist()
    classes, score, code, row = pairs_of(scores, codes)
    in_top_k = None if k is None else top_k_mask(scores, k)[row, classes]
    pairs = count_at_threshold_pairs(classes, score, code, scores.shape[1], inclusive=inclusive, in_top_k=in_top_k)
    for name in ("true_positives", "predicted", "positives", "known"):
        np.testing.assert_array_equal(getattr(pairs, name), getattr(counts, name))


def test_counts_of_parts_add_up():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(50, 4)).astype(np.float32)
    codes = rng.integers(-1, 2, scores.shape).astype(np.int8)
    whole = count_at_threshold(scores, codes).metrics()
    parts = count_at_threshold(scores[:20], codes[:20]) + count_at_threshold(scores[20:], codes[20:])
    assert parts.metrics() == whole


def test_top_three_takes_unknown_classes_into_the_ranking_but_not_into_the_counts():
    scores = np.array([[4, 3, 2, 1, -1]], np.float32)
    codes = np.array([[-1, 1, 0, 1, 0]], np.int8)
    counts = count_at_threshold(scores, codes, top_k=3)
    assert counts.predicted.tolist() == [0, 1, 1, 0, 0]
    assert counts.true_positives.tolist() == [0, 1, 0, 0, 0]


def test_classes_without_labels_are_not_in_class_means():
    scores = np.array([[1.0, 1.0]], np.float32)
    assert count_at_threshold(scores, np.array([[1, -1]], np.int8)).metrics()["CP"] == 1.0
    assert math.isnan(count_at_threshold(scores, np.array([[-1, -1]], np.int8)).metrics()["CP"])


def test_threshold_boundary():
    scores, codes = np.zeros((1, 1), np.float32), np.ones((1, 1), np.int8)
    assert count_at_threshold(scores, codes).predicted.tolist() == [0]
    assert count_at_threshold(scores, codes, inclusive=True).predicted.tolist() == [1]
    assert logit_threshold(0.5) == 0.0
    assert logit_threshold(0.8) == pytest.approx(math.log(4))
    with pytest.raises(UserError, match="between 0 and 1"):
        logit_threshold(1.0)


# --- groups, pseudo-labels -------------------------------------------------------------------------------------------


def test_groups_by_count():
    assert groups_by_count([9, 1, 5, 5, 0, 7], 3).tolist() == [2, 0, 1, 1, 0, 2]
    assert np.bincount(groups_by_count(np.arange(5000)[::-1], 5)).tolist() == [1000] * 5
    assert np.bincount(groups_by_count(np.zeros(7, int), 5)).tolist() == [2, 2, 1, 1, 1]
    assert groups_by_count(np.zeros(4, int), 2).tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="cannot be cut"):
        groups_by_count([1, 2], 5)


def test_group_means():
    result, groups = four_classes(), [1, 0, 1, -1]
    np.testing.assert_allclose(group_means(result, groups), [1.0, 0.25])
    np.testing.assert_allclose(group_means(result, groups, "skip"), [1.0, 0.5])
    np.testing.assert_array_equal(group_means(result, [0, 0, 2, 1], "skip"), [0.75, np.nan, np.nan])
    report = evaluate_pairs(
        [0, 1], np.zeros(2, np.float32), [1, 0], 3, groups=[0, 1, 2], empty_classes="skip_unlabelled"
    )
    assert [g["map"] for g in report["groups"]] == [100.0, 0.0, None]
    assert [g["map_zero"] for g in report["groups"]] == [100.0, 0.0, 0.0]
    assert [g["num_classes"] for g in report["groups"]] == [1, 1, 1]
    with pytest.raises(ValueError, match="groups"):
        group_means(result, [0, 1])


def test_selection_quality():
    assert selection_quality(3, 4, 6) == pytest.approx({"precision": 0.75, "recall": 0.5, "f1": 0.6})
    assert selection_quality(0, 0, 5) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    with pytest.raises(ValueError, match="cannot be"):
        selection_quality(5, 4, 9)


# --- empty and bad input ---------------------------------------------------------------------------------------------


def test_no_rows():
    report = evaluate_scores(np.empty((0, 3), np.float32), np.empty((0, 3), np.int8))
    assert report["map"] == 0.0
    assert report["map_skipping"] is None
    assert report["CP"] is None
    assert report["OP"] == 0.0
    assert report["classes_without_label"] == 3
    empty = np.empty(0, np.int64)
    for definition in DEFINITIONS:
        for row in (None, empty):
            result = average_precision_pairs(empty, np.empty(0, np.float32), empty, 3, definition, row=row)
            assert np.isnan(result.ap).all()


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_scores(np.full((3, 2), -INF), np.full((3, 2), -1, np.int8), groups=[0, 1])
        evaluate_scores(np.full((3, 5), INF), np.zeros((3, 5), bool))


def test_nan_scores_name_class_and_row():
    scores, codes = np.zeros((5, 3), np.float32), np.zeros((5, 3), np.int8)
    scores[3, 1] = np.nan
    for function in (average_precision, count_at_threshold, evaluate_scores):
        with pytest.raises(UserError, match=r"class 1 \(cat\) in row 3 is NaN"):
            function(scores, codes, class_names=["dog", "cat", "cow"])
    with pytest.raises(UserError, match="class 2 in row 8 is NaN"):
        average_precision_pairs([0, 2], np.array([0, np.nan], np.float32), [1, 1], 3, row=[4, 8])
    with pytest.raises(UserError, match="class 2 in pair 1 is NaN"):
        evaluate_pairs([0, 2], np.array([0, np.nan], np.float32), [1, 1], 3)


@pytest.mark.usefixtures("small_blocks")
def test_errors_name_the_row_across_chunks():
    scores, codes = np.zeros((50, 3), np.float32), np.zeros((50, 3), np.int8)
    codes[40, 2] = 2
    with pytest.raises(UserError, match="code of class 2 in row 40 is 2"):
        average_precision(scores, codes)
    scores[30, 1] = np.nan
    with pytest.raises(UserError, match="score of class 1 in row 30 is NaN"):
        count_at_threshold(scores, codes)


def test_bad_codes_and_classes():
    scores = np.zeros((2, 2), np.float32)
    with pytest.raises(UserError, match="code of class 0 in row 1 is -2"):
        average_precision(scores, np.array([[1, 0], [-2, 0]], np.int8))
    with pytest.raises(ValueError, match="label codes must be integers"):
        average_precision(scores, np.array([[1, np.nan], [0, 0]]))
    with pytest.raises(UserError, match="code of class 1 in pair 1 is 3"):
        average_precision_pairs([0, 1], scores[0], [0, 3], 2)
    with pytest.raises(UserError, match=r"pair 1 names class 2; the classes are 0\.\.1"):
        average_precision_pairs([0, 2], scores[0], [0, 1], 2)
    with pytest.raises(ValueError, match="negative row"):
        average_precision_pairs([0, 1], scores[0], [0, 1], 2, row=[0, -1])
    # An unknown pair is dropped, whatever its score ranks.
    for definition in DEFINITIONS:
        result = average_precision_pairs(
            [0, 0, 1, 0, 0],
            np.array([1, 2, 5, 3, 0], np.float32),
            [1, -1, -1, 0, -1],
            2,
            definition,
            row=[0, 1, 2, 3, 4],
        )
        np.testing.assert_array_equal(result.ap, [0.5, np.nan])
        assert (result.positives.tolist(), result.negatives.tolist()) == ([1, 0], [1, 0])


@pytest.mark.parametrize(
    ("scores", "codes"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.int8)),
        (np.zeros(3, np.float32), np.zeros(3, np.int8)),
        (np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int8)),
        (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int8)),
    ],
)
def test_bad_shapes_and_types(scores, codes):
    with pytest.raises(ValueError):
        average_precision(scores, codes)
    with pytest.raises(ValueError):
        count_at_threshold(scores, codes)


def test_bad_pairs_and_choices():
    with pytest.raises(ValueError, match=r"must be \[M\]"):
        average_precision_pairs([0, 1], np.zeros(3, np.float32), [0, 1], 2)
    with pytest.raises(ValueError, match="in_top_k"):
        count_at_threshold_pairs([0], np.zeros(1, np.float32), [1], 1, in_top_k=[1])
    scores, codes = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int8)
    with pytest.raises(UserError, match="definition is 'coco'; choose one of sklearn, rank, voc"):
        average_precision(scores, codes, "coco")
    with pytest.raises(UserError, match="empty_classes is 'drop'"):
        evaluate_scores(scores, codes, empty_classes="drop")


@pytest.mark.parametrize("known", [1.0, 0.01])
def test_memory_stays_bounded(known, monkeypatch):
    for module in (entries, average_precision_module):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 1 << 16)
    rng = np.random.default_rng(6)
    scores = rng.standard_normal((8192, 256), dtype=np.float32)
    codes = np.where(rng.random(scores.shape) < known, (scores > 1).astype(np.int8), np.int8(-1))
    tracemalloc.start()
    try:
        evaluate_scores(scores, codes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < scores.nbytes


def test_groups_of_partly_known_classes_against_scikit_learn():
    """Many classes, few labels each: every class, both conventions for classes without positives, and group means."""
    num_classes, rng = 400, np.random.default_rng(3)
    share = 1 / np.arange(1, num_classes + 1)
    keys = np.unique(rng.integers(0, 2000, 6000) * num_classes + rng.choice(num_classes, 6000, p=share / share.sum()))
    row, class_id = np.divmod(keys, num_classes)
    code = (rng.random(len(keys)) < 0.6).astype(np.int8)
    score = rng.standard_normal(len(keys), dtype=np.float32) + code
    training = rng.poisson(50 * share * len(keys) / share.sum())
    groups = groups_by_count(training, 5)
    expected = np.full(num_classes, np.nan)
    labelled = np.bincount(class_id, minlength=num_classes) > 0
    for c in np.unique(class_id[code == 1]):
        expected[c] = average_precision_score(code[class_id == c], score[class_id == c])
    report = evaluate_pairs(class_id, score, code, num_classes, row=row, groups=groups)
    found = np.array([np.nan if v is None else v for v in report["per_class_ap"]])
    np.testing.assert_allclose(found, 100 * expected, rtol=0, atol=1e-10)
    assert report["classes_without_label"] > 0 and np.isnan(expected[labelled]).any()
    for g, group in enumerate(report["groups"]):
        inside = expected[groups == g]
        assert group["num_classes"] == 80 and training[groups == g].max() <= training[groups > g].min(initial=10**9)
        assert group["map_zero"] == pytest.approx(100 * np.nan_to_num(inside).mean())
        assert group["map_skipping"] == pytest.approx(100 * np.nanmean(inside))
        kept = np.nan_to_num(expected)[(groups == g) & labelled]
        assert group["map"] == group["map_skip_unlabelled"] == pytest.approx(100 * kept.mean())

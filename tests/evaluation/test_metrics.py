"""The report of all metrics: conventions for empty classes, groups, selections."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from spml_fast.core.errors import UserError
from spml_fast.evaluation.average_precision import average_precision
from spml_fast.evaluation.metrics import (
    evaluate_pairs,
    evaluate_scores,
    group_means,
    groups_by_count,
    selection_quality,
)
from spml_fast.evaluation.thresholds import top_k_mask
from tests.support.metrics import four_classes, pairs_of


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


def test_groups_by_count():
    assert groups_by_count([9, 1, 5, 5, 0, 7], 3).tolist() == [2, 0, 1, 1, 0, 2]
    assert np.bincount(groups_by_count(np.arange(5000)[::-1], 5)).tolist() == [1000] * 5
    assert np.bincount(groups_by_count(np.zeros(7, int), 5)).tolist() == [2, 2, 1, 1, 1]
    assert groups_by_count(np.zeros(4, int), 2).tolist() == [0, 0, 1, 1]
    assert groups_by_count([3, 1, 2], 3).tolist() == [2, 0, 1] and groups_by_count([3, 1], 1).tolist() == [0, 0]
    for number in (5, 3, 0):
        with pytest.raises(UserError, match="cannot be cut"):
            groups_by_count([1, 2], number)
    for counts in ([1.0, 2.0], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match="counts"):
            groups_by_count(counts, 2)


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
    assert len(group_means(result, [0, 0, 0, 0])) == 1 and len(group_means(result, [-1, -1, -1, -1])) == 0
    assert len(evaluate_scores(np.zeros((1, 2), np.float32), np.ones((1, 2), int), groups=[0, 0])["groups"]) == 1
    with pytest.raises(ValueError, match="groups"):
        group_means(result, [0, 1])


def test_no_classes_are_one_group():
    assert groups_by_count(np.empty(0, int), 1).tolist() == []
    with pytest.raises(UserError, match="0 classes cannot be cut into 2 groups"):
        groups_by_count(np.empty(0, int), 2)


def test_a_threshold_and_whether_it_counts_are_two_things():
    """Of the scores 0, 1 and 2 the threshold 1 predicts one, or two where it counts itself."""
    scores, codes = np.array([[0.0], [1.0], [2.0]], np.float32), np.array([[1], [1], [1]])
    for inclusive, expected in ((False, 1 / 3), (True, 2 / 3)):
        found = evaluate_scores(scores, codes, threshold=1.0, inclusive=inclusive)
        assert found["OR"] == found["OR_top3"] == pytest.approx(100 * expected)
        pairs = evaluate_pairs([0, 0, 0], scores[:, 0], codes[:, 0], 1, threshold=1.0, inclusive=inclusive)
        assert pairs["OR"] == found["OR"]


def test_a_convention_that_does_not_exist_is_refused():
    scores, codes = np.zeros((2, 1), np.float32), np.array([[1], [0]])
    for refused in (
        lambda: evaluate_scores(scores, codes, empty_classes="none"),
        lambda: evaluate_pairs([0, 0], scores[:, 0], codes[:, 0], 1, empty_classes="none"),
    ):
        with pytest.raises(UserError, match="empty_classes is 'none'; choose one of zero, "):
            refused()


def test_selection_quality():
    assert selection_quality(3, 4, 6) == pytest.approx({"precision": 0.75, "recall": 0.5, "f1": 0.6})
    assert selection_quality(0, 0, 5) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    with pytest.raises(ValueError, match="cannot be"):
        selection_quality(5, 4, 9)


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
    ap = np.array([np.nan if v is None else v for v in report["per_class_ap"]])
    np.testing.assert_allclose(ap, 100 * expected, rtol=0, atol=1e-10)
    assert report["classes_without_label"] > 0 and np.isnan(expected[labelled]).any()
    for g, group in enumerate(report["groups"]):
        inside = expected[groups == g]
        assert group["num_classes"] == 80 and training[groups == g].max() <= training[groups > g].min(initial=10**9)
        assert group["map_zero"] == pytest.approx(100 * np.nan_to_num(inside).mean())
        assert group["map_skipping"] == pytest.approx(100 * np.nanmean(inside))
        kept = np.nan_to_num(expected)[(groups == g) & labelled]
        assert group["map"] == group["map_skip_unlabelled"] == pytest.approx(100 * kept.mean())

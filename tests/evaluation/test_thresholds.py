"""Counts at a threshold and over each image's top k."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.core.errors import UserError
from spml_fast.evaluation.metrics import (
    evaluate_scores,
)
from spml_fast.evaluation.thresholds import count_at_threshold, count_at_threshold_pairs, logit_threshold, top_k_mask
from tests.support.metrics import pairs_of, problems


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
    for probability in (1.0, 0.0, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            logit_threshold(probability)


def test_top_k_needs_a_place_and_takes_all_classes_where_there_are_no_more():
    scores = np.array([[1, 1, 0], [0, 2, 1]], np.float32)
    assert top_k_mask(scores, 1).tolist() == [[True, False, False], [False, True, False]]
    assert top_k_mask(scores, 2).tolist() == [[True, True, False], [False, True, True]]
    assert top_k_mask(scores, 3).all() and top_k_mask(scores, 4).all()
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        top_k_mask(scores, 0)


def test_marks_of_the_top_k_are_bool_and_one_for_each_pair():
    pairs = [0, 1], np.zeros(2, np.float32), [1, 0], 2
    for marks in ([1, 0], [True], [[True, False]]):
        with pytest.raises(ValueError, match="in_top_k must be bool"):
            count_at_threshold_pairs(*pairs, in_top_k=marks)
    assert count_at_threshold_pairs(*pairs, inclusive=True, in_top_k=[True, False]).predicted.tolist() == [1, 0]


def test_three_places_and_a_strict_threshold_unless_something_else_is_asked_for():
    scores = np.array([[3.0, 0.0, 1.0, 2.0]], np.float32)
    assert top_k_mask(scores).tolist() == [[True, False, True, True]]
    codes = np.ones((1, 4), np.int8)
    assert count_at_threshold(scores, codes).predicted.tolist() == [1, 0, 1, 1]
    pairs = count_at_threshold_pairs(np.arange(4), scores[0], codes[0], 4)
    assert pairs.predicted.tolist() == [1, 0, 1, 1]

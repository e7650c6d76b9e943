"""Empty and bad input to the metrics."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.evaluation import average_precision as average_precision_module
from spml_fast.evaluation import entries
from spml_fast.evaluation.average_precision import average_precision, average_precision_pairs
from spml_fast.evaluation.metrics import (
    evaluate_pairs,
    evaluate_scores,
)
from spml_fast.evaluation.thresholds import count_at_threshold, count_at_threshold_pairs
from tests.support.metrics import DEFINITIONS, INF


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
    with pytest.raises(UserError, match="class 1 in row 3 is NaN"):
        average_precision(scores, codes, class_names=["dog"])
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
    # The first wrong one is named; -1 is none.
    for codes, wrong in (([-1, 1, 2, 0], 2), ([1, -2, 0, -1], 1), ([3, -1, 0, 1], 0)):
        with pytest.raises(UserError, match=f"code of class {wrong} in pair {wrong} is {codes[wrong]};"):
            average_precision_pairs(range(4), np.zeros(4, np.float32), codes, 4)
        with pytest.raises(UserError, match=f"code of class {wrong} in row 0 is {codes[wrong]};"):
            average_precision(np.zeros((1, 4), np.float32), np.array([codes]))
        with pytest.raises(UserError, match=f"code of class 0 in row {wrong} is {codes[wrong]};"):
            average_precision(np.zeros((4, 1), np.float32), np.array(codes)[:, None])
    for wrong in (2, -1):
        with pytest.raises(UserError, match=rf"pair 1 names class {wrong}; the classes are 0\.\.1"):
            average_precision_pairs([0, wrong], scores[0], [0, 1], 2)
    with pytest.raises(ValueError, match="pair 1 has the negative row -1"):
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


def test_runs_of_rows_and_classes(monkeypatch):
    for module in (entries, average_precision_module):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 7)
    assert list(entries.row_chunks(7, 3)) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(entries.row_chunks(3, 8)) == [(0, 1), (1, 2), (2, 3)] and list(entries.row_chunks(0, 3)) == []
    assert list(entries.row_chunks(9, 0)) == [(0, 7), (7, 9)]
    # At most seven known entries together, and a class with more for itself.
    blocks = average_precision_module._class_blocks(np.array([3, 4, 1, 0, 9, 2, 5, 1]))
    assert list(blocks) == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    assert list(average_precision_module._class_blocks(np.array([9, 8]))) == [(0, 1), (1, 2)]


def test_fractions_of_nothing():
    assert entries.ratio(3, 4) == 0.75 and entries.ratio(0, 0) == 0.0
    assert entries.ratios(np.array([3, 0, 1]), np.array([4, 0, 1])).tolist() == [0.75, 0.0, 1.0]
    assert entries.harmonic(0.5, 0.25) == pytest.approx(1 / 3) and entries.harmonic(0.0, 0.0) == 0.0
    assert entries.per_cent(0.125) == 12.5 and entries.per_cent(float("nan")) is None


def test_codes_may_be_bool_or_unsigned():
    scores, truth = np.array([[2, 1], [1, 2], [0, 3]], np.float32), np.array([[1, 0], [0, 1], [1, 0]])
    expected = average_precision(scores, truth.astype(np.int8)).ap
    for dtype in (np.bool_, np.uint8, np.int64):
        codes = truth.astype(dtype)
        np.testing.assert_array_equal(average_precision(scores, codes).ap, expected)
        pairs = np.tile([0, 1], 3), scores.ravel(), codes.ravel(), 2
        np.testing.assert_array_equal(average_precision_pairs(*pairs).ap, expected)


def test_bad_pairs_and_choices():
    with pytest.raises(ValueError, match=r"must be \[M\]"):
        average_precision_pairs([0, 1], np.zeros(3, np.float32), [0, 1], 2)
    with pytest.raises(ValueError, match="scores must be float32"):
        average_precision_pairs([0, 1], [1, 2], [0, 1], 2)
    with pytest.raises(ValueError, match="label codes must be integers"):
        average_precision_pairs([0, 1], np.zeros(2, np.float32), [0.0, 1.0], 2)
    with pytest.raises(ValueError, match="at least one class"):
        average_precision_pairs(np.empty(0, int), np.empty(0, np.float32), np.empty(0, int), 0)
    for class_id, row in (([0.0, 1.0], None), ([0, 1], [0.0, 1.0])):
        with pytest.raises(ValueError, match="class ids and rows must be integers"):
            average_precision_pairs(class_id, np.zeros(2, np.float32), [0, 1], 2, row=row)
    with pytest.raises(ValueError, match="in_top_k"):
        count_at_threshold_pairs([0], np.zeros(1, np.float32), [1], 1, in_top_k=[1])
    scores, codes = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.int8)
    with pytest.raises(UserError, match="definition is 'coco'; choose one of sklearn, rank, voc"):
        average_precision(scores, codes, "coco")
    with pytest.raises(UserError, match="empty_classes is 'drop'"):
        evaluate_scores(scores, codes, empty_classes="drop")

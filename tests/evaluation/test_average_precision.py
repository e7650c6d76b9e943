"""Average precision: golden values, equality with scikit-learn and with the letter, invariances."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.core.errors import UserError
from spml_fast.evaluation import average_precision as average_precision_module
from spml_fast.evaluation import entries
from spml_fast.evaluation.average_precision import average_precision, average_precision_pairs
from spml_fast.evaluation.metrics import (
    evaluate_scores,
)
from spml_fast.evaluation.thresholds import count_at_threshold
from tests.support.metrics import DEFINITIONS, INF, pairs_of, problems, sklearn_ap, slow_ap


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
        for values in (score, score.astype(np.float64)):
            whole = average_precision_pairs(classes, values, code, scores.shape[1], definition, row=row)
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


@pytest.mark.parametrize("definition", ["rank", "voc"])
@pytest.mark.parametrize("largest", [2**30 - 1, 2**30])
def test_keys_that_just_fit_and_just_do_not(definition, largest):
    """Of 64 bits a class takes 1 here, a score 32, a label 1: 30 are left for the row."""
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 4, (40, 2)).astype(np.float32)
    codes = rng.integers(0, 2, scores.shape).astype(np.int8)
    classes, score, code, row = pairs_of(scores, codes, rng)
    far = np.where(row == 39, largest, row)
    found = average_precision_pairs(classes, score, code, 2, definition, row=far)
    np.testing.assert_array_equal(found.ap, average_precision(scores, codes, definition).ap)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64])
def test_class_ids_of_any_integer_type(definition, dtype):
    """A block that begins with a class which their type cannot hold has no pairs."""
    rng = np.random.default_rng(2)
    class_id = rng.choice([3, 127], 40).astype(dtype)
    score, code = rng.random(40, np.float32), rng.integers(0, 2, 40)
    expected = average_precision_pairs(class_id.astype(np.int64), score, code, 500, definition)
    found = average_precision_pairs(class_id, score, code, 500, definition)
    np.testing.assert_array_equal(found.ap, expected.ap)
    assert np.flatnonzero(found.labelled).tolist() == [3, 127]


def test_pairs_without_a_label_leave_the_order_of_the_others():
    """Rows order ties among what is known, and without rows the input does, wherever unknown pairs stand."""
    score, codes = np.full(4, 0.5, np.float32), np.array([-1, 0, 1, 1], np.int8)
    classes, rows = np.zeros(4, int), [0, 9, 1, 5]
    by_row = average_precision_pairs(classes, score, codes, 1, "rank", row=rows)
    assert by_row.ap.tolist() == [1.0] and by_row.negatives.tolist() == [1]
    assert average_precision_pairs(classes, score, codes, 1, "rank").ap[0] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_definitions_and_conventions_that_do_not_exist_are_refused():
    scores, codes = np.zeros((2, 1), np.float32), np.array([[1], [0]], np.int8)
    for refused in (
        lambda: average_precision(scores, codes, "mean"),
        lambda: average_precision_pairs([0, 0], scores[:, 0], codes[:, 0], 1, "mean"),
    ):
        with pytest.raises(UserError, match="definition is 'mean'; choose one of sklearn, rank, voc"):
            refused()
    with pytest.raises(UserError, match="empty_classes is 'none'; choose one of zero, "):
        average_precision(scores, codes).included("none")

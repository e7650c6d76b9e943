"""Thresholds of classes: against trying every threshold, ties, few labels, and what cannot be decided."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spml_fast.core.errors import UserError
from spml_fast.evaluation.calibration import Calibration, entries_of_scores, reliability
from spml_fast.evaluation.decisions import (
    DecisionOptions,
    Decisions,
    best_threshold,
    choose_decisions,
    decisions_of_metadata,
    threshold_figures,
    threshold_logits,
)

# Few values, so that many are equal; within the limits of thresholds.
ENTRIES = st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=1, max_size=40)


def every_threshold(logit: np.ndarray, positive: np.ndarray) -> list[tuple[float, float, float, int]]:
    """(F1, precision, recall, predictions) of every set that a threshold can predict, the smallest first."""
    out = []
    for edge in sorted(set(logit.tolist()), reverse=True):
        predicted = logit >= edge
        hits = int((predicted & positive).sum())
        f1 = 2 * hits / (int(predicted.sum()) + int(positive.sum()))
        out.append((f1, hits / int(predicted.sum()), hits / max(int(positive.sum()), 1), int(predicted.sum())))
    return out


@given(ENTRIES, st.sampled_from([None, 0.2, 0.5, 2 / 3, 0.9, 1.0]))
def test_against_trying_every_threshold(entries: list[tuple[int, bool]], precision: float | None) -> None:
    logit, positive = (np.array(column) for column in zip(*entries, strict=True))
    edge = best_threshold(logit.astype(np.float64), positive, precision)
    tried = every_threshold(logit, positive) if positive.any() else []
    if precision is None:
        best = max(tried, key=lambda t: (t[0], -t[3]), default=None)
    else:
        best = max((t for t in tried if t[1] >= precision), key=lambda t: (t[2], -t[3]), default=None)
    if best is None:
        assert edge == math.inf
        return
    assert int((logit >= edge).sum()) == best[3]
    figures = threshold_figures(logit, positive, edge)
    assert [figures[n] for n in ("f1", "precision", "recall")] == [pytest.approx(100 * v) for v in best[:3]]
    gaps = [(a + b) / 2 for a, b in pairwise(sorted(set(logit.tolist())))]
    assert edge in gaps or edge < logit.min(), "half way between two logits, or below all"


def test_equal_logits_are_predicted_together() -> None:
    logit, positive = np.array([2.0, 1.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False, False])
    assert best_threshold(logit, positive) == 1.5, "1 of 1 (F1 2/3), not 2 of 4 (F1 2/3): the fewer predictions"
    assert best_threshold(logit, positive, 0.5) == 0.5
    assert best_threshold(np.zeros(4), np.array([True, False, False, False]), 0.5) == math.inf
    assert best_threshold(np.empty(0), np.empty(0, bool)) == math.inf


def test_thresholds_keep_a_distance_from_one() -> None:
    edge = best_threshold(np.array([90.0, 80.0, 70.0]), np.array([True, True, False]))
    # All three are 25 there, and are predicted together.
    assert 24.99 < edge < 25.0 and 1 / (1 + math.exp(-edge)) < 1


def scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and codes [200, 4]: classes of other base rates; class 2 has few positives, class 3 no label."""
    rng = np.random.default_rng(seed)
    codes = (rng.random((200, 4)) < np.array([0.5, 0.2, 0.02, 0.3])).astype(np.int8)
    logits = rng.normal(3 * codes - np.array([1, 2, 2, 2]), 1.5)
    codes[:, 3] = -1
    codes[::3, 0] = -1
    return logits.astype(np.float32), codes


NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize("precision", [None, 0.9])
def test_every_class_its_own_and_few_labels_the_pooled_one(precision: float | None) -> None:
    logits, codes = scores()
    entries = entries_of_scores(logits, codes)
    rule = "f1" if precision is None else "precision"
    options = DecisionOptions(rule, precision)  # type: ignore[arg-type]
    decisions, figures = choose_decisions(entries, 5.0, options, NAMES)
    rows = figures["classes"]
    assert [row["from"] for row in rows] == ["class", "class", "pooled", "pooled"]
    assert [row["positives"] for row in rows] == (codes == 1).sum(0).tolist()
    assert [row["negatives"] for row in rows] == (codes == 0).sum(0).tolist()
    common = figures["pooled"]["threshold_probability"]
    assert rows[2]["threshold_probability"] == rows[3]["threshold_probability"] == common
    known = codes >= 0
    tried = every_threshold(logits[known], codes[known] == 1)
    if precision is None:
        assert figures["pooled"]["f1"] == pytest.approx(100 * max(t[0] for t in tried))
    else:
        assert figures["pooled"]["recall"] == pytest.approx(100 * max(t[2] for t in tried if t[1] >= precision))
        assert all(row["precision"] >= 90 for row in rows[:2])
    margins = decisions.margins(logits)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert np.array_equal(margins >= 0, probability >= decisions.threshold)
    for c in range(2):
        predicted, positive = (margins[:, c] >= 0) & (codes[:, c] >= 0), codes[:, c] == 1
        assert rows[c]["precision"] == pytest.approx(100 * (predicted & positive).sum() / predicted.sum())
    assert json.loads(json.dumps(figures)) == figures


def test_a_precision_that_no_threshold_has_is_never_predicted() -> None:
    logits, codes = scores()
    codes[:, 1] = np.where(logits[:, 1] == logits[:, 1].max(), 0, np.arange(200) % 2)
    logits[:, 1] = -np.arange(200)
    codes[:2, 1] = 0
    options = DecisionOptions("precision", 0.95)
    decisions, figures = choose_decisions(entries_of_scores(logits, codes), 1.0, options, NAMES)
    assert figures["classes"][1]["threshold_probability"] is None and figures["classes"][1]["recall"] == 0
    assert figures["classes"][1]["precision"] is None, "nothing is predicted"
    assert decisions.threshold[1] == math.inf and (decisions.margins(logits)[:, 1] < 0).all()
    again = decisions_of_metadata({**decisions.metadata(), "alpha": "1"}, 4)
    assert again is not None and np.array_equal(again.threshold, decisions.threshold)


def test_thresholds_are_of_calibrated_probabilities() -> None:
    logits, codes = scores()
    entries = entries_of_scores(logits, codes)
    plain, before = choose_decisions(entries, 1.0, DecisionOptions(), NAMES)
    fitted, after = choose_decisions(entries, 1.0, DecisionOptions(calibration="per-class"), NAMES)
    assert fitted.calibrated and not plain.calibrated and "after" not in before["calibration"]
    assert after["calibration"]["after"]["log_loss"] < after["calibration"]["before"]["log_loss"]
    for c in range(2):
        assert before["classes"][c]["f1"] == pytest.approx(after["classes"][c]["f1"]), "a class keeps its order"
        assert np.array_equal(plain.margins(logits)[:, c] >= 0, fitted.margins(logits)[:, c] >= 0)
        assert fitted.threshold[c] != plain.threshold[c]
    read = decisions_of_metadata({**fitted.metadata(), "alpha": "1"}, 4)
    assert read is not None and np.array_equal(read.margins(logits), fitted.margins(logits))


@pytest.mark.parametrize(("code", "what"), [(1, "negatives"), (0, "positives"), (-1, "positives")])
def test_labels_of_one_kind_decide_nothing(code: int, what: str) -> None:
    """Single positive labels have no known negatives."""
    logits, codes = scores()
    codes = np.where(codes == 1, code, -1) if code != 0 else np.zeros_like(codes)
    with pytest.raises(UserError, match=f"no known {what} among .* so nothing tells how precise"):
        choose_decisions(entries_of_scores(logits, codes), 1.0, DecisionOptions(), NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": "precision"}, "give --precision"),
        ({"precision": 0.9}, "belongs to --thresholds precision"),
        ({"thresholds": "precision", "precision": 0.0}, "greater than 0 and at most 1"),
        ({"thresholds": "precision", "precision": 90.0}, "precision is 90"),
        ({"thresholds": "best"}, "choose one of f1, precision"),
        ({"calibration": "platt"}, "choose one of none, temperature, per-class"),
        ({"min_labels": 0}, "at least 1"),
    ],
)
def test_options_without_meaning(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DecisionOptions(**options)  # type: ignore[arg-type]


def test_options_at_their_limits() -> None:
    assert DecisionOptions("precision", 1.0).precision == 1 and DecisionOptions(min_labels=1).min_labels == 1


def test_an_entry_at_the_threshold_is_predicted() -> None:
    found = threshold_figures(np.array([0.0, 1.0, -1.0]), np.array([True, True, False]), 0.0)
    assert found == {"f1": 100.0, "precision": 100.0, "recall": 100.0, "positives": 2, "negatives": 1}


def test_just_enough_labels_are_enough() -> None:
    """Class a has two known labels of each kind, class b two positives and one negative."""
    logits = np.array([[2.0, 2.0], [1.0, 1.0], [-1.0, 0.0], [-2.0, -1.0]])
    codes = np.array([[1, 1], [1, 1], [0, 0], [0, -1]])
    figures = choose_decisions(entries_of_scores(logits, codes), 1.0, DecisionOptions(min_labels=2), NAMES[:2])[1]
    assert [row["from"] for row in figures["classes"]] == ["class", "pooled"]
    known = codes >= 0
    assert figures["calibration"]["before"] == reliability(logits.T[known.T], codes.T[known.T] == 1)


@pytest.mark.parametrize(("labels", "source"), [(10, "class"), (9, "pooled")])
def test_ten_labels_of_each_kind_are_enough_unless_something_else_is_asked_for(labels: int, source: str) -> None:
    logits = np.linspace(-1, 1, 2 * labels)[:, None]
    entries = entries_of_scores(logits, (logits > 0).astype(np.int8))
    (row,) = choose_decisions(entries, 1.0, DecisionOptions(), NAMES[:1])[1]["classes"]
    assert row["from"] == source


@pytest.mark.parametrize(
    "change",
    [
        {"threshold_probability": "[0.5]"},
        {"threshold_probability": "[0.5, 0]"},
        {"threshold_probability": "[0.5, 1]"},
        {"threshold_probability": "[0.5]", "calibration": '{"kind": "temperature", "scale": [1], "shift": [0]}'},
        {"calibration": '{"kind": "guess", "scale": [1, 1], "shift": [0, 0]}'},
        {"calibration": '{"kind": "temperature", "scale": [1, 0], "shift": [0, 0]}'},
        {"calibration": '{"kind": "temperature", "scale": [1, Infinity], "shift": [0, 0]}'},
        {"calibration": '{"kind": "per-class", "scale": [1, 1], "shift": [0, Infinity]}'},
        {"calibration": '{"kind": "per-class", "scale": [1, 1], "shift": [0, NaN]}'},
        {"alpha": "0"},
        {"alpha": "-5"},
        {"threshold_probability": "[0.5, 1.5]"},
        {"threshold_probability": "[0.5, NaN]"},
        {"calibration": '{"kind": "guess"}'},
        {"calibration": '{"kind": "temperature", "scale": [1, -1], "shift": [0, 0]}'},
        {"calibration": '{"kind": "temperature"}'},
        {"calibration": "[]"},
    ],
)
def test_damaged_metadata(change: dict[str, str]) -> None:
    good = {"threshold_probability": "[0.5, null]", "calibration": '{"kind": "none"}', "alpha": "5"}
    found = decisions_of_metadata(good, 2)
    assert found is not None and found.alpha == 5 and found.threshold.tolist() == [0.5, math.inf]
    with pytest.raises((KeyError, TypeError, ValueError)):
        decisions_of_metadata({**good, **change}, 2)
    assert decisions_of_metadata({"alpha": "5"}, 2) is None
    assert found.calibration.scale.tolist() == [1.0, 1.0] and found.calibration.shift.tolist() == [0.0, 0.0]
    plain = decisions_of_metadata({name: value for name, value in good.items() if name != "alpha"}, 2)
    assert plain is not None and plain.alpha == 1, "where no factor is named it is 1"


def test_logits_of_thresholds() -> None:
    found = threshold_logits(np.array([0.5, 0.9, math.inf]))
    assert found == pytest.approx([0, math.log(9), math.inf])
    decisions = Decisions(1.0, np.array([0.5, 0.9]), Calibration("temperature", np.full(2, 0.5), np.zeros(2)))
    assert decisions.margins([[0.0, 4.0]])[0] == pytest.approx([0, 2 - math.log(9)])
    assert decisions.margins([4.0], [1]) == pytest.approx([2 - math.log(9)])


def test_logits_beyond_the_limit_are_one_and_a_precision_is_kept():
    logit, positive = np.array([300.0, 200, 150, 120, -5]), np.array([True, True, False, False, False])
    # Four entries whose thresholds would be the same: two of them are right.
    assert best_threshold(logit, positive, 0.9) == math.inf
    edge = best_threshold(logit, positive, 0.5)
    assert -5 < edge <= 25 and positive[logit >= edge].mean() == 0.5

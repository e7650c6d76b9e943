"""Calibration: known temperatures, scales and shifts come back, unknown labels say nothing, the figures are right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.evaluation.calibration import (
    KnownEntries,
    entries_of_pairs,
    entries_of_scores,
    fit_calibration,
    fit_scale_and_shift,
    fit_temperature,
    log_loss,
    reliability,
    uncalibrated,
)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def drawn(seed: int, size: tuple[int, int], scale: object = 1.0, shift: object = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, C], and labels that are positive with probability sigmoid(scale x logit + shift)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-0.5, 2, size)
    return logits, (rng.random(size) < sigmoid(np.asarray(scale) * logits + np.asarray(shift))).astype(np.int8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_comes_back(temperature: float) -> None:
    logits, codes = drawn(1, (20_000, 4), 1 / temperature)
    assert fit_temperature(logits.ravel(), codes.ravel() == 1) == pytest.approx(temperature, rel=0.03)
    fitted = fit_calibration(entries_of_scores(logits, codes), "temperature")
    assert np.allclose(fitted.scale, 1 / temperature, rtol=0.03) and not fitted.shift.any()


def test_scales_and_shifts_of_classes_come_back() -> None:
    scale, shift = np.array([0.7, 1.0, 1.4]), np.array([-1.0, 0.5, 2.0])
    logits, codes = drawn(2, (15_000, 3), scale, shift)
    fitted = fit_calibration(entries_of_scores(logits, codes), "per-class")
    assert fitted.scale == pytest.approx(scale, rel=0.08) and fitted.shift == pytest.approx(shift, abs=0.12)
    assert fitted.logits(logits) == pytest.approx(logits * fitted.scale + fitted.shift)
    assert fitted.logits(logits[:, 1], np.ones(len(logits), int)) == pytest.approx(fitted.logits(logits)[:, 1])


def test_few_labels_are_drawn_to_all_classes_and_none_gives_just_those() -> None:
    """Class 0 has 3,000 labels, class 1 eight that all say otherwise, class 2 none."""
    logits, codes = drawn(3, (3000, 3), 1.0, -1.0)
    codes[8:, 1] = codes[:, 2] = -1
    codes[:8, 1] = 1
    entries = entries_of_scores(logits, codes)
    fitted = fit_calibration(entries, "per-class")
    pooled = fit_scale_and_shift(*entries.pooled())
    assert (fitted.scale[2], fitted.shift[2]) == pooled, "to the last bit"
    # A standard deviation of a quarter for the logarithm of the scale, of 1 for the shift.
    drawn_to = fit_scale_and_shift(*entries.of_class(1), pooled, (0.25, 1.0))
    assert (fitted.scale[1], fitted.shift[1]) == pytest.approx(drawn_to)
    alone = fit_scale_and_shift(*entries.of_class(1))
    assert pooled[1] < fitted.shift[1] < pooled[1] + 3 < alone[1], "alone it would say that all are positive"
    assert abs(fitted.shift[0] - pooled[1]) < 0.1


def test_the_fit_is_the_maximum() -> None:
    logits, codes = drawn(4, (500, 1), 1.5, 0.7)
    z, y = logits.ravel(), codes.ravel() == 1
    scale, shift = fit_scale_and_shift(z, y)
    best = log_loss(scale * z + shift, y)
    for a, b in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert log_loss((scale + a) * z + shift + b, y) > best
    temperature = fit_temperature(z, y)
    assert all(log_loss(z / (temperature + d), y) > log_loss(z / temperature, y) for d in (-0.01, 0.01))


def test_labels_that_a_threshold_separates_give_finite_numbers() -> None:
    z, y = np.array([-3.0, -2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert 0 < fit_temperature(z, y) < 1
    scale, shift = fit_scale_and_shift(z, y)
    assert math.isfinite(scale) and math.isfinite(shift) and scale > 1
    assert all(math.isfinite(v) for v in fit_scale_and_shift(np.array([1e30, -1e30]), np.array([False, True])))


def test_the_scale_stays_between_a_twentieth_and_twenty() -> None:
    """Labels that tiny logits separate ask for an infinite scale, the other way round for none."""
    z, y = np.array([-0.01, -0.01, 0.01, 0.01]), np.array([False, False, True, True])
    for logit, expected in ((z, 20.0), (-z, 0.05)):
        assert 1 / fit_temperature(logit, y) == pytest.approx(expected, rel=1e-3)
        assert fit_scale_and_shift(logit, y)[0] == pytest.approx(expected, rel=1e-3)
    # The shift within 20 of nothing, however far off the logits are.
    for sign in (1, -1):
        found = fit_scale_and_shift(np.full(3, -1000.0 * sign), np.full(3, sign == 1))
        assert found == pytest.approx((0.05, 20.0 * sign))


def test_unknown_labels_say_nothing() -> None:
    logits, codes = drawn(5, (2000, 2), 1.0, 1.0)
    hidden = np.random.default_rng(0).random(codes.shape) < 0.5
    masked = np.where(hidden, -1, codes)
    wild = np.where(hidden, 1000.0, logits)
    expected = fit_calibration(entries_of_scores(logits, masked), "per-class")
    found = fit_calibration(entries_of_scores(wild, masked), "per-class")
    assert np.array_equal(found.scale, expected.scale) and np.array_equal(found.shift, expected.shift)
    as_negative = fit_calibration(entries_of_scores(logits, np.where(hidden, 0, codes)), "per-class")
    assert (as_negative.shift < expected.shift - 0.5).all()


def test_rows_and_pairs_give_the_same_entries() -> None:
    logits, codes = drawn(6, (40, 5))
    codes[np.random.default_rng(1).random(codes.shape) < 0.4] = -1
    dense = entries_of_scores(logits, codes)
    row, column = np.nonzero(codes > -2)
    pairs = entries_of_pairs(column, logits[row, column], codes[row, column], 5)
    for name in ("logit", "positive", "start", "class_id", "positives", "negatives"):
        assert np.array_equal(getattr(dense, name), getattr(pairs, name)), name
    assert dense.positives.tolist() == (codes == 1).sum(0).tolist()
    assert dense.negatives.tolist() == (codes == 0).sum(0).tolist()
    assert len(dense.pooled(limit=10)[0]) <= 10 and len(dense.pooled()[0]) == (codes >= 0).sum()


def test_a_score_that_is_no_number_is_named() -> None:
    logits, codes = drawn(7, (4, 2))
    logits[2, 1] = np.nan
    with pytest.raises(UserError, match=r"score of class 1 \(dog\) in row 2 is NaN"):
        entries_of_scores(logits, codes, ["cat", "dog"])
    with pytest.raises(UserError, match=r"score of class 1 \(dog\) in pair 2 is NaN"):
        entries_of_pairs(np.array([0, 0, 1]), logits[:3, 1], codes[:3, 1], 2, ["cat", "dog"])


def test_too_many_entries_are_taken_evenly_spaced() -> None:
    entries = KnownEntries(np.arange(5.0), np.array([True, False, False, True, True]), np.array([0, 2, 5]))
    for limit, places in ((2, [0, 3]), (3, [0, 2, 4]), (4, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])):
        logit, positive = entries.pooled(limit)
        assert logit.tolist() == places and positive.tolist() == entries.positive[places].tolist()
    nothing = KnownEntries(np.empty(0), np.empty(0, bool), np.zeros(3, int))
    assert [len(column) for column in nothing.pooled()] == [0, 0]


def test_no_calibration_is_a_scale_of_1_and_no_shift() -> None:
    entries = entries_of_scores(*drawn(9, (50, 3), 0.4, 2.0))
    for found in (uncalibrated(3), fit_calibration(entries, "none")):
        assert found.scale.tolist() == [1.0] * 3 and found.shift.tolist() == [0.0] * 3


def test_the_loss_is_minus_the_logarithm_of_the_label() -> None:
    found = log_loss(np.array([0.0, math.log(3)]), np.array([True, False]))
    assert found == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize("deviations", [(0.25, 1.0), (0.1, 0.3), (np.inf, np.inf)])
def test_the_drawn_fit_is_the_maximum(deviations: tuple[float, float]) -> None:
    """Likelihood and both normal distributions together, against every point near the fit."""
    z, y = np.array([3.0, 1.0, -0.5, -2.0, 0.5, 2.5]), np.array([True, True, True, False, False, False])
    around = (2.0, -1.5)

    def objective(log_scale: float, shift: float) -> float:
        p = sigmoid(np.exp(log_scale) * z + shift)
        away = (log_scale - math.log(around[0])) / deviations[0], (shift - around[1]) / deviations[1]
        return float(-np.log(np.where(y, p, 1 - p)).sum() + (away[0] ** 2 + away[1] ** 2) / 2)

    scale, shift = fit_scale_and_shift(z, y, around, deviations)
    best = objective(math.log(scale), shift)
    for a, b in ((1e-3, 0.0), (-1e-3, 0.0), (0.0, 1e-3), (0.0, -1e-3)):
        assert objective(math.log(scale) + a, shift + b) > best


def test_reliability_by_the_letter() -> None:
    probability = np.array([0.05, 0.05, 0.30, 0.95, 0.95, 1 - 1e-12])
    positive = np.array([False, True, False, True, True, False])
    found = reliability(np.log(probability) - np.log1p(-probability), positive, bins=10)
    parts = [(2, 0.05, 0.5), (1, 0.30, 0.0), (3, (0.95 * 2 + 1) / 3, 2 / 3)]
    assert [tuple(cell.values()) for cell in found["curve"]] == [pytest.approx(part) for part in parts]
    error = sum(n * abs(p - f) for n, p, f in parts) / 6
    assert found["expected_calibration_error"] == pytest.approx(100 * error)
    assert reliability(np.empty(0), np.empty(0, bool))["expected_calibration_error"] is None
    probability = (np.arange(150) + 0.5) / 150
    curve = reliability(np.log(probability) - np.log1p(-probability), np.zeros(150, bool))["curve"]
    assert [cell["entries"] for cell in curve] == [10] * 15
    # A probability of 1 is in the last part.
    (cell,) = reliability(np.array([800.0]), np.array([True]), bins=10)["curve"]
    assert cell == {"entries": 1, "probability": 1.0, "positive_fraction": 1.0}


def test_calibration_takes_the_error_away() -> None:
    logits, codes = drawn(8, (5000, 4), 0.6, np.array([-2.0, 0.0, 1.0, 2.0]))
    entries = entries_of_scores(logits, codes)
    before = reliability(entries.logit, entries.positive)
    after: dict[str, dict[str, float]] = {}
    for kind in ("temperature", "per-class"):
        fitted = fit_calibration(entries, kind)  # type: ignore[arg-type]
        after[kind] = reliability(fitted.logits(entries.logit, entries.class_id), entries.positive)
    name = "expected_calibration_error"
    assert after["per-class"][name] < 1.5 < before[name]
    assert after["per-class"]["log_loss"] < after["temperature"]["log_loss"] < before["log_loss"]
    assert fit_calibration(entries, "none").logits(logits) is not None
    assert np.array_equal(fit_calibration(entries, "none").logits(logits), logits)
    assert isinstance(entries, KnownEntries)

"""Probabilities that mean what they say: a temperature, or a scale and a shift per class, fitted on known labels.

p = sigmoid(scale x logit + shift). A temperature T is the scale 1 / T of all classes without a shift. Per class both
are fitted, and drawn towards those of all classes together as strongly as two normal distributions do, so that a class
with few labels keeps about what all classes have, and a class without any keeps exactly that. Everything is maximum
likelihood over known labels alone: an unknown label says nothing, and is never taken for a negative.

Source: temperature: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2; scale and shift:
Platt, Probabilistic Outputs for Support Vector Machines, 1999, equation 1; the expected calibration error: Guo et al.,
equation 3, over all known pairs of image and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from spml_fast.evaluation.entries import BoolArray, FloatArray, IntArray, as_dense, as_pairs, check_dense

CalibrationKind = Literal["none", "temperature", "per-class"]

# The scale lies between these, so that labels which a threshold separates perfectly do not ask for an infinite one.
SCALES = (0.05, 20.0)
SHIFT = 20.0
# Standard deviations, around the values of all classes, of the logarithm of a class's scale and of its shift.
SCALE_DEVIATION, SHIFT_DEVIATION = 0.25, 1.0
# All classes together are fitted on at most so many entries, evenly spaced.
POOLED_ENTRIES = 1 << 22
# Cells of the calibration curve.
BINS = 15


@dataclass(frozen=True)
class KnownEntries:
    """The known labels of a split with their logits, class after class.

    Attributes:
        logit: float64 [M].
        positive: bool [M].
        start: int64 [C + 1]; class c has the entries start[c] to start[c + 1] - 1.
    """

    logit: FloatArray
    positive: BoolArray
    start: IntArray

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.start) - 1

    @property
    def class_id(self) -> IntArray:
        """Class of each entry, int64 [M]."""
        return np.repeat(np.arange(self.num_classes), np.diff(self.start))

    @property
    def positives(self) -> IntArray:
        """Known positives of each class, int64 [C]."""
        before = np.concatenate([[0], np.cumsum(self.positive)])
        return np.asarray(np.diff(before[self.start]), np.int64)

    @property
    def negatives(self) -> IntArray:
        """Known negatives of each class, int64 [C]."""
        return np.asarray(np.diff(self.start) - self.positives, np.int64)

    def of_class(self, class_id: int) -> tuple[FloatArray, BoolArray]:
        """Logits and labels of one class."""
        part = slice(int(self.start[class_id]), int(self.start[class_id + 1]))
        return self.logit[part], self.positive[part]

    def pooled(self, limit: int = POOLED_ENTRIES) -> tuple[FloatArray, BoolArray]:
        """Logits and labels of all classes; where there are more than `limit`, evenly spaced ones."""
        step = -(-len(self.logit) // limit) or 1
        return self.logit[::step], self.positive[::step]

    def with_logits(self, logit: FloatArray) -> KnownEntries:
        """The same labels with other logits, float64 [M]."""
        return KnownEntries(logit, self.positive, self.start)


def entries_of_scores(
    scores: npt.ArrayLike, codes: npt.ArrayLike, class_names: Sequence[str] | None = None
) -> KnownEntries:
    """The known entries of whole rows.

    Args:
        scores: floating [N, C] logits.
        codes: integer or bool [N, C]: 1, 0, -1 (unknown).
        class_names: names for error messages.

    Raises:
        UserError: a NaN score or a code outside {1, 0, -1}.
        ValueError: wrong shape or dtype.
    """
    scores_a, codes_a = as_dense(scores, codes)
    check_dense(scores_a, codes_a, 0, class_names)
    known = codes_a.T >= 0
    start = np.concatenate([[0], np.cumsum(known.sum(1))]).astype(np.int64)
    return KnownEntries(scores_a.T[known].astype(np.float64), codes_a.T[known] == 1, start)


def entries_of_pairs(
    class_id: npt.ArrayLike,
    score: npt.ArrayLike,
    code: npt.ArrayLike,
    num_classes: int,
    class_names: Sequence[str] | None = None,
) -> KnownEntries:
    """The known entries among annotated pairs.

    Args:
        class_id: integer [M], 0..C-1.
        score: floating [M] logits.
        code: integer or bool [M]: 1, 0, -1 (dropped).
        num_classes: C.
        class_names: names for error messages.

    Raises:
        UserError: a NaN score, a code outside {1, 0, -1}, or a class outside 0..C-1.
        ValueError: wrong shape or dtype.
    """
    class_a, score_a, code_a, _ = as_pairs(class_id, score, code, num_classes, None, class_names)
    known = np.flatnonzero(code_a >= 0)
    order = known[np.argsort(class_a[known], kind="stable")]
    counts = np.bincount(class_a[order], minlength=num_classes)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return KnownEntries(score_a[order].astype(np.float64), code_a[order] == 1, start)


@dataclass(frozen=True)
class Calibration:
    """How logits become probabilities: sigmoid(scale x logit + shift).

    Attributes:
        kind: how it was fitted.
        scale: float64 [C], greater than 0.
        shift: float64 [C].
    """

    kind: CalibrationKind
    scale: FloatArray
    shift: FloatArray

    def logits(self, logit: npt.ArrayLike, class_id: npt.ArrayLike | None = None) -> FloatArray:
        """Calibrated logits, float64 of the shape of `logit`.

        Args:
            logit: floating [N, C], or [M] with `class_id`.
            class_id: integer [M] class of each, or None.
        """
        values = np.asarray(logit, np.float64)
        if self.kind == "none":
            return values
        chosen = slice(None) if class_id is None else np.asarray(class_id)
        return np.asarray(values * self.scale[chosen] + self.shift[chosen])


def uncalibrated(num_classes: int) -> Calibration:
    """Logits as they are."""
    return Calibration("none", np.ones(num_classes), np.zeros(num_classes))


def log_loss(logit: FloatArray, positive: BoolArray) -> float:
    """Mean of -log p(label) over entries [M]; NaN where there are none."""
    return float(np.mean(_losses(logit, positive))) if len(logit) else float("nan")


def _losses(logit: FloatArray, positive: BoolArray) -> FloatArray:
    return np.asarray(np.logaddexp(0, logit) - np.where(positive, logit, 0))


def fit_temperature(logit: FloatArray, positive: BoolArray) -> float:
    """The temperature under which labels are most probable.

    Args:
        logit: float64 [M].
        positive: bool [M].
    """
    # Half a second that a training without calibration does without.
    from scipy.optimize import minimize_scalar

    # The loss is convex in the scale, so it has one minimum over its logarithm too.
    found = minimize_scalar(
        lambda u: log_loss(np.exp(u) * logit, positive),
        bounds=tuple(np.log(SCALES)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(-found.x))


def fit_scale_and_shift(
    logit: FloatArray,
    positive: BoolArray,
    around: tuple[float, float] = (1.0, 0.0),
    deviations: tuple[float, float] = (np.inf, np.inf),
) -> tuple[float, float]:
    """Scale and shift under which labels are most probable.

    Args:
        logit: float64 [M].
        positive: bool [M].
        around: scale and shift that they are drawn to, and that no entries give.
        deviations: standard deviations of the logarithm of the scale, and of the shift, around these; infinite ones
            do not draw.
    """
    from scipy.optimize import minimize

    centre = np.array([np.log(around[0]), around[1]])
    tightness = 1 / np.square(np.array(deviations))

    def loss(x: FloatArray) -> tuple[float, FloatArray]:
        scaled = np.exp(x[0]) * logit
        away = x - centre
        residual = expit(scaled + x[1]) - positive
        value = _losses(scaled + x[1], positive).sum() + 0.5 * (tightness * away**2).sum()
        return float(value), np.array([residual @ scaled, residual.sum()]) + tightness * away

    bounds = [tuple(np.log(SCALES)), (-SHIFT, SHIFT)]
    found = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12, "gtol": 1e-6})
    return float(np.exp(found.x[0])), float(found.x[1])


def fit_calibration(entries: KnownEntries, kind: CalibrationKind) -> Calibration:
    """Fit a calibration on known labels."""
    count = entries.num_classes
    if kind == "none":
        return uncalibrated(count)
    pooled = entries.pooled()
    if kind == "temperature":
        return Calibration(kind, np.full(count, 1 / fit_temperature(*pooled)), np.zeros(count))
    around = fit_scale_and_shift(*pooled)
    deviations = SCALE_DEVIATION, SHIFT_DEVIATION
    fits = [
        fit_scale_and_shift(*entries.of_class(c), around, deviations)
        if entries.start[c] < entries.start[c + 1]
        else around
        for c in range(count)
    ]
    scale, shift = np.array(fits, np.float64).T
    return Calibration(kind, scale, shift)


def reliability(logit: FloatArray, positive: BoolArray, bins: int = BINS) -> dict[str, Any]:
    """How often labels are positive where the model says how probable they are.

    Args:
        logit: float64 [M], calibrated or not.
        positive: bool [M].
        bins: equal parts of the probabilities from 0 to 1.

    Returns:
        `expected_calibration_error` in per cent: the mean over entries of how far the fraction of positives of their
        part is from its mean probability; `log_loss`; and `curve`: for every part with entries its number of `entries`,
        the mean `probability`, and the `positive_fraction`.
    """
    probability = expit(logit)
    cell = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count = np.bincount(cell, minlength=bins)
    sums = (np.bincount(cell, weights, minlength=bins) for weights in (probability, positive))
    mean, fraction = (np.divide(s, count, out=np.zeros(bins), where=count > 0) for s in sums)
    filled = np.flatnonzero(count)
    distance = (count * np.abs(mean - fraction)).sum()
    return {
        "expected_calibration_error": 100 * float(distance / len(logit)) if len(logit) else None,
        "log_loss": log_loss(logit, positive) if len(logit) else None,
        "curve": [
            {"entries": int(count[i]), "probability": float(mean[i]), "positive_fraction": float(fraction[i])}
            for i in filled
        ],
    }

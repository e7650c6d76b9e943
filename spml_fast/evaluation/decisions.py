"""From probabilities to classes: a threshold for every class, chosen on known labels after calibration.

Two rules: the threshold of the highest F1, 2 TP / (predicted + positives), or that of the highest recall among those
whose precision is at least P. Of thresholds that are as good the highest is taken, which predicts least. A threshold
lies half way between two logits, so that rounding decides nothing. Only known labels count, as everywhere in
evaluation: precision is that among known labels, and without known negatives there is none.

A class with few known positives or negatives takes the threshold of all classes together, which is chosen by the same
rule on the entries of all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from spml_fast.core.errors import UserError
from spml_fast.evaluation.calibration import (
    Calibration,
    CalibrationKind,
    KnownEntries,
    fit_calibration,
    reliability,
)
from spml_fast.evaluation.entries import BoolArray, FloatArray, check_choice, harmonic, per_cent, ratio

Rule = Literal["f1", "precision"]

MIN_LABELS = 10
# Thresholds stay within plus and minus this logit, a probability of 1e-11 from 0 and 1, which float64 tells apart.
LIMIT = 25.0
# How far below the lowest logit the threshold is that predicts every entry.
_BELOW = 1e-3


@dataclass(frozen=True)
class DecisionOptions:
    """How thresholds and calibration are chosen.

    Attributes:
        thresholds: `f1`, the highest F1; `precision`, the highest recall with at least `precision`.
        precision: fraction, greater than 0 and at most 1; None with `f1`.
        calibration: of the logits, before thresholds are chosen.
        min_labels: known positives, and known negatives, that a class needs for a threshold of its own.

    Raises:
        UserError: options that make no sense together.
    """

    thresholds: Rule = "f1"
    precision: float | None = None
    calibration: CalibrationKind = "none"
    min_labels: int = MIN_LABELS

    def __post_init__(self) -> None:
        check_choice("thresholds", self.thresholds, get_args(Rule))
        check_choice("calibration", self.calibration, get_args(CalibrationKind))
        if self.thresholds == "precision" and self.precision is None:
            raise UserError("thresholds of a precision need one; give --precision, such as 0.9")
        if self.thresholds != "precision" and self.precision is not None:
            raise UserError("a precision belongs to --thresholds precision; leave it out, or choose that")
        if self.precision is not None and not 0 < self.precision <= 1:
            raise UserError(f"precision is {self.precision:g}; it must be greater than 0 and at most 1")
        if self.min_labels < 1:
            raise UserError(f"min-labels is {self.min_labels}; it must be at least 1")


@dataclass(frozen=True)
class Decisions:
    """What turns a run's logits into classes.

    Attributes:
        alpha: BoostLU's factor of the logits that it is for.
        threshold: float64 [C], the calibrated probability from which a class is predicted; infinite where it never is.
        calibration: of the logits.
    """

    alpha: float
    threshold: FloatArray
    calibration: Calibration

    @property
    def calibrated(self) -> bool:
        """Whether probabilities are other than the sigmoid of the logits."""
        return self.calibration.kind != "none"

    def metadata(self) -> dict[str, str]:
        """Name -> JSON for the metadata of an export; `decisions_of_metadata` reads it."""
        limits = [_or_none(value) for value in self.threshold.tolist()]
        fitted: dict[str, Any] = {"kind": self.calibration.kind}
        if self.calibrated:
            fitted |= {"scale": self.calibration.scale.tolist(), "shift": self.calibration.shift.tolist()}
        return {"threshold_probability": json.dumps(limits), "calibration": json.dumps(fitted)}

    def margins(self, logit: npt.ArrayLike, class_id: npt.ArrayLike | None = None) -> FloatArray:
        """Calibrated logits less their thresholds: a class is predicted from 0 on.

        Args:
            logit: floating [N, C], or [M] with `class_id`.
            class_id: integer [M] class of each, or None.

        Returns:
            float64 of the shape of `logit`.
        """
        edges = threshold_logits(self.threshold)
        return self.calibration.logits(logit, class_id) - (edges if class_id is None else edges[np.asarray(class_id)])


def threshold_logits(threshold: FloatArray) -> FloatArray:
    """Logits of probabilities, infinite where the probability is (1 or more, or 0 or less)."""
    inside = np.clip(threshold, 0, 1)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(inside) - np.log1p(-inside))


def best_threshold(logit: FloatArray, positive: BoolArray, precision: float | None = None) -> float:
    """The logit from which entries are best predicted positive; infinite where no threshold obeys the rule.

    Args:
        logit: float64 [M], without NaN.
        positive: bool [M].
        precision: the smallest one, a fraction, for the highest recall that it allows; None for the highest F1.
    """
    # Beyond the limits logits are equal, as their thresholds would be: the rule judges them together.
    logit = np.clip(logit, -LIMIT, LIMIT)
    order = np.argsort(-logit, kind="stable")
    ranked = logit[order]
    # Equal logits are predicted together: only the last of them can be the end of what is predicted.
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else np.empty(0, np.int64)
    hits, predicted = np.cumsum(positive[order])[ends], ends + 1
    if not len(ends) or not hits[-1]:
        return math.inf
    if precision is None:
        best = int(np.argmax(2 * hits / (predicted + hits[-1])))
    else:
        obeys = hits / predicted >= precision
        if not obeys.any():
            return math.inf
        best = int(np.argmax(np.where(obeys, hits, 0)))
    last = ends[best]
    below = ranked[last + 1] if last + 1 < len(ranked) else ranked[last] - _BELOW
    return float(np.clip((ranked[last] + below) / 2, -LIMIT, LIMIT))


def threshold_figures(logit: FloatArray, positive: BoolArray, edge: float) -> dict[str, Any]:
    """What a threshold reaches on entries: `f1`, `precision`, `recall` in per cent, and their `positives`, `negatives`.

    Args:
        logit: float64 [M].
        positive: bool [M].
        edge: logit from which an entry is predicted.

    Returns:
        Figures that are not defined are None: F1 and recall without positives, precision without predictions.
    """
    predicted = logit >= edge
    hits, chosen, positives = int((predicted & positive).sum()), int(predicted.sum()), int(positive.sum())
    precision, recall = (ratio(hits, n) if n else math.nan for n in (chosen, positives))
    f1 = harmonic(ratio(hits, chosen), recall) if positives else math.nan
    figures = {"f1": f1, "precision": precision, "recall": recall}
    counts = {"positives": positives, "negatives": len(positive) - positives}
    return {name: per_cent(value) for name, value in figures.items()} | counts


def choose_decisions(
    entries: KnownEntries, alpha: float, options: DecisionOptions, classes: Sequence[str]
) -> tuple[Decisions, dict[str, Any]]:
    """Fit the calibration and choose the thresholds.

    Args:
        entries: known labels of a split with their logits at `alpha`.
        alpha: BoostLU's factor.
        options: how.
        classes: class names in class-id order.

    Returns:
        The decisions, and figures about them, ready for JSON, in per cent: `calibration` (`kind`, `before` and `after`
        as `reliability` gives them), `pooled` (threshold of all classes and what it reaches), and `classes`, a list of
        C, each with its `class`, `threshold_probability` (None: never), `from` (`class` or `pooled`), what it reaches,
        `scale` and `shift`.

    Raises:
        UserError: no known positives or no known negatives.
    """
    if not entries.positive.any() or entries.positive.all():
        lacking = "negatives" if entries.positive.any() else "positives"
        raise UserError(
            f"no known {lacking} among {len(entries.logit):,} known labels, so nothing tells how precise a prediction "
            "is; take a split on whose images a person has said which classes are there and which are not"
        )
    calibration = fit_calibration(entries, options.calibration)
    calibrated = entries.with_logits(calibration.logits(entries.logit, entries.class_id))
    precision = options.precision
    common = best_threshold(*calibrated.pooled(), precision)
    own = np.minimum(entries.positives, entries.negatives) >= options.min_labels
    edges = [
        best_threshold(*calibrated.of_class(c), precision) if own[c] else common for c in range(entries.num_classes)
    ]
    threshold = np.where(np.isinf(edges), np.inf, expit(np.array(edges)))
    decisions = Decisions(alpha, threshold, calibration)
    rows = [
        {"class": name, "threshold_probability": _or_none(threshold[c]), "from": "class" if own[c] else "pooled"}
        | threshold_figures(*calibrated.of_class(c), edges[c])
        | {"scale": float(calibration.scale[c]), "shift": float(calibration.shift[c])}
        for c, name in enumerate(classes)
    ]
    pooled = {"threshold_probability": None if math.isinf(common) else float(expit(common))}
    figures: dict[str, Any] = {
        "calibration": {"kind": calibration.kind, "before": reliability(entries.logit, entries.positive)},
        "pooled": pooled | threshold_figures(calibrated.logit, calibrated.positive, common),
        "classes": rows,
    }
    if decisions.calibrated:
        figures["calibration"]["after"] = reliability(calibrated.logit, calibrated.positive)
    return decisions, figures


def _or_none(threshold: float) -> float | None:
    return float(threshold) if math.isfinite(threshold) else None


def decisions_of(alpha: float, kind: str, rows: Sequence[dict[str, Any]]) -> Decisions:
    """Decisions from the rows of `choose_decisions`.

    Args:
        alpha: BoostLU's factor.
        kind: of the calibration.
        rows: of every class: `threshold_probability`, `scale`, `shift`.

    Raises:
        KeyError, TypeError, ValueError: the rows hold something else.
    """
    if kind not in get_args(CalibrationKind):
        raise ValueError(f"there is no calibration {kind!r}")
    limits = [row["threshold_probability"] for row in rows]
    threshold = np.array([math.inf if limit is None else float(limit) for limit in limits])
    scale, shift = (np.array([float(row[name]) for row in rows]) for name in ("scale", "shift"))
    if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(shift).all() and alpha > 0):
        raise ValueError("scale, shift or alpha is no number that a calibration has")
    finite = threshold[np.isfinite(threshold)]
    if ((finite <= 0) | (finite >= 1)).any() or np.isnan(threshold).any():
        raise ValueError("a threshold does not lie between 0 and 1")
    # Checked above.
    return Decisions(alpha, threshold, Calibration(kind, scale, shift))  # type: ignore[arg-type]


def decisions_of_metadata(metadata: Mapping[str, str], classes: int) -> Decisions | None:
    """The decisions of an export; None where it has none.

    Args:
        metadata: name -> JSON.
        classes: C.

    Raises:
        KeyError, TypeError, ValueError: the metadata hold something else.
    """
    if "threshold_probability" not in metadata:
        return None
    limits, fitted = json.loads(metadata["threshold_probability"]), json.loads(metadata["calibration"])
    kind = fitted["kind"]
    plain = {"scale": [1.0] * classes, "shift": [0.0] * classes}
    columns = [limits, *((fitted if kind != "none" else plain)[name] for name in ("scale", "shift"))]
    if [len(column) for column in columns] != [classes] * 3:
        raise ValueError(f"thresholds or calibration are not those of {classes} classes")
    names = ("threshold_probability", "scale", "shift")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return decisions_of(float(metadata.get("alpha", 1)), kind, rows)

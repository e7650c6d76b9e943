"""Random scores and codes for the metrics' tests, and average precision by the letter."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from spml_fast.evaluation.average_precision import ClassAP, average_precision

DEFINITIONS = ("sklearn", "rank", "voc")
INF = np.float32(np.inf)


def sklearn_ap(scores: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """scikit-learn class by class over known entries; NaN without positives."""
    out = []
    for s, y in zip(scores.T, codes.T, strict=True):
        known = y >= 0
        out.append(average_precision_score(y[known], s[known]) if (y == 1).any() else np.nan)
    return np.array(out)


def slow_ap(scores: np.ndarray, codes: np.ndarray, definition: str) -> np.ndarray:
    """The two tie-ordered definitions by the letter, one entry after another."""
    out = []
    for s, y in zip(scores.T, codes.T, strict=True):
        known = np.flatnonzero(y >= 0)
        order = [r for _, r in sorted((-s[r], r) for r in known.tolist())]
        tp, precision = 0, []
        for n, r in enumerate(order, 1):
            tp += int(y[r] == 1)
            precision.append(tp / n)
        at = [n for n, r in enumerate(order) if y[r] == 1]
        terms = [precision[n] if definition == "rank" else max(precision[n:]) for n in at]
        out.append(sum(terms) / len(terms) if terms else np.nan)
    return np.array(out)


def pairs_of(scores: np.ndarray, codes: np.ndarray, rng: np.random.Generator | None = None) -> tuple[np.ndarray, ...]:
    """Every known entry as (class, score, code, row), in random order when `rng` is given."""
    rows, classes = np.nonzero(codes >= 0)
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    rows, classes = rows[order], classes[order]
    return classes, scores[rows, classes], codes[rows, classes], rows


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray]:
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


def four_classes() -> ClassAP:
    """AP 0.5 with both signs; AP 1 with positives alone; negatives alone; no label at all."""
    codes = np.array([[0, 1, 0, -1], [1, -1, 0, -1], [-1, 1, -1, -1]], np.int8)
    scores = np.array([[2, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    return average_precision(scores, codes)

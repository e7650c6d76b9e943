"""What a pass over a split leaves for the report: curves against scikit-learn, confusions and mistakes by hand."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.evaluation.calibration import entries_of_scores
from spml_fast.evaluation.class_record import (
    FULL,
    PAIRS,
    class_record,
    confusions,
    entry_samples,
    hardest,
    precision_recall_curves,
)
from spml_fast.evaluation.decisions import DecisionOptions, choose_decisions
from spml_fast.evaluation.evaluate import Scores, known_entries
from tests.support.report import make_scores


def curves_of(scores: np.ndarray, codes: np.ndarray, points: int = 32) -> list[np.ndarray]:
    """Points of each class, [recall, precision] in fractions."""
    counts, cells = precision_recall_curves(entries_of_scores(scores, codes), points)
    assert cells.dtype == np.uint8 and counts.sum() == len(cells)
    return [part / FULL for part in np.split(cells, np.cumsum(counts)[:-1])]


@pytest.mark.parametrize("levels", [None, 7])
def test_curves_lie_on_those_of_scikit_learn(levels):
    """With ties and without: every point is one of the exact curve, within what a byte rounds."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(400, 6)).astype(np.float32)
    if levels:
        scores = np.round(scores * levels / 3).astype(np.float32)
    codes = (rng.random(scores.shape) < [0.5, 0.2, 0.05, 0.01, 0.9, 0.0]).astype(np.int8)
    codes[rng.random(scores.shape) < 0.2] = -1
    codes[0, 3] = 1
    for c, points in enumerate(curves_of(scores, codes)):
        known = codes[:, c] >= 0
        positives = int((codes[:, c] == 1).sum())
        assert len(points) <= min(32, max(positives, 0))
        if not positives:
            continue
        precision, recall, _ = precision_recall_curve(codes[known, c], scores[known, c])
        exact = np.stack([recall, precision], 1)
        distance = np.abs(points[:, None] - exact[None]).max(2).min(1)
        assert distance.max() <= 0.5 / FULL + 1e-9
        # From the highest score to the last positive.
        assert points[-1, 0] == 1 and (np.diff(points[:, 0]) >= 0).all()
        if not levels:
            assert points[0, 0] == round(FULL / positives) / FULL
            assert len(points) == min(positives, 32)


def test_a_curve_of_few_positives_has_them_all():
    scores = np.array([[5.0], [4.0], [3.0], [2.0], [1.0]], np.float32)
    codes = np.array([[1], [0], [1], [0], [1]], np.int8)
    (points,) = curves_of(scores, codes)
    assert points == pytest.approx(np.array([[1 / 3, 1], [2 / 3, 2 / 3], [1, 3 / 5]]), abs=0.5 / FULL)
    # All scores equal: one point, whatever the order.
    (points,) = curves_of(np.zeros((5, 1), np.float32), codes)
    assert points.tolist() == [[1, round(FULL * 3 / 5) / FULL]]


def test_curves_without_a_known_label():
    counts, cells = precision_recall_curves(
        entries_of_scores(np.zeros((3, 2), np.float32), np.full((3, 2), -1, np.int8))
    )
    assert counts.tolist() == [0, 0] and cells.shape == (0, 2)


@pytest.mark.parametrize("known", [1.0, 0.6])
def test_confusions_by_hand(known):
    """Counts against loops over all images, of whole rows and of pairs."""
    scores, labels = make_scores(80, 7, seed=3, known=known)
    names = list("abcdefg")
    entries, sample = known_entries(scores, labels, 1.0, names), entry_samples(scores, labels)
    predicted = entries.logit > 0
    codes = labels.rows(np.arange(80))
    dense = np.zeros(codes.shape, bool)
    dense[sample, entries.class_id] = predicted
    found = confusions(entries, sample, predicted)
    expected = {}
    for a in range(7):
        for b in range(7):
            of = (codes[:, b] == 1) & (codes[:, a] == 0)
            rest = (codes[:, a] == 0) & ~of
            if count := int((of & dense[:, a]).sum()):
                expected[a, b] = [count, int(of.sum()), int((rest & dense[:, a]).sum()), int(rest.sum())]
    pairs = {(row[0], row[1]): row[2:] for row in found["pairs"]}
    assert len(expected) <= PAIRS and pairs == expected
    counts = [row[2] for row in found["pairs"]]
    assert counts == sorted(counts, reverse=True)
    matrix = found["matrix"]
    for i, a in enumerate(matrix["classes"]):
        for j, b in enumerate(matrix["classes"]):
            if a != b:
                assert matrix["count"][i][j] == expected.get((a, b), [0])[0]
                assert matrix["of"][i][j] == int(((codes[:, b] == 1) & (codes[:, a] == 0)).sum())
            else:
                assert matrix["count"][i][j] == matrix["of"][i][j] == 0


def test_no_confusions_where_nothing_is_predicted():
    scores, labels = make_scores(20, 4)
    entries = known_entries(scores, labels, 1.0, list("abcd"))
    found = confusions(entries, entry_samples(scores, labels), np.zeros(len(entries.logit), bool))
    assert found == {"pairs": [], "matrix": None}


def test_hardest_labels_are_the_most_contradicted():
    scores = np.array([[9, 1], [8, 7], [7.5, 8.5], [6, -5], [-9, -8]], np.float32)
    codes = np.array([[0, 1], [0, 0], [0, 0], [-1, 0], [1, 1]], np.int8)
    entries = entries_of_scores(scores, codes)
    sample = np.nonzero(codes.T >= 0)[1]

    def pairs(places: np.ndarray) -> list[tuple[int, int]]:
        return list(zip(sample[places].tolist(), entries.class_id[places].tolist(), strict=True))

    # Image 2 once, by what is worse; an unknown label is no mistake.
    assert pairs(hardest(entries, sample, False)) == [(0, 0), (2, 1), (1, 0), (3, 1)]
    assert pairs(hardest(entries, sample, False, 2)) == [(0, 0), (2, 1)]
    assert pairs(hardest(entries, sample, True)) == [(4, 0), (0, 1)]


def test_one_class_does_not_fill_the_list():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(500, 60)).astype(np.float32)
    scores[:, 5] += 20
    entries = entries_of_scores(scores, np.zeros(scores.shape, np.int8))
    sample = np.tile(np.arange(500), 60)
    places = hardest(entries, sample, False)
    owners = np.bincount(entries.class_id[places])
    assert len(places) == 32 and owners[5] == 4 and owners.max() == 4 and len(set(sample[places])) == 32


@pytest.mark.parametrize("known", [1.0, 0.5])
def test_the_record_says_what_the_scores_say(known):
    names = [f"c{i}" for i in range(9)]
    scores, labels = make_scores(300, 9, known=known)
    entries = known_entries(scores, labels, 5.0, names)
    decisions, figures = choose_decisions(entries, 5.0, DecisionOptions(calibration="per-class"), names)
    record = class_record(scores, labels, 5.0, 0.5, names, decisions)
    assert json.loads(json.dumps(record)) == record
    for c, row in enumerate(figures["classes"]):
        predicted, hits = (record["decided"][name][c] for name in ("predicted", "hits"))
        assert row["precision"] == (pytest.approx(100 * hits / predicted) if predicted else None)
        assert row["recall"] == (pytest.approx(100 * hits / row["positives"]) if row["positives"] else None)
        assert record["positives"][c] == row["positives"] and record["negatives"][c] == row["negatives"]
    assert record["plain"]["predicted"] == [int((entries.of_class(c)[0] > 0).sum()) for c in range(9)]
    assert record["calibration"]["after"] == figures["calibration"]["after"]
    assert len(base64.b64decode(record["curves"]["data"])) == 2 * sum(record["curves"]["points"])
    codes = labels.rows(np.arange(300))
    for name, code in (("false_positives", 0), ("misses", 1)):
        rows = record[name]
        assert rows and all(codes[sample, c] == code for sample, c, _ in rows)
        probabilities = [p for *_, p in rows]
        assert probabilities == sorted(probabilities, reverse=code == 0)
    # Of another alpha they are left aside.
    plain = class_record(scores, labels, 1.0, 0.5, names, decisions)
    assert plain["decided"] is None and plain["calibration"]["after"] is None


def test_a_score_that_is_no_number_is_refused():
    scores, labels = make_scores(10, 3)
    scores.mean[4, 1] = np.nan
    with pytest.raises(UserError, match="is NaN"):
        class_record(scores, labels, 1.0, 0.5, list("abc"))


def test_a_large_vocabulary_is_small():
    """The curves of a vocabulary as large as that of OpenImages, partly annotated."""
    rng = np.random.default_rng(0)
    number, images, pairs = 9668, 4000, 120_000
    key = np.unique(rng.integers(0, images * number, pairs))
    row, column = (key // number).astype(np.int32), (key % number).astype(np.int32)
    code = (rng.random(len(key)) < 0.5).astype(np.int8)
    logits = (rng.normal(size=len(key)) + code).astype(np.float32)
    scores = Scores(logits, logits, row, column, code)
    start = np.searchsorted(row, np.arange(images + 1)).astype(np.int64)
    labels = SparseLabels(start, column.astype(np.int16), code, number, -1)
    record = class_record(scores, labels, 1.0, 0.5, [str(i) for i in range(number)])
    assert len(json.dumps(record)) < 1_500_000 and sum(record["positives"]) == int(code.sum())

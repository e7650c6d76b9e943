"""What one pass over a split tells of every class, small enough to keep: counts, curves, confusions, hardest labels.

Everything comes from scores that are there already (`evaluate.Scores`); no image is looked at twice. Known labels alone
count, as everywhere in evaluation. The record is plain JSON; `runs/evaluation_record.py` keeps it beside a run.

Curves are quantised: at most `POINTS` points of each class, recall and precision in a byte each, so that ten thousand
classes are 0.9 MB at most. Cost: one sort of the known labels, as average precision itself needs.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import expit

from spml_fast.data.labels import SparseLabels
from spml_fast.evaluation.calibration import KnownEntries, reliability
from spml_fast.evaluation.decisions import Decisions
from spml_fast.evaluation.entries import BoolArray, FloatArray, IntArray
from spml_fast.evaluation.evaluate import Scores, known_entries
from spml_fast.evaluation.thresholds import logit_threshold

# Points of a class's curve at most, and the value of a byte that is 1.
POINTS = 32
FULL = 255
# Pairs of confused classes, and classes of the matrix of the most confused ones.
PAIRS, MATRIX = 50, 20
# Hardest labels of each kind, and of them so many of one class where there are many classes.
HARDEST, OF_A_CLASS = 32, 4


def entry_samples(scores: Scores, labels: SparseLabels) -> IntArray:
    """Sample of each entry of `evaluate.known_entries`, int64 [M].

    Args:
        scores: of the split.
        labels: known labels of the split.
    """
    if scores.class_id is None:
        rows = np.nonzero(labels.rows(scores.index).T >= 0)[1]
        return scores.index[rows].astype(np.int64)
    assert scores.code is not None
    known = np.flatnonzero(scores.code >= 0)
    return scores.index[known[np.argsort(scores.class_id[known], kind="stable")]].astype(np.int64)


def precision_recall_curves(entries: KnownEntries, points: int = POINTS) -> tuple[IntArray, npt.NDArray[np.uint8]]:
    """Precision-recall curves of all classes, quantised.

    Args:
        entries: known labels with their logits.
        points: of each class at most, evenly spaced over its positives beside the first one.

    Returns:
        Number of points of each class, int64 [C], 0 without a positive; and recall and precision of all points, class
        after class and from the highest score down, uint8 [P, 2] of which `FULL` is 1. Equal scores are one point.
    """
    class_id, count = entries.class_id, entries.num_classes
    # Negatives before positives among equal scores: the last positive of a tie is its end.
    order = np.lexsort((entries.positive, -entries.logit, class_id))
    positions = np.flatnonzero(entries.positive[order])
    owner = class_id[order[positions]]
    positives = entries.positives
    first = np.concatenate([[0], np.cumsum(positives)])[:-1]
    hits = np.arange(1, len(positions) + 1) - first[owner]
    seen = positions + 1 - entries.start[owner]
    # Ranks of the positives at which a curve is looked at.
    wanted = np.minimum(positives, points - 1)
    steps = np.arange(1, points)[None, :]
    ranks = -(-steps * positives[:, None] // np.maximum(wanted, 1)[:, None])
    chosen = np.concatenate([np.ones((count, 1), np.int64), ranks], axis=1)
    there = np.concatenate([positives[:, None] > 0, steps <= wanted[:, None]], axis=1)
    place = (first[:, None] + chosen - 1)[there]
    # Of a tie its end.
    logit = entries.logit[order[positions]]
    last = np.append((logit[1:] != logit[:-1]) | (owner[1:] != owner[:-1]), True) if len(logit) else np.empty(0, bool)
    ends = np.flatnonzero(last)
    place = np.unique(ends[np.searchsorted(ends, place)])
    recall, precision = hits[place] / positives[owner[place]], hits[place] / seen[place]
    cells = np.stack([recall, precision], axis=1)
    return np.bincount(owner[place], minlength=count), (cells * FULL).round().astype(np.uint8)


def _counts(entries: KnownEntries, predicted: BoolArray) -> dict[str, list[int]]:
    """Known entries of each class that are predicted, and those of them that are positive."""
    class_id = entries.class_id
    picked = (predicted, predicted & entries.positive)
    return {
        name: np.bincount(class_id[mask], minlength=entries.num_classes).tolist()
        for name, mask in zip(("predicted", "hits"), picked, strict=True)
    }


def confusions(entries: KnownEntries, sample: IntArray, predicted: BoolArray) -> dict[str, Any]:
    """Which classes are predicted, wrongly, where which other class is.

    Args:
        entries: known labels.
        sample: int64 [M] of each.
        predicted: bool [M].

    Returns:
        `pairs`: [a, b, count, of, elsewhere, rest] of the `PAIRS` most frequent: of the `of` images that have b and,
        known, not a, a was predicted in `count`; of the `rest` images that have no b, or none that is known, and not a,
        in `elsewhere`. `matrix`: `classes`, those that the most confusions are about, and `count` and `of` of each pair
        of them as lists of rows a, 0 of which where a is b.
    """
    if not (predicted & ~entries.positive).any():
        return {"pairs": [], "matrix": None}
    number = entries.num_classes
    _, row = np.unique(sample, return_inverse=True)
    class_id = entries.class_id
    shape = (int(row.max(initial=-1)) + 1, number)

    def table(mask: BoolArray) -> Any:
        return sparse.csc_matrix((np.ones(int(mask.sum()), np.int32), (row[mask], class_id[mask])), shape=shape)

    wrong, there, absent = table(predicted & ~entries.positive), table(entries.positive), table(~entries.positive)
    together = (wrong.T @ there).tocoo()
    order = np.lexsort((together.col, together.row, -together.data))
    a, b, count = (np.asarray(part)[order] for part in (together.row, together.col, together.data))
    mistakes, negatives = (np.asarray(part.sum(axis=0)).ravel() for part in (wrong, absent))

    def images(first: int, second: int) -> int:
        """Images that have the second class and, known, not the first."""
        return int((absent[:, [first]].multiply(there[:, [second]])).sum())

    pairs = []
    for first, second, found in zip(a[:PAIRS].tolist(), b[:PAIRS].tolist(), count[:PAIRS].tolist(), strict=True):
        of = images(first, second)
        pairs.append([first, second, found, of, int(mistakes[first]) - found, int(negatives[first]) - of])
    involved = np.bincount(a, count, number) + np.bincount(b, count, number)
    worst = np.sort(np.argsort(-involved, kind="stable")[:MATRIX])
    worst = worst[involved[worst] > 0].tolist()
    square = (wrong[:, worst].T @ there[:, worst]).toarray()
    possible = (absent[:, worst].T @ there[:, worst]).toarray()
    matrix = {"classes": worst, "count": square.tolist(), "of": possible.tolist()}
    return {"pairs": pairs, "matrix": matrix if worst else None}


def hardest(entries: KnownEntries, sample: IntArray, positive: bool, count: int = HARDEST) -> IntArray:
    """Places of the known labels that the scores contradict most, int64 [k], the hardest first.

    Args:
        entries: known labels with their logits.
        sample: int64 [M] of each.
        positive: misses, positives of a low score; else false positives, negatives of a high one.
        count: at most so many; of one class `OF_A_CLASS`, or more where there are few classes; an image once.
    """
    places = np.flatnonzero(entries.positive == positive)
    rank = entries.logit[places] if positive else -entries.logit[places]
    few = min(len(places), 256 * count)
    if few < len(places):
        kept = np.argpartition(rank, few - 1)[:few]
        places, rank = places[kept], rank[kept]
    class_id = entries.class_id
    order = places[np.lexsort((class_id[places], sample[places], rank))]
    most = max(OF_A_CLASS, -(-2 * count // max(entries.num_classes, 1)))
    taken: list[int] = []
    images: set[int] = set()
    of_class: dict[int, int] = {}
    for place in order.tolist():
        image, owner = int(sample[place]), int(class_id[place])
        if image in images or of_class.get(owner, 0) >= most:
            continue
        images.add(image)
        of_class[owner] = of_class.get(owner, 0) + 1
        taken.append(place)
        if len(taken) == count:
            break
    return np.array(taken, np.int64)


def class_record(
    scores: Scores,
    labels: SparseLabels,
    alpha: float,
    threshold: float,
    classes: Sequence[str],
    decisions: Decisions | None = None,
) -> dict[str, Any]:
    """What a pass over a split tells of its classes, ready for JSON.

    Args:
        scores: of the split, which have this alpha.
        labels: known labels of the split.
        alpha: BoostLU's factor.
        threshold: probability above which a class is predicted.
        classes: class names in class-id order.
        decisions: of the run; those of another alpha are left aside.

    Returns:
        `alpha`, `threshold_probability`; `positives`, `negatives` of each class; `plain` and, with decisions,
        `decided`: `predicted` and `hits` of each class; `curves`: `points` of each class, and `data`, base64 of
        `precision_recall_curves`; `calibration`: `before` and `after` (None without one) of `reliability`;
        `confusions`, of what `decided` or else `plain` predicts; `false_positives` and `misses`: [sample, class,
        probability] of the hardest labels, calibrated where there is a calibration.

    Raises:
        UserError: a score is not a number.
    """
    entries = known_entries(scores, labels, alpha, classes)
    sample = entry_samples(scores, labels)
    usable = decisions if decisions is not None and decisions.alpha == alpha else None
    predicted = plain = entries.logit > logit_threshold(threshold)
    calibrated: FloatArray = entries.logit
    record: dict[str, Any] = {
        "alpha": alpha,
        "threshold_probability": threshold,
        "positives": entries.positives.tolist(),
        "negatives": entries.negatives.tolist(),
        "plain": _counts(entries, plain),
        "decided": None,
        "calibration": {"before": reliability(entries.logit, entries.positive), "after": None},
    }
    if usable is not None:
        class_id = entries.class_id
        calibrated = usable.calibration.logits(entries.logit, class_id)
        predicted = usable.margins(entries.logit, class_id) >= 0
        record["decided"] = _counts(entries, predicted)
        if usable.calibrated:
            record["calibration"]["after"] = reliability(calibrated, entries.positive)
    points, cells = precision_recall_curves(entries)
    record["curves"] = {"points": points.tolist(), "data": base64.b64encode(cells.tobytes()).decode()}
    record["confusions"] = confusions(entries, sample, predicted)
    ranked = entries.with_logits(calibrated)
    for name, positive in (("false_positives", False), ("misses", True)):
        record[name] = [
            [int(sample[place]), int(entries.class_id[place]), float(expit(calibrated[place]))]
            for place in hardest(ranked, sample, positive)
        ]
    return record

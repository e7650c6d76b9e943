"""The table of all classes as the page's program shows it: figures, thresholds and precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spml_fast.analysis.report.decisions import Record
from spml_fast.analysis.report.groups import RunGroup, class_ap


def _numbers(values: np.ndarray | None) -> list[float | None] | None:
    return None if values is None else [None if np.isnan(v) else round(v, 2) for v in values.tolist()]


def _deviation(group: RunGroup) -> list[float | None] | None:
    """Sample deviation of every class's AP over the runs; None for a single run."""
    lists = [r.alphas.get(r.headline or "", {}).get("per_class_ap") for r in group.runs]
    known = [np.array(values, np.float64) for values in lists if values]
    if len(known) < 2 or len({len(values) for values in known}) > 1:
        return None
    return _numbers(np.std(known, axis=0, ddof=1))


def _first(records: Sequence[Record | None]) -> tuple[int, Record] | None:
    return next(((place, record) for place, record in enumerate(records) if record is not None), None)


def class_data(
    groups: Sequence[RunGroup],
    names: Sequence[str],
    counts: Sequence[np.ndarray | None],
    evaluations: Sequence[Sequence[Record | None]],
    decisions: Sequence[Sequence[Record | None]],
) -> dict[str, Any] | None:
    """What the table shows; None where no run has figures of its classes.

    Args:
        groups: of the report, with the same classes.
        names: of the classes.
        counts: observed positives of every class in training, of each group; None where they are not known.
        evaluations: of the runs of each group.
        decisions: of the runs of each group.

    Returns:
        `names`; `training` (counts of the first group that has them, or None); and `groups`, each with its `label`,
        `colour`, `ap` and `deviation` in per cent; and of its first run that has them, named `run`: `positives`,
        `negatives`, `predicted`, `hits` of the split `split`, at `thresholds` (None: never) or, where these are
        null, at `plain`, a probability; `pooled`, the classes that take the threshold of
        all; `curves`, `points` of each class and bytes in base64.
    """
    rows = []
    for group, evaluated, decided in zip(groups, evaluations, decisions, strict=True):
        ap = class_ap(group)
        one: dict[str, Any] = {
            "label": group.label,
            "colour": group.colour,
            "ap": _numbers(ap),
            "deviation": _deviation(group),
        }
        found = _first(evaluated)
        if found is not None:
            place, record = found
            thresholds = decided[place]
            thresholds = thresholds if record["decided"] is not None else None
            counted = record["plain"] if thresholds is None else record["decided"]
            one |= {
                "run": group.runs[place].name,
                "split": record["split"],
                "positives": record["positives"],
                "negatives": record["negatives"],
                "predicted": counted["predicted"],
                "hits": counted["hits"],
                "plain": record["threshold_probability"],
                "thresholds": None if thresholds is None else _thresholds(thresholds),
                "pooled": [] if thresholds is None else _pooled(thresholds),
                "curves": record["curves"],
            }
        elif (chosen := _first(decided)) is not None:
            one |= _of_validation(group.runs[chosen[0]].name, chosen[1])
        if ap is not None or "run" in one:
            rows.append(one)
    if not rows:
        return None
    training = next((c.tolist() for c in counts if c is not None and len(c) == len(names)), None)
    return {"names": list(names), "training": training, "groups": rows}


def _thresholds(record: Record) -> list[float | None]:
    return [
        None if row["threshold_probability"] is None else float(f"{row['threshold_probability']:.4g}")
        for row in record["classes"]
    ]


def _pooled(record: Record) -> list[int]:
    """Classes with few labels, which take the threshold of all classes together."""
    return [place for place, row in enumerate(record["classes"]) if row["from"] == "pooled"]


def _of_validation(name: str, record: Record) -> dict[str, Any]:
    """What thresholds reached on the labels that they were chosen on, of a run without a record of its test."""
    rows = record["classes"]
    return {
        "run": name,
        "split": record["split"],
        "positives": [row["positives"] for row in rows],
        "negatives": [row["negatives"] for row in rows],
        "precision": [row["precision"] and round(row["precision"], 2) for row in rows],
        "recall": [row["recall"] and round(row["recall"], 2) for row in rows],
        "thresholds": _thresholds(record),
        "pooled": _pooled(record),
    }

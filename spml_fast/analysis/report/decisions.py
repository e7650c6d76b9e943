"""What the report shows of thresholds and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spml_fast.analysis.report.charts import Figure, reliability_chart
from spml_fast.analysis.report.groups import RunGroup, mean_text
from spml_fast.core.errors import UserError
from spml_fast.runs.decisions import load_decisions
from spml_fast.runs.evaluation_record import load_evaluation
from spml_fast.runs.read import Run

Table = tuple[list[str], list[list[str]]]
Record = dict[str, Any]


def decision_record(run: Run) -> Record | None:
    """What the run's file of decisions holds; None without one, and with a note where it is not for the weights."""
    if run.classes is None:
        return None
    try:
        saved = load_decisions(run.folder, run.classes)
    except UserError as error:
        run.notes.append(f"thresholds of classes are not shown: {error}")
        return None
    return None if saved is None else saved.record


def evaluation_record(run: Run) -> Record | None:
    """What the run's last evaluation left; None without one, and with a note where it is not for the weights."""
    if run.classes is None:
        return None
    try:
        return load_evaluation(run.folder, run.classes)
    except UserError as error:
        run.notes.append(f"curves, confusions and mistakes are not shown: {error}")
        return None


def decision_summary(groups: Sequence[RunGroup], records: Sequence[Sequence[Record | None]]) -> Table | None:
    """A row for each group that has thresholds; None where there is none.

    Args:
        groups: of the report.
        records: of the runs of each group, from `decision_record`.
    """
    head = ["", "thresholds", "chosen on", "calibration", "OF1 at 0.5", "OF1 with thresholds", "CF1 at 0.5"]
    head += ["CF1 with thresholds", "calibration error, %"]
    rows = []
    for group, found in zip(groups, records, strict=True):
        known = [record for record in found if record is not None]
        if not known:
            continue
        row = [group.label, ", ".join(dict.fromkeys(map(_rule, known)))]
        row.append(", ".join(dict.fromkeys(str(record["split"]) for record in known)))
        row.append(", ".join(dict.fromkeys(record["calibration"]["kind"] for record in known)))
        tested = [run.alphas.get(run.headline or "", {}) for run in group.runs]
        decided = [metrics.get("decisions") or {} for metrics in tested]
        for figure in ("OF1", "CF1"):
            row.append(mean_text(metrics.get(figure) for metrics in tested))
            row.append(mean_text(metrics.get(figure) for metrics in decided))
        row.append(mean_text(metrics.get("expected_calibration_error") for metrics in decided))
        rows.append(row)
    return (head, rows) if rows else None


def _rule(record: Record) -> str:
    options = record["options"]
    return "highest F1" if options["thresholds"] == "f1" else f"precision {options['precision']:g} or more"


def calibrations(
    group: RunGroup, evaluations: Sequence[Record | None], decisions: Sequence[Record | None]
) -> tuple[str, Record] | None:
    """The calibration of a group's first run that has one: of which split, and `before` and `after`.

    Args:
        group: of the report.
        evaluations: of its runs, which come first: the split has not chosen the calibration.
        decisions: of its runs.
    """
    for records in (evaluations, decisions):
        for record in records:
            if record is not None:
                return str(record["split"]), record["calibration"]
    return None


def calibration_charts(groups: Sequence[RunGroup], found: Sequence[tuple[str, Record] | None]) -> list[Figure]:
    """How often classes are there against how probable the runs say that they are; empty where none is known.

    Args:
        groups: of the report.
        found: of each, from `calibrations`.
    """
    curves = []
    for group, one in zip(groups, found, strict=True):
        if one is None:
            continue
        ends = [(end, (one[1].get(end) or {}).get("curve") or []) for end in ("before", "after")]
        ends = [(end, cells) for end, cells in ends if cells]
        for end, cells in ends:
            name = group.label if len(ends) == 1 else f"{group.label}, {'un' if end == 'before' else ''}calibrated"
            curves.append((name, group.colour, "2 3" if end == "before" and len(ends) > 1 else "", cells))
    return reliability_chart(curves)


def calibration_errors(groups: Sequence[RunGroup], found: Sequence[tuple[str, Record] | None]) -> Table | None:
    """Expected calibration error of each group's curve, uncalibrated and calibrated.

    Args:
        groups: of the report.
        found: of each, from `calibrations`.
    """
    rows = []
    for group, one in zip(groups, found, strict=True):
        if one is None:
            continue
        split, ends = one
        texts = [mean_text([(ends.get(end) or {}).get("expected_calibration_error")]) for end in ("before", "after")]
        labels = sum(cell["entries"] for cell in (ends.get("before") or {}).get("curve") or [])
        rows.append([group.runs[0].name if len(group.runs) > 1 else group.label, split, f"{labels:,}", *texts])
    head = ["", "split", "known labels", "calibration error, %", "after calibration, %"]
    return (head, rows) if rows else None

"""What the report shows of thresholds and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Calibrated:
    """How far a setting's probabilities can be taken at their word.

    Attributes:
        group: the setting.
        run: name of that of its runs which this is of.
        split: of which split.
        record: `before` and `after` calibration, of `calibration.reliability`; None where there is none.
    """

    group: RunGroup
    run: str
    split: str
    record: Record

    def end(self, name: str) -> Record:
        """`before` or `after`; empty where there is none."""
        return self.record.get(name) or {}


def calibrations(
    groups: Sequence[RunGroup],
    evaluations: Sequence[Sequence[Record | None]],
    decisions: Sequence[Sequence[Record | None]],
) -> list[Calibrated]:
    """The calibration of the first run of each group that has one; groups without any are left out.

    Args:
        groups: of the report.
        evaluations: of the runs of each, which come first: the split has not chosen the calibration.
        decisions: of the runs of each.
    """
    found = []
    for group, evaluated, decided in zip(groups, evaluations, decisions, strict=True):
        pairs = [*zip(group.runs, evaluated, strict=True), *zip(group.runs, decided, strict=True)]
        known = [(run, record) for run, record in pairs if record is not None]
        for run, record in known[:1]:
            found.append(Calibrated(group, run.name, str(record["split"]), record["calibration"]))
    return found


def calibration_charts(found: Sequence[Calibrated]) -> list[Figure]:
    """How often classes are there against how probable the runs say that they are; empty where none is known."""
    curves = []
    for one in found:
        ends = [(end, cells) for end in ("before", "after") if (cells := one.end(end).get("curve"))]
        for end, cells in ends:
            name = one.group.label if len(ends) == 1 else f"{one.group.label}, {'un' * (end == 'before')}calibrated"
            dash = "2 3" if end == "before" and len(ends) > 1 else ""
            curves.append((name, one.group.colour, dash, cells))
    return reliability_chart(curves)


def calibration_errors(found: Sequence[Calibrated]) -> Table | None:
    """Expected calibration error of each curve, uncalibrated and calibrated."""
    head = ["", "split", "known labels", "calibration error, %", "after calibration, %"]
    rows = []
    for one in found:
        errors = [mean_text([one.end(end).get("expected_calibration_error")]) for end in ("before", "after")]
        labels = sum(cell["entries"] for cell in one.end("before").get("curve") or [])
        rows.append([one.run, one.split, f"{labels:,}", *errors])
    return (head, rows) if rows else None

"""What the report shows of thresholds and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spml_fast.analysis.report.plots import figure_with_axis, png
from spml_fast.analysis.report.tables import RunGroup, mean_text
from spml_fast.core.errors import UserError
from spml_fast.runs.decisions import load_decisions
from spml_fast.runs.read import Run

Table = tuple[list[str], list[list[str]]]
# A longer table of classes is cut, and says so.
ROWS = 500


def decision_record(run: Run) -> dict[str, Any] | None:
    """What the run's file of decisions holds; None without one, and with a note where it is not for the weights."""
    if run.classes is None:
        return None
    try:
        saved = load_decisions(run.folder, run.classes)
    except UserError as error:
        run.notes.append(f"thresholds of classes are not shown: {error}")
        return None
    return None if saved is None else saved.record


def decision_summary(groups: Sequence[RunGroup], records: Sequence[Sequence[dict[str, Any] | None]]) -> Table | None:
    """A row for each group that has thresholds; None where there is none.

    Args:
        groups: of the report.
        records: of the runs of each group, from `decision_record`.
    """
    head = ["", "thresholds", "chosen on", "calibration", "calibration error, %", "after calibration, %"]
    head += ["test OF1 at 0.5", "with thresholds", "test CF1 at 0.5", "with thresholds"]
    rows = []
    for group, found in zip(groups, records, strict=True):
        known = [record for record in found if record is not None]
        if not known:
            continue
        rule = ", ".join(dict.fromkeys(_rule(record) for record in known))
        row = [group.label, rule, ", ".join(dict.fromkeys(str(record["split"]) for record in known))]
        row.append(", ".join(dict.fromkeys(record["calibration"]["kind"] for record in known)))
        name = "expected_calibration_error"
        row += [
            mean_text((record["calibration"].get(end) or {}).get(name) for record in known)
            for end in ("before", "after")
        ]
        tested = [run.alphas.get(run.headline or "", {}) for run in group.runs]
        for figure in ("OF1", "CF1"):
            row.append(mean_text(metrics.get(figure) for metrics in tested))
            row.append(mean_text((metrics.get("decisions") or {}).get(figure) for metrics in tested))
        rows.append(row)
    return (head, rows) if rows else None


def _rule(record: dict[str, Any]) -> str:
    options = record["options"]
    return "highest F1" if options["thresholds"] == "f1" else f"precision {options['precision']:g} or more"


def decision_classes(record: dict[str, Any]) -> Table:
    """Threshold of every class of one run, what it reached on validation, and the labels that it stands on."""

    def text(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else f"{value:{form}}"

    head = ["class", "threshold", "F1, %", "precision, %", "recall, %", "positives", "negatives"]
    rows = []
    for row in record["classes"][:ROWS]:
        limit = row["threshold_probability"]
        shared = " (all classes')" if row["from"] == "pooled" else ""
        cells = [row["class"], "never" if limit is None else f"{limit:.3f}{shared}"]
        cells += [text(row[name]) for name in ("f1", "precision", "recall")]
        rows.append([*cells, f"{row['positives']:,}", f"{row['negatives']:,}"])
    if len(record["classes"]) > ROWS:
        rows.append([f"... and {len(record['classes']) - ROWS:,} more", *[""] * (len(head) - 1)])
    return head, rows


def calibration_plot(
    groups: Sequence[RunGroup], records: Sequence[Sequence[dict[str, Any] | None]]
) -> list[tuple[str, str]]:
    """How often classes are there against how probable the runs say that they are; empty without thresholds.

    Args:
        groups: in the order of their colours.
        records: of the runs of each group, from `decision_record`.
    """
    firsts = [
        (g, record)
        for g, found in zip(groups, records, strict=True)
        if (record := next((r for r in found if r), None)) is not None
    ]
    if not firsts:
        return []
    figure, axis = figure_with_axis("probability", whole=False)
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for group, record in firsts:
        calibration = record["calibration"]
        for end, style in (("before", ":"), ("after", "-")):
            curve = (calibration.get(end) or {}).get("curve") or []
            x, y = ([cell[name] for cell in curve] for name in ("probability", "positive_fraction"))
            axis.plot(x, y, style, color=group.colour, marker="o", markersize=3, linewidth=1.4)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    return [("fraction of positives; dotted: uncalibrated", png(figure))]

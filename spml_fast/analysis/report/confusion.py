"""Which classes are predicted, wrongly, where which others are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from spml_fast.analysis.report.charts import heat_map, shortened
from spml_fast.analysis.report.decisions import Record
from spml_fast.analysis.report.groups import RunGroup

# Rows of the table of pairs.
ROWS = 20
# Characters of a name in it.
NAME = 48
HEAD = ["predicted", "beside", "images", "rate", "elsewhere", "ratio"]


@dataclass(frozen=True)
class Confusion:
    """The confusions of one run.

    Attributes:
        name: of the run.
        rule: what counts as predicted.
        heat: matrix of the most confused classes; None without any.
        number: classes of it.
        rows: the most frequent pairs.
    """

    name: str
    rule: str
    heat: Markup | None
    number: int
    rows: list[list[str]]


def confusion_sections(
    groups: Sequence[RunGroup], evaluations: Sequence[Sequence[Record | None]], names: Sequence[str]
) -> list[Confusion]:
    """Confusions of the first run of each group that has a record of any.

    Args:
        groups: of the report.
        evaluations: of the runs of each group.
        names: of the classes, as they are shown.
    """
    found = []
    for group, records in zip(groups, evaluations, strict=True):
        first = next(((run, record) for run, record in zip(group.runs, records, strict=True) if record), None)
        if first is None or not first[1]["confusions"]["pairs"]:
            continue
        run, record = first
        matrix = record["confusions"]["matrix"]
        heat, number = None, 0
        if matrix is not None:
            number = len(matrix["classes"])
            heat = heat_map([names[c] for c in matrix["classes"]], matrix["count"], matrix["of"])
        rule = "at the run's thresholds" if record["decided"] is not None else "at 0.5"
        if record["decided"] is None and record["threshold_probability"] != 0.5:
            rule = f"at {record['threshold_probability']:g}"
        rows = [_row(names, *pair) for pair in record["confusions"]["pairs"][:ROWS]]
        found.append(Confusion(run.name, rule, heat, number, rows))
    return found


def _row(names: Sequence[str], a: int, b: int, count: int, of: int, elsewhere: int, rest: int) -> list[str]:
    rate, base = count / of if of else None, elsewhere / rest if rest else None
    return [
        shortened(names[a], NAME),
        shortened(names[b], NAME),
        f"{count:,} of {of:,}",
        "-" if rate is None else f"{rate:.1%}",
        "-" if base is None else f"{base:.1%}",
        f"{rate / base:.1f}" if rate is not None and base else "-",
    ]

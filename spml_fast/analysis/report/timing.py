"""Where the time of runs went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from spml_fast.analysis.report.charts import shortened
from spml_fast.analysis.report.groups import RunGroup, mean_of, mean_text
from spml_fast.analysis.report.svg import RowChart, nice_ticks
from spml_fast.runs.read import Run, number

# Characters of a name over its bar.
NAME = 48
# In the order of the bars; classes t0, t1 ... of the page's style.
PARTS = ("training", "waiting for data", "validation", "saving", "scoring the training split", "thresholds", "test")
# Names in the log of those that are no part of an epoch's own time.
_LOGGED = {
    "validation": "validation",
    "scoring the training split": "scoring",
    "thresholds": "thresholds",
    "test": "test",
}


def time_parts(run: Run) -> dict[str, float]:
    """Seconds by part, of those that the run has logged: parts that it has not are left out, not 0.

    Training is the time of the updates less waiting for data and saves within epochs.
    """
    epochs = [e for e in run.epochs if number(e.get("seconds")) is not None]
    if not epochs:
        return {}

    def total(name: str) -> float | None:
        ends = (run.results or {}).get("seconds") or {}
        found = [v for source in (*epochs, ends) if (v := number(source.get(f"{name}_seconds"))) is not None]
        return sum(found) if found else None

    seconds = sum(float(e["seconds"]) for e in epochs)
    waiting = sum(float(e["seconds"]) * (number(e.get("data_wait")) or 0.0) for e in epochs)
    within = total("saving_within") or 0.0
    parts = {"training": max(seconds - waiting - within, 0.0), "waiting for data": waiting}
    saving = total("saving")
    if saving is not None or within:
        parts["saving"] = (saving or 0.0) + within
    for part, name in _LOGGED.items():
        if (value := total(name)) is not None:
            parts[part] = value
    return {part: parts[part] for part in PARTS if part in parts}


def duration_text(seconds: float) -> str:
    """A time for people: `0.4 s`, `12 s`, `3.5 min`, `7.2 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class TimeSection:
    """Where the time of runs went.

    Attributes:
        svg: a bar for each setting.
        legend: class of the colour and name of each part.
        head: of the table.
        rows: of the table.
    """

    svg: Markup
    legend: list[tuple[str, str]]
    head: list[str]
    rows: list[list[str]]


def _class(part: str) -> str:
    """Class of a part's colour in the page's style."""
    return f"t{PARTS.index(part)}"


def time_section(groups: Sequence[RunGroup]) -> TimeSection | None:
    """The times of every setting; None where nothing is logged."""
    rows = []
    for group in groups:
        runs = [parts for r in group.runs if (parts := time_parts(r))]
        if runs:
            means = {part: mean for part in PARTS if (mean := mean_of(p.get(part) for p in runs)) is not None}
            rows.append((group, means, runs))
    if not rows:
        return None
    there = [part for part in PARTS if any(part in means for _, means, _ in rows)]
    most = max(sum(means.values()) for _, means, _ in rows)
    # In the unit that the longest bar is told in.
    size, unit = (1.0, "s") if most < 120 else (60.0, "min") if most < 7200 else (3600.0, "h")
    ticks = [t for t in nice_ticks(0, most / size, 5) if t >= 0]
    chart = RowChart("where the time went", ticks, len(rows), unit)
    for place, (group, means, _) in enumerate(rows):
        done = 0.0
        chart.names(place, shortened(group.label, NAME))
        for part, value in means.items():
            text = f"{group.label}: {part} {duration_text(value)}"
            chart.bar(_class(part), place, done / size, (done + value) / size, text)
            done += value
    table = []
    for group, means, runs in rows:
        whole = sum(means.values())
        cells = [
            f"{duration_text(means[part])} ({means[part] / whole:.0%})" if part in means and whole else "-"
            for part in there
        ]
        table.append([group.label, *cells, mean_text([sum(p.values()) / size for p in runs], ".1f") + f" {unit}"])
    return TimeSection(chart.svg(), [(_class(part), part) for part in there], ["", *there, "together"], table)

"""Where the time of runs went."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from spml_fast.analysis.report.charts import Figure, shortened
from spml_fast.analysis.report.groups import RunGroup, mean_of, mean_text
from spml_fast.analysis.report.svg import nice_ticks, text_mark, tick_text
from spml_fast.runs.read import Run, number

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


def time_section(groups: Sequence[RunGroup]) -> tuple[Figure, list[str], list[list[str]]] | None:
    """A bar for each setting, and the seconds as a table; None where nothing is logged."""
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
    width, left, right, height = 640, 10, 14, 46 * len(rows) + 40

    def x(value: float) -> float:
        return left + value / size / ticks[-1] * (width - left - right)

    out = [Markup(f'<svg class="chart wide-chart" viewBox="0 0 {width} {height}" role="img"><title>seconds</title>')]
    for tick in ticks:
        at = x(tick * size)
        out.append(Markup(f'<path class="grid" d="M{at:.1f} 4V{height - 34}"/>'))
        out.append(text_mark("tick mid", at, height - 20, tick_text(tick)))
    out.append(text_mark("tick mid", width / 2, height - 4, unit))
    for place, (group, means, _) in enumerate(rows):
        y, done = 46 * place + 22, 0.0
        out.append(text_mark("name", left, y - 6, shortened(group.label, 70)))
        for part, value in means.items():
            shape = f'x="{x(done):.2f}" y="{y}" width="{max(x(done + value) - x(done), 0):.2f}" height="16"'
            bar = Markup(f'<rect class="t{PARTS.index(part)}" {shape}>')
            out.append(bar + Markup("<title>%s</title></rect>") % f"{group.label}: {part} {duration_text(value)}")
            done += value
    figure = Figure("seconds", Markup("").join([*out, Markup("</svg>")]))
    table = []
    for group, means, runs in rows:
        whole = sum(means.values())
        cells = [
            f"{duration_text(means[part])} ({means[part] / whole:.0%})" if part in means and whole else "-"
            for part in there
        ]
        table.append([group.label, *cells, mean_text([sum(p.values()) for p in runs], ".1f") + " s"])
    return figure, ["", *there, "together"], table

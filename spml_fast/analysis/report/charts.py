"""The charts of the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from spml_fast.analysis.report.groups import RunGroup, class_ap, mean_of
from spml_fast.analysis.report.svg import Chart, RowChart, log_ticks, nice_ticks, text_mark
from spml_fast.runs.read import Run, number

# Epoch figures in the order of their charts, further ones follow by name; and those that have a section of their own.
PANELS = ("loss", "val_map", "lr", "images_per_second", "data_wait")
SELECTION = ("selected_count", "selection_precision", "selection_recall", "corrected", "corrected_total")

TITLES = {
    "loss": "training loss",
    "val_map": "validation mAP, %",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "fraction of time waiting for data",
    "selection_precision": "precision: hidden positives among them",
    "selection_recall": "recall: hidden positives found",
    "selected_count": "labels rejected or corrected",
    "corrected": "labels corrected for good, in the epoch",
    "corrected_total": "labels corrected for good, so far",
    "t_gap": "threshold of the gap",
    "t_avg_mean": "threshold of the average, mean over classes",
}

NOT_DRAWN = (
    "epoch",
    "update",
    "time",
    "seconds",
    "selected_true_count",
    "hidden_positive_count",
    "memory_gib",
    "penalty",
    *(f"{part}_seconds" for part in ("validation", "saving", "saving_within", "scoring", "thresholds", "test")),
)


def shortened(text: str, most: int) -> str:
    """A name of at most so many characters; the end of a longer one is cut."""
    return text if len(text) <= most else text[: most - 1] + "…"


# Lines have so many points at most, and names in a row of a chart so many characters.
LINE_POINTS, ROW_NAME = 400, 34


@dataclass(frozen=True)
class Figure:
    """A chart with its caption."""

    title: str
    svg: Markup


def drawn(epoch: dict[str, Any], name: str) -> float | None:
    """A figure of an epoch; the precision of nothing is not defined, though the log has 0 for it."""
    if name == "selection_precision" and not epoch.get("selected_count"):
        return None
    return number(epoch.get(name))


def panel_names(runs: Sequence[Run]) -> list[str]:
    """Names of the epoch figures that are numbers and not of a section of their own, the usual ones first."""
    names = {k for r in runs for e in r.epochs for k, v in e.items() if isinstance(v, int | float)}
    names -= {*NOT_DRAWN, *SELECTION}
    # A figure that is 0 in every epoch has no chart.
    names = {n for n in names if any(e.get(n) for r in runs for e in r.epochs)}
    return [n for n in PANELS if n in names] + sorted(names - set(PANELS))


def selection_names(runs: Sequence[Run]) -> list[str]:
    """Names of the figures about rejected or corrected labels that the runs have."""
    return [n for n in SELECTION if any(drawn(e, n) for r in runs for e in r.epochs)]


def _ends(values: Sequence[float], fraction: bool) -> list[float]:
    """Ticks for values: 0 to 1 for fractions, else what holds them."""
    if fraction:
        return [0, 0.25, 0.5, 0.75, 1]
    return nice_ticks(min(values), max(values), 4)


def epoch_charts(
    groups: Sequence[RunGroup], names: Sequence[str], guesses: Sequence[float | None] | None = None
) -> list[Figure]:
    """Figures over epochs: a line for each setting, thin ones for its single runs.

    Args:
        groups: of the report.
        names: of the figures.
        guesses: of each group, the fraction of unknown labels that are hidden positives, drawn beside
            `selection_precision`.
    """
    out = []
    for name in names:
        series = [[[drawn(e, name) for e in r.epochs] for r in g.runs] for g in groups]
        values = [v for group in series for run in group for v in run if v is not None]
        if not values:
            continue
        most = max(len(run) for group in series for run in group)
        fraction = name.startswith("selection_") or name == "data_wait"
        chart = Chart(TITLES.get(name, name), _whole_ticks(most), _ends(values, fraction), "epoch")
        for group, runs in zip(groups, series, strict=True):
            _draw_runs(chart, group, runs)
        for group, runs, guess in zip(groups, series, guesses or [None] * len(groups), strict=True):
            # A setting that rejects nothing guesses nothing.
            if guess is not None and name == "selection_precision" and any(v is not None for run in runs for v in run):
                chart.line([(chart.x[0], guess), (chart.x[-1], guess)], group.colour, "2 4", 1.2)
        out.append(Figure(TITLES.get(name, name.replace("_", " ")), chart.svg()))
    return out


def _whole_ticks(most: int) -> list[float]:
    """Epochs 1 to the last in whole steps."""
    if most <= 1:
        return [0, 1, 2]
    step = max(1, math.ceil((most - 1) / 6))
    ticks = [float(k) for k in range(1, most + 1, step)]
    return ticks if ticks[-1] == most else [*ticks[: -1 if most - ticks[-1] <= step / 2 else None], float(most)]


def _draw_runs(chart: Chart, group: RunGroup, runs: Sequence[Sequence[float | None]]) -> None:
    """Lines of a setting's runs, and their mean as far as all of them went."""
    runs = [run for run in runs if run]
    several = len(runs) > 1
    for run in runs:
        chart.line([(i, v) for i, v in enumerate(run, 1)], group.colour, group.dash, 1 if several else 2, several)
    if not runs:
        return
    shortest = min(map(len, runs))
    columns = [[run[i] for run in runs] for i in range(shortest)]
    mean = [None if None in column else mean_of(column) for column in columns]
    if several:
        chart.line([(i, v) for i, v in enumerate(mean, 1)], group.colour, group.dash)
    for epoch, value in enumerate(mean, 1):
        alone = [mean[k] for k in (epoch - 2, epoch) if 0 <= k < shortest]
        # A line through a single epoch would be invisible.
        if value is not None and (shortest <= 12 or all(v is None for v in alone)):
            chart.dot(epoch, value, group.colour, f"{group.label}, epoch {epoch}: {value:.4g}", 2.5)


def class_charts(groups: Sequence[RunGroup], counts: Sequence[np.ndarray | None]) -> list[Figure]:
    """AP of all classes, sorted, and against the number of positives in training.

    Args:
        groups: of the report.
        counts: observed positives of every class, int64 [C], for each group; None where they are not known.
    """
    having = [(g, ap) for g in groups if (ap := class_ap(g)) is not None and not np.isnan(ap).all()]
    if not having:
        return []
    most = max(int((~np.isnan(ap)).sum()) for _, ap in having)
    chart = Chart("AP of every class", _whole_ticks(most), [0, 25, 50, 75, 100], "classes, the best first")
    for group, ap in having:
        known = np.sort(ap[~np.isnan(ap)])[::-1]
        ranks = np.unique(np.linspace(1, len(known), min(len(known), LINE_POINTS)).round().astype(int))
        chart.line([(float(r), float(known[r - 1])) for r in ranks], group.colour, group.dash)
    out = [Figure("AP of every class, %", chart.svg())]
    paired = [
        (g, ap, count)
        for g, count in zip(groups, counts, strict=True)
        if (ap := class_ap(g)) is not None and count is not None and len(ap) == len(count)
    ]
    if paired:
        lowest, highest = min(int(c.min()) for *_, c in paired), max(int(c.max()) for *_, c in paired)
        log = highest > 20 * max(lowest, 1)
        ticks = log_ticks(1, max(highest, 10)) if log else nice_ticks(lowest, highest, 4)
        label = "observed positives in training" + (" (none: at 1)" if log and lowest == 0 else "")
        chart = Chart("AP against labels", ticks, [0, 25, 50, 75, 100], label, log_x=log)
        for group, ap, count in paired:
            points = [(float(max(n, log)), float(a)) for n, a in zip(count, ap, strict=True) if not math.isnan(a)]
            chart.cloud(points, group.colour, 7 if len(count) <= 200 else 2.5)
        out.append(Figure("AP against labels, %", chart.svg()))
    return out


def strip_chart(
    title: str, groups: Sequence[RunGroup], value: Callable[[Run], float | None], form: str = ".2f"
) -> Figure | None:
    """Every run as a dot on the line of its setting, with the mean and, of several, the sample deviation.

    Args:
        title: what is shown; where it ends with a per cent sign the axis ends at 100 at most.
        groups: of the report.
        value: of a run; None where it has none.
        form: of the numbers.
    """
    rows = [(g, [(r, v) for r in g.runs if (v := number(value(r))) is not None]) for g in groups]
    rows = [(g, found) for g, found in rows if found]
    if not rows:
        return None
    means = [(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None) for v in map(_values, rows)]
    reach = [mean + sign * (spread or 0.0) for mean, spread in means for sign in (-1, 1)]
    values = [v for row in rows for v in _values(row)] + reach
    ticks = nice_ticks(min(values), max(values), 4)
    if title.endswith("%") and max(values) <= 100 < ticks[-1]:
        # There is nothing beyond.
        ticks = [*(tick for tick in ticks if tick < 100), 100.0]
    chart = RowChart(title, ticks, len(rows))
    for place, (group, found) in enumerate(rows):
        mean, spread = means[place]
        text = f"{mean:{form}}" + ("" if spread is None else f" ± {spread:{form}}")
        chart.names(place, shortened(group.label, ROW_NAME), text)
        if spread is not None:
            chart.line(f"spread {group.colour}", place, mean - spread, mean + spread)
        chart.stroke(f"mean {group.colour}", place, mean)
        for run, v in found:
            chart.dot(f"dot {group.colour}", place, v, f"{run.name}: {v:{form}}")
    return Figure(title, chart.svg())


def _values(row: tuple[RunGroup, list[tuple[Run, float]]]) -> list[float]:
    return [value for _, value in row[1]]


def comparison_charts(groups: Sequence[RunGroup]) -> list[Figure]:
    """Every run of every setting as a dot: mAP at every alpha, F1, the calibration error, speed."""
    alphas = sorted({a for g in groups for r in g.runs for a in r.alphas}, key=float)
    charts = [
        strip_chart(f"test mAP, {'plain' if float(a) == 1 else f'BoostLU x{a}'}, %", groups, _test_figure("map", a))
        for a in alphas
    ]
    charts += [strip_chart(f"test {name}, %", groups, _test_figure(name, None)) for name in ("OF1", "CF1")]
    charts.append(strip_chart("calibration error on test, %", groups, calibration_error))
    charts.append(strip_chart("images/s in training", groups, lambda r: r.figures.get("images_per_second"), ".0f"))
    return [chart for chart in charts if chart is not None]


def _test_figure(name: str, alpha: str | None) -> Callable[[Run], float | None]:
    return lambda run: run.alphas.get(alpha or run.headline or "", {}).get(name)


def calibration_error(run: Run) -> float | None:
    """Of the test split, in per cent, after the run's calibration where it has one."""
    decided = run.alphas.get(run.headline or "", {}).get("decisions") or {}
    return number(decided.get("expected_calibration_error"))


def reliability_chart(curves: Iterable[tuple[str, str, str, Sequence[dict[str, Any]]]]) -> list[Figure]:
    """How often labels are positive against how probable the runs say that they are, and how many labels that is.

    Args:
        curves: (name, class of its colour, dash, cells of `calibration.reliability`).
    """
    known = [(name, colour, dash, cells) for name, colour, dash, cells in curves if cells]
    if not known:
        return []
    unit = [0, 0.25, 0.5, 0.75, 1]
    chart = Chart("calibration curve", unit, unit, "probability", 360, 340)
    chart.line([(0, 0), (1, 1)], "faint", "", 1)
    counts = [cell["entries"] for *_, cells in known for cell in cells]
    bins = Chart("labels of each part", unit, log_ticks(1, max(max(counts), 10)), "probability", 360, 340, log_y=True)
    for name, colour, dash, cells in known:
        chart.line([(c["probability"], c["positive_fraction"]) for c in cells], colour, dash, 1.8)
        for cell in cells:
            text = f"{name}: {cell['entries']:,} labels, probability {cell['probability']:.3f}"
            text += f", {cell['positive_fraction']:.3f} of them positive"
            chart.dot(cell["probability"], cell["positive_fraction"], colour, text, 3)
            bins.dot(cell["probability"], cell["entries"], colour, text, 3)
    return [Figure("fraction of positives", chart.svg()), Figure("labels, logarithmic", bins.svg())]


# Pixels of a matrix's side, without the names.
MATRIX_SIDE = 400


def heat_map(names: Sequence[str], count: Sequence[Sequence[int]], of: Sequence[Sequence[int]]) -> Markup:
    """Which class (row) is predicted wrongly where which other one (column) is, as fractions.

    Args:
        names: of the classes.
        count: of images in which the row's class is predicted, n x n.
        of: images that have the column's class and not the row's, n x n.
    """
    n = len(names)
    short = [shortened(name, 15) for name in names]
    # Names take the room that they need: beside the rows, and turned above the columns, where the last one leans out.
    longest, size = 6.6 * max(map(len, short)), MATRIX_SIDE / n
    left, top = 12 + longest, 16 + 0.87 * longest
    width = left + MATRIX_SIDE + max(4, (longest - size) / 2 + 12)
    box = f'width="{width:.0f}" viewBox="0 0 {width:.0f} {top + MATRIX_SIDE + 4:.0f}"'
    out = [Markup(f'<svg class="chart heat" {box} role="img"><title>confused classes</title>')]
    rates = [[count[a][b] / of[a][b] if of[a][b] else 0.0 for b in range(n)] for a in range(n)]
    strongest = max(max(row) for row in rates) or 1.0
    for k, name in enumerate(short):
        y, x = top + size * (k + 0.5), left + size * (k + 0.5)
        out.append(text_mark("tick end", left - 6, y + 4, name))
        turned = f'<text class="tick" transform="translate({x + 4:.1f} {top - 6:.1f}) rotate(-60)">'
        out.append(Markup(turned) + escape(name) + Markup("</text>"))
    for a in range(n):
        for b in range(n):
            shape = f'x="{left + size * b:.1f}" y="{top + size * a:.1f}" width="{size - 1:.1f}" height="{size - 1:.1f}"'
            if a == b or not of[a][b]:
                out.append(Markup(f'<rect class="none" {shape}/>'))
                continue
            text = f"{names[a]} predicted in {count[a][b]:,} of {of[a][b]:,} images with {names[b]}"
            cell = f'<rect class="heat-cell" {shape} fill-opacity="{rates[a][b] / strongest:.3f}">'
            out.append(Markup(cell) + Markup("<title>%s</title></rect>") % f"{text} ({rates[a][b]:.1%})")
            if n <= 12 and count[a][b]:
                tone = "on" if rates[a][b] > 0.55 * strongest else "off"
                at = f'x="{left + size * (b + 0.5):.1f}" y="{top + size * (a + 0.5) + 4:.1f}"'
                out.append(Markup(f'<text class="mid cell {tone}" {at}>{100 * rates[a][b]:.0f}</text>'))
    return Markup("").join([*out, Markup("</svg>")])

"""The plots of the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spml_fast.analysis.report.tables import RunGroup, class_ap
from spml_fast.runs.read import Run, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Epoch figures in the order of their plots; further ones follow by name.
PANELS = ("loss", "val_map", "selection_precision", "selection_recall", "lr", "images_per_second", "data_wait")

TITLES = {
    "loss": "training loss",
    "val_map": "validation mAP, %",
    "lr": "learning rate",
    "images_per_second": "images/s",
    "data_wait": "fraction of time waiting for data",
    "memory_gib": "peak memory, GiB",
    "selection_precision": "precision of selected labels",
    "selection_recall": "recall of hidden positives",
    "selected_count": "selected labels",
    "corrected": "labels corrected in the epoch",
    "corrected_total": "labels corrected so far",
    "t_gap": "threshold of the gap",
    "t_avg_mean": "threshold of the average, mean over classes",
}

NOT_PLOTTED = ("epoch", "update", "time", "seconds", "selected_true_count", "hidden_positive_count", "memory_gib")


def figure_with_axis(label: str, whole: bool = True) -> tuple[Figure, Axes]:
    """A plot whose x axis is labelled `label`, with whole numbers alone or any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axis = pyplot.subplots(figsize=(4.6, 2.9), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.5)
    if whole:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(label)
    return figure, axis


def png(figure: Figure) -> str:
    """A figure as the address of an image within the page; the figure is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panels(runs: Sequence[Run]) -> list[str]:
    """Names of the epoch figures that are numbers, the usual ones first."""
    names = {k for r in runs for e in r.epochs for k, v in e.items() if isinstance(v, int | float)}
    names -= set(NOT_PLOTTED)
    # A figure that is 0 in every epoch has no plot.
    names = {n for n in names if any(e.get(n) for r in runs for e in r.epochs)}
    return [n for n in PANELS if n in names] + sorted(names - set(PANELS))


def _plotted(epoch: dict[str, Any], name: str) -> float | None:
    """A figure of an epoch; the precision of nothing is not defined, though the log has 0 for it."""
    if name == "selection_precision" and not epoch.get("selected_count"):
        return None
    return number(epoch.get(name))


def curve_plots(groups: Sequence[RunGroup]) -> list[tuple[str, str]]:
    """(title, image) of every figure over epochs; single runs have thin lines, their mean a thick one."""
    out = []
    for name in _panels([r for g in groups for r in g.runs]):
        figure, axis = figure_with_axis("epoch")
        for group in groups:
            series = [[_plotted(e, name) for e in r.epochs] for r in group.runs]
            known = [np.array([np.nan if v is None else v for v in s], np.float64) for s in series if s]
            style: dict[str, Any] = {"color": group.colour, "linestyle": group.dash}
            # A line through a single epoch would be invisible.
            marker = "o" if all(len(s) == 1 for s in known) else None
            for s in known:
                thin = len(known) > 1
                axis.plot(
                    np.arange(1, len(s) + 1), s, linewidth=0.7 if thin else 1.6, alpha=0.45 if thin else 1, **style
                )
            if known and (len(known) > 1 or marker):
                shortest = min(map(len, known))
                mean = np.mean([s[:shortest] for s in known], axis=0)
                axis.plot(np.arange(1, shortest + 1), mean, linewidth=1.8, marker=marker, **style)
        out.append((TITLES.get(name, name.replace("_", " ")), png(figure)))
    return out


def class_plots(groups: Sequence[RunGroup], counts: Sequence[np.ndarray | None]) -> list[tuple[str, str]]:
    """AP of all classes, sorted, and against the number of positives in training.

    Args:
        groups: in the order of their colours.
        counts: observed positives of every class, int64 [C], for each group; None where they are not known.
    """
    having = [(g, ap) for g in groups if (ap := class_ap(g)) is not None]
    paired = [
        (g, ap, count)
        for g, count in zip(groups, counts, strict=True)
        if (ap := class_ap(g)) is not None and count is not None and len(ap) == len(count)
    ]
    if not having:
        return []
    figure, axis = figure_with_axis("classes, the best first")
    for group, ap in having:
        known = np.sort(ap[~np.isnan(ap)])[::-1]
        axis.plot(np.arange(1, len(known) + 1), known, color=group.colour, linestyle=group.dash, linewidth=1.4)
    out = [("AP of every class, %", png(figure))]
    if paired:
        figure, axis = figure_with_axis("observed positives in training")
        for group, ap, count in paired:
            size = 20 if len(count) <= 200 else 3
            axis.scatter(np.maximum(count, 0.5), ap, s=size, color=group.colour, alpha=0.6, linewidths=0)
        if max(c.max() for *_, c in paired) > 20 * max(min(c.min() for *_, c in paired), 1):
            axis.set_xscale("log")
        out.append(("AP against labels, %", png(figure)))
    return out

"""The drawing of `diagnose`: rank correlations, highest and lowest cells of maps, IGNORE's gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spml_fast.analysis.diagnostics import MapTable, groups
from spml_fast.core.io import atomic_write
from spml_fast.core.outputs import writer_name


def shown_groups(table: MapTable) -> dict[str, npt.NDArray[np.bool_]]:
    """Those of `groups` that leave no pair to two of them, the name in words."""
    found = groups(table)
    if "hidden_positive" in found:
        del found["positive"]
    order = sorted(found, key=lambda name: ("positive" not in name, "hidden" in name))
    return {name.replace("_", " "): found[name] for name in order}


def plot(path: Path, table: MapTable, gaps: list[dict[str, Any]]) -> None:
    """Density of rank correlations, boxes of the highest and lowest cells, and IGNORE's gaps where a run has them.

    Args:
        path: PNG file to write.
        table: of `measure_maps`, with at least one positive.
        gaps: epoch lines of metrics.jsonl that have a `gap_histogram`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared, kinds = not np.isnan(table.full_top).all(), shown_groups(table)
    # Inches; every box has words below it.
    boxes = 2 * len(kinds) * (2 if compared else 1)
    widths = [5] * compared + [max(5, 0.8 * boxes)] + [5] * bool(gaps)
    size = (sum(widths), 4)
    figure, axes = pyplot.subplots(
        1, len(widths), figsize=size, width_ratios=widths, layout="constrained", squeeze=False
    )
    free = iter(axes[0])
    if compared:
        axis = next(free)
        positives = {name: chosen for name, chosen in shown_groups(table).items() if name != "negative"}
        curves = [
            (table.correlation[chosen], "this run" if len(positives) == 1 else f"this run, {name} labels")
            for name, chosen in positives.items()
        ]
        for correlations, label in (*curves, (table.control, "centred Gaussian")):
            defined = correlations[~np.isnan(correlations)]
            # Flat maps have no ranks.
            if len(defined):
                axis.hist(defined, np.linspace(-1, 1, 41), density=True, histtype="step", label=label)
        axis.set_xlabel("rank correlation with the fully supervised map")
        axis.set_ylabel("density over (image, positive class)")
        axis.legend(loc="upper left", frameon=False)
    axis = next(free)
    values, labels = [], []
    for end, title in (("top", "highest"), ("bottom", "lowest")):
        for name, chosen in kinds.items():
            for source, owner in ((end, "run"), (f"full_{end}", "full")) if compared else ((end, "run"),):
                values.append(getattr(table, source)[chosen])
                labels.append(f"{title} 5%\n{name.replace(' ', chr(10))}\n{owner}")
    axis.boxplot(values, showfliers=False, tick_labels=labels)
    axis.tick_params(axis="x", labelsize=7)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set_ylabel("mean of cells")
    if gaps:
        axis = next(free)
        last = gaps[-1]
        histogram = last["gap_histogram"]
        for kind in (k for k in histogram if k != "edges" and sum(histogram[k])):
            counts = np.array(histogram[kind], np.float64)
            # The first bin, below the lowest edge, has no place on a logarithmic axis and is not drawn.
            axis.stairs(counts[1:-1] / counts.sum(), histogram["edges"], label=kind.replace("_", " "))
        axis.axvline(last["t_gap"], color="black", linewidth=0.8, linestyle="--", label="threshold")
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"logit gap, epoch {last['epoch']}")
        axis.set_ylabel("fraction of entries of the kind")
        axis.legend(frameon=False, fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": writer_name("diagnose")})
    pyplot.close(figure)

"""One HTML page about one run or several: figures, curves, classes, and signs of trouble.

Everything comes from the files that a run leaves (config.yaml, metrics.jsonl, results.json, classes.txt); the page
names those that are missing. Runs whose configurations differ in seed and directory only are a group: their figures are
a mean and a sample deviation. The page needs no other file; plots are PNG in the page.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2

from spml_fast import __version__
from spml_fast.analysis.report.decisions import (
    calibration_plot,
    decision_classes,
    decision_record,
    decision_summary,
)
from spml_fast.analysis.report.health import health
from spml_fast.analysis.report.plots import class_plots, curve_plots
from spml_fast.analysis.report.tables import (
    alpha_text,
    class_ap,
    class_groups,
    class_tables,
    conventions,
    group_runs,
    option_table,
    option_text,
    setup_rows,
    summary,
    training_counts,
)
from spml_fast.core.errors import UserError
from spml_fast.runs.read import Run, read_run


def make_page(folders: Sequence[Path]) -> str:
    """The page about these run directories, in their order.

    Raises:
        UserError: none given, one given twice, or one that is no run directory.
    """
    if not folders:
        raise UserError("no run given; name one run directory or more")
    seen: dict[str, Path] = {}
    for folder in folders:
        real = os.path.realpath(folder)
        if real in seen:
            raise UserError(f"{folder} is given twice")
        seen[real] = folder
    runs = [read_run(folder) for folder in folders]
    groups = group_runs(runs)
    names = next((r.classes for r in runs if r.classes is not None), None)
    widths = {len(ap) for g in groups if (ap := class_ap(g)) is not None}
    same_classes = len(widths) == 1 and len({tuple(r.classes) for r in runs if r.classes is not None}) <= 1
    if names is None or widths != {len(names)}:
        names = [str(i) for i in range(next(iter(widths), 0))]
    counts = training_counts(groups) if same_classes else [None] * len(groups)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spml_fast.analysis.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    compared = len(groups) > 1
    records = [[decision_record(run) for run in group.runs] for group in groups]
    title = f"{len(runs)} runs" if len(runs) > 1 else f"{groups[0].label}: {runs[0].folder.name}"
    return environment.get_template("report.html").render(
        title=title,
        version=__version__,
        groups=groups,
        compared=compared,
        summary=summary(groups),
        setup=setup_rows(runs),
        averaged=any(len(g.runs) > 1 for g in groups),
        conventions=conventions(groups),
        options=option_table(groups) if compared else [],
        all_options=[] if compared else [(k, option_text(v)) for k, v in runs[0].options.items()],
        curves=curve_plots(groups),
        classes=class_plots(groups, counts) if same_classes else [],
        class_tables=class_tables(groups, names) if same_classes else [],
        class_groups=class_groups(groups),
        decisions=decision_summary(groups, records),
        calibration=calibration_plot(groups, records),
        decision_classes=[
            (str(run.folder), decision_classes(record))
            for group, found in zip(groups, records, strict=True)
            for run, record in zip(group.runs, found, strict=True)
            if record is not None
        ],
        other_classes=bool(widths) and not same_classes,
        no_counts=same_classes and any(c is None for c in counts),
        health=[(str(r.folder), health(r)) for r in runs],
        places=[
            (g.label, str(r.folder), option_text(r.options.get("run.seed")), _best(r)) for g in groups for r in g.runs
        ],
    )


def _best(run: Run) -> str:
    """Test mAP of one run at every alpha, and its best epoch."""
    maps = ", ".join(f"{alpha_text(a)}: {m['map']:.2f}" for a, m in run.alphas.items() if m.get("map") is not None)
    results = run.results or {}
    epoch, linear = results.get("best_epoch"), "linear " if results.get("best_phase") == "linear" else ""
    return (maps or "-") + ("" if epoch is None else f" ({linear}epoch {epoch})")

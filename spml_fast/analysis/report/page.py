"""One HTML page about one run or several: figures, curves, classes, mistakes, and signs of trouble.

Everything comes from the files that a run leaves (config.yaml, metrics.jsonl, results.json, evaluation.json,
decisions.json, classes.txt) and, where it can be opened, from its data set. The page names what is missing, and leaves
out what it would show of it. Runs whose configurations differ in seed and directory only are a group: their figures are
a mean and a sample deviation, and every run is a dot. The page is one file that loads nothing; charts are SVG in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spml_fast import __version__
from spml_fast.analysis.pages.inline import render_page
from spml_fast.analysis.report import charts
from spml_fast.analysis.report.classes import class_data
from spml_fast.analysis.report.confusion import HEAD, confusion_sections
from spml_fast.analysis.report.coverage import coverage, replaced_images, unknown_positive_fraction
from spml_fast.analysis.report.data_sets import (
    CLASS_LABELS,
    COUNTS,
    MISTAKES,
    REJECTED,
    DataSets,
    page_notes,
    terminal_notes,
    training_counts,
)
from spml_fast.analysis.report.decisions import (
    calibration_charts,
    calibration_errors,
    calibrations,
    decision_record,
    decision_summary,
    evaluation_record,
)
from spml_fast.analysis.report.groups import (
    RunGroup,
    alpha_text,
    class_ap,
    class_groups,
    conventions,
    group_runs,
    mean_text,
    option_table,
    option_text,
    setup_rows,
    summary,
)
from spml_fast.analysis.report.health import health
from spml_fast.analysis.report.mistakes import shown_mistakes
from spml_fast.analysis.report.timing import duration_text, time_section
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.runs.read import Run, number, read_run

PACKAGE = "spml_fast.analysis.report"
SCRIPTS = ("table.js", "curves.js", "report.js")
# Images of each kind that are shown of a setting, unless told otherwise.
IMAGES = 12
# What the page may lack, by the section that says so.
ABSENT = {"mistakes": MISTAKES, "selected": REJECTED, "classes": CLASS_LABELS, "data": COUNTS}


def make_page(
    folders: Sequence[Path],
    images: int = 0,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """The page about these run directories, in their order.

    Args:
        folders: run directories.
        images: of each kind of mistake that are shown of each setting; 0 for none.
        device: where networks run for the maps of images; the CPU unless given.
        say: called with what takes a while.

    Raises:
        UserError: none given, one given twice, or one that is no run directory.
    """
    runs = _read(folders)
    groups = group_runs(runs)
    data = DataSets()
    evaluations = [[evaluation_record(run) for run in group.runs] for group in groups]
    decisions = [[decision_record(run) for run in group.runs] for group in groups]
    names, same = _class_names(groups, runs)
    counts, absent = training_counts(groups, data) if same and names else ([None] * len(groups), [])
    device = torch.device("cpu") if device is None else device
    mistakes, selected, undrawn = shown_mistakes(groups, evaluations, images, device, data, say)
    covered, uncounted = coverage(groups, data)
    absent = [*undrawn, *absent, *uncounted]
    for sentence in terminal_notes(absent):
        say(sentence)
    calibrated = calibrations(groups, evaluations, decisions)
    compared = len(groups) > 1
    values: dict[str, Any] = {
        "title": f"{len(runs)} runs" if len(runs) > 1 else groups[0].label,
        "about": _about(runs),
        "version": __version__,
        "groups": groups,
        "several": len(runs) > 1,
        "compared": compared,
        "averaged": any(len(g.runs) > 1 for g in groups),
        "tiles": [] if len(runs) > 1 else _tiles(runs[0]),
        "summary": summary(groups),
        "comparison": charts.comparison_charts(groups) if len(runs) > 1 else [],
        "setup": setup_rows(runs),
        "options": option_table(groups) if compared else [],
        "all_options": [] if compared else [(k, option_text(v)) for k, v in groups[0].options.items()],
        "curves": charts.epoch_charts(groups, charts.panel_names(runs)),
        "selection": _selection_charts(groups, runs, data),
        "selected": selected,
        "classes": class_data(groups, names, counts, evaluations, decisions) if same and names else None,
        "class_charts": charts.class_charts(groups, counts) if same else [],
        "other_classes": not same,
        "mistakes": mistakes,
        "absent": {part: page_notes(absent, name) for part, name in ABSENT.items()},
        "decisions": decision_summary(groups, decisions),
        "calibration": calibration_charts(calibrated),
        "calibrated": any(one.end("after") for one in calibrated),
        "calibration_errors": calibration_errors(calibrated),
        "confusions": confusion_sections(groups, evaluations, [printable(name) for name in names]) if same else [],
        "confusion_head": HEAD,
        "class_groups": class_groups(groups),
        "conventions": conventions(groups),
        "time": time_section(groups),
        "coverage": covered,
        "replaced": replaced_images(groups),
        "health": _health(runs),
        "places": [(run.name, str(run.folder), option_text(run.options.get("run.seed")), _best(run)) for run in runs],
    }
    return render_page(PACKAGE, "report.html", ["report.css"], SCRIPTS, values)


def _read(folders: Sequence[Path]) -> list[Run]:
    if not folders:
        raise UserError("no run given; name one run directory or more")
    seen = set[str]()
    for folder in folders:
        real = os.path.realpath(folder)
        if real in seen:
            raise UserError(f"{folder} is given twice")
        seen.add(real)
    return [read_run(folder) for folder in folders]


def _class_names(groups: Sequence[RunGroup], runs: Sequence[Run]) -> tuple[list[str], bool]:
    """Names of the classes, and whether all runs have the same; numbers where no run has names."""
    lists = {tuple(r.classes) for r in runs if r.classes is not None}
    widths = {len(ap) for g in groups if (ap := class_ap(g)) is not None} | set(map(len, lists))
    if len(lists) > 1 or len(widths) > 1:
        return [], False
    return list(next(iter(lists))) if lists else [str(i) for i in range(next(iter(widths), 0))], True


def _about(runs: Sequence[Run]) -> str:
    """What the page is about, below its title."""
    sets = dict.fromkeys(Path(str(r.options.get("data.dir") or "digits")).name for r in runs)
    folders = str(runs[0].folder) if len(runs) == 1 else f"{len(runs)} run directories"
    return printable(f"{', '.join(sets)}; {folders}")


def _health(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(runs, what is wrong with them): what several runs have in common is said once."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for note in health(run):
            found.setdefault(note, []).append(run.name)
    every = len(runs) if len(runs) > 2 else 0
    return [("all runs" if len(names) == every else "; ".join(names), note) for note, names in found.items()]


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """(name, figure, what else is to be said) of a single run; figures that are not there are left out."""
    tiles = [
        (f"test mAP, {alpha_text(alpha)}", f"{value:.2f}", "%")
        for alpha, metrics in run.alphas.items()
        if (value := number(metrics.get("map"))) is not None
    ]
    headline, figures = run.alphas.get(run.headline or "", {}), run.figures
    decided = headline.get("decisions") or {}
    for name in ("OF1", "CF1"):
        value = number(decided.get(name)) if decided else number(headline.get(name))
        if value is not None:
            tiles.append((f"test {name}, {'own thresholds' if decided else 'at 0.5'}", f"{value:.2f}", "%"))
    if (error := charts.calibration_error(run)) is not None:
        tiles.append(("calibration error", f"{error:.2f}", "%"))
    if (best := number(figures.get("best_val_map"))) is not None:
        epoch = figures.get("best_epoch")
        tiles.append(("best validation mAP" if epoch is None else f"validation mAP, epoch {epoch}", f"{best:.2f}", "%"))
    tiles.append(("epochs", str(len(run.epochs)), f"of {run.planned_epochs}"))
    if (rate := number(figures.get("images_per_second"))) is not None:
        tiles.append(("speed", f"{rate:,.0f}", "images/s"))
    if (seconds := number(figures.get("train_seconds"))) is not None:
        tiles.append(("training time", duration_text(seconds), ""))
    return tiles


def _selection_charts(groups: Sequence[RunGroup], runs: Sequence[Run], data: DataSets) -> list[charts.Figure]:
    names = charts.selection_names(runs)
    guesses = [unknown_positive_fraction(g.runs[0], data) for g in groups] if "selection_precision" in names else None
    return charts.epoch_charts(groups, names, guesses)


def _best(run: Run) -> str:
    """Test mAP of one run at every alpha, and its best epoch."""
    maps = ", ".join(f"{alpha_text(a)}: {mean_text([m.get('map')])}" for a, m in run.alphas.items())
    results = run.results or {}
    epoch, linear = results.get("best_epoch"), "linear " if results.get("best_phase") == "linear" else ""
    return (maps or "-") + ("" if epoch is None else f" ({linear}epoch {epoch})")

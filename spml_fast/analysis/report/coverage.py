"""What is known of the images of a data set, and which images were left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spml_fast.analysis.report.groups import RunGroup
from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text
from spml_fast.core.text import parse_json
from spml_fast.runs.read import Run, number

Table = tuple[list[str], list[list[str]]]
CODES = ("positive", "negative", "unknown")


def data_folder(run: Run) -> Path | None:
    """The run's data set; None where it is not there any more."""
    folder = run.options.get("data.dir")
    return Path(folder) if folder is not None and Path(folder, "manifest.json").is_file() else None


def _report(folder: Path) -> dict[str, Any] | None:
    """What preparation counted; None where that cannot be read."""
    try:
        report = parse_json(read_text(folder / "report.json"))
        splits = report["splits"]
        for split in splits.values():
            counts = [split["samples"], *(split[w][c] for w in ("known", "observed") for c in CODES)]
            if not all(isinstance(count, int) for count in counts):
                return None
        return dict(splits)
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return None


def unknown_positive_fraction(run: Run) -> float | None:
    """Fraction of the training split's unknown labels that are hidden positives; None where that is not known."""
    folder = data_folder(run)
    splits = None if folder is None else _report(folder)
    split = (splits or {}).get(str(run.options.get("data.train_split", "train")))
    if split is None:
        return None
    hidden = split["known"]["positive"] - split["observed"]["positive"]
    # Where labels are not known either, nothing tells.
    unknown = split["observed"]["unknown"] - split["known"]["unknown"]
    return hidden / unknown if unknown > 0 and hidden > 0 else None


def coverage(groups: Sequence[RunGroup]) -> list[tuple[str, Table]]:
    """For each data set of the runs its folder, and a row for each split: images, known labels, those left out."""
    folders: dict[Path, None] = {}
    for group in groups:
        for run in group.runs:
            if (folder := data_folder(run)) is not None:
                folders.setdefault(folder)
    head = ["split", "images", "left out", "known positive", "known negative", "not known"]
    head += ["training sees positive", "training sees negative", "training sees as unknown"]
    found = []
    for folder in folders:
        splits = _report(folder)
        if splits is None:
            continue
        rows = []
        for name, split in splits.items():
            left_out = number(split.get("left_out"))
            row = [name, f"{split['samples']:,}", "-" if left_out is None else f"{left_out:,.0f}"]
            for which in ("known", "observed"):
                total = sum(split[which][code] for code in CODES)
                row += [
                    f"{split[which][code]:,}" + (f" ({split[which][code] / total:.1%})" if total else "")
                    for code in CODES
                ]
            rows.append(row)
        found.append((str(folder), (head, rows)))
    return found


def replaced_images(groups: Sequence[RunGroup]) -> list[tuple[str, int]]:
    """Runs that could not use some of their training images, and how many those were."""
    counts = [(r.name, number(r.epochs[-1].get("bad_images"))) for g in groups for r in g.runs if r.epochs]
    return [(name, int(count)) for name, count in counts if count]

"""What is known of the images of a data set, and which images were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spml_fast.analysis.report.data_sets import COUNTS, Absence, DataSets, SplitCounts
from spml_fast.analysis.report.groups import RunGroup
from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text
from spml_fast.core.text import parse_json
from spml_fast.data.manifest import Manifest
from spml_fast.runs.read import Run, number

Table = tuple[list[str], list[list[str]]]
CODES = ("positive", "negative", "unknown")
HEAD = [
    *("split", "images", "left out", "known positive", "known negative", "not known"),
    *("training sees positive", "training sees negative", "training sees as unknown"),
]


def unknown_positive_fraction(run: Run, data: DataSets) -> float | None:
    """Fraction of the training split's unknown labels that are hidden positives; None where that is not known.

    Args:
        run: of the report.
        data: of its runs.
    """
    try:
        split = data.counts(run).get(str(run.options.get("data.train_split", "train")))
    except UserError:
        # The page says so where the counts would stand.
        return None
    if split is None:
        return None
    hidden = split.known["positive"] - split.observed["positive"]
    # Where labels are not known either, nothing tells.
    unknown = split.observed["unknown"] - split.known["unknown"]
    return hidden / unknown if unknown > 0 and hidden > 0 else None


def coverage(groups: Sequence[RunGroup], data: DataSets) -> tuple[list[tuple[str, Table]], list[Absence]]:
    """For each data set of the runs its place, and a row for each split: images, known labels, those left out.

    Args:
        groups: of the report.
        data: of its runs.
    """
    found: dict[Manifest, tuple[str, Table]] = {}
    absences: dict[Absence, None] = {}
    for group in groups:
        for run in group.runs:
            try:
                counts, manifest = data.counts(run), data.of(run)
            except UserError as error:
                absences.setdefault(Absence(COUNTS, group.label, str(error)))
                continue
            if manifest not in found:
                left_out = _left_out(manifest)
                rows = [_row(name, split, left_out.get(name)) for name, split in counts.items()]
                found[manifest] = (str(manifest.source), (HEAD, rows))
    return list(found.values()), list(absences)


def _left_out(manifest: Manifest) -> Mapping[str, float]:
    """Images that preparation could not use, by split; without those of which its report does not tell."""
    try:
        splits: dict[str, Any] = parse_json(read_text(manifest.folder / "report.json"))["splits"]
        counts = {name: number(split.get("left_out")) for name, split in splits.items()}
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        # It is a report for people; the labels themselves are whole.
        return {}
    return {name: count for name, count in counts.items() if count is not None}


def _row(name: str, split: SplitCounts, left_out: float | None) -> list[str]:
    row = [name, f"{split.images:,}", "-" if left_out is None else f"{left_out:,.0f}"]
    for labels in (split.known, split.observed):
        total = sum(labels.values())
        row += [f"{labels[code]:,}" + (f" ({labels[code] / total:.1%})" if total else "") for code in CODES]
    return row


def replaced_images(groups: Sequence[RunGroup]) -> list[tuple[str, int]]:
    """Runs that could not use some of their training images, and how many those were."""
    counts = [(r.name, number(r.epochs[-1].get("bad_images"))) for g in groups for r in g.runs if r.epochs]
    return [(name, int(count)) for name, count in counts if count]

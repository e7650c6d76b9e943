"""The data sets of a report's runs, each opened once, and what the page lacks where one cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from spml_fast.analysis.report.groups import RunGroup
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.labels import POSITIVE
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.build import count_labels
from spml_fast.runs.read import Run

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

# Parts of the page that need a data set, as its sentences name them.
MISTAKES, REJECTED = "images of mistakes", "images of rejected labels"
CLASS_LABELS, COUNTS = "labels of each class in training", "counts of images and labels"
PARTS = (MISTAKES, REJECTED, CLASS_LABELS, COUNTS)


@dataclass(frozen=True)
class Absence:
    """Something that the page lacks.

    Attributes:
        part: which of `PARTS`.
        setting: whose it is, as the page calls it.
        reason: why; a sentence without its full stop.
    """

    part: str
    setting: str
    reason: str


def page_notes(absences: Iterable[Absence], part: str) -> list[str]:
    """Sentences that stand in the place of a part: one for each reason."""
    settings: dict[str, list[str]] = {}
    for one in absences:
        if one.part == part:
            settings.setdefault(one.reason, []).append(one.setting)
    # Reasons name files, and begin as file names do.
    return [
        f"{part.capitalize()} of {'; '.join(dict.fromkeys(names))} are not shown: {printable(reason)}."
        for reason, names in settings.items()
    ]


def terminal_notes(absences: Sequence[Absence]) -> list[str]:
    """The same for a terminal: one sentence for each reason, with all parts that it takes away."""
    found = []
    for reason in dict.fromkeys(one.reason for one in absences):
        same = [one for one in absences if one.reason == reason]
        *most, last = (part for part in PARTS if any(one.part == part for one in same))
        parts = f"{', '.join(most)} and {last}" if most else last
        settings = "; ".join(dict.fromkeys(one.setting for one in same))
        found.append(f"note: the page is without {parts} of {settings}, and says so there: {reason}")
    return found


@dataclass(frozen=True)
class SplitCounts:
    """What is known of a split's images.

    Attributes:
        images: of the split.
        known: pairs of image and class that are annotated `positive`, `negative` or not (`unknown`).
        observed: the same, as training sees them.
    """

    images: int
    known: dict[str, int]
    observed: dict[str, int]


def _once(known: dict[Key, Value | UserError], key: Key, make: Callable[[], Value]) -> Value:
    """What `make` gives, made once for each key; a `UserError` of it is kept, and raised every time."""
    if key not in known:
        try:
            known[key] = make()
        except UserError as error:
            known[key] = error
    found = known[key]
    if isinstance(found, UserError):
        raise UserError(str(found))
    return found


class DataSets:
    """Opens the data sets of runs: each once, since one on object storage that does not answer takes a while."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, ...], Manifest | UserError] = {}
        self._counted: dict[Manifest, dict[str, SplitCounts] | UserError] = {}

    def of(self, run: Run) -> Manifest:
        """The data set of a run, where its options say. Raises `UserError` where it is not there."""
        folder, *more = (run.options.get(f"data.{name}") for name in ("dir", "image_root", "cache_dir"))

        def opened() -> Manifest:
            if folder is None:
                raise UserError("the run does not say where its data set is")
            return Manifest(folder, *more)

        return _once(self._opened, tuple(map(str, (folder, *more))), opened)

    def counts(self, run: Run) -> dict[str, SplitCounts]:
        """Images and labels of every split, counted in the label arrays: no image is read. `UserError` as `of`."""
        manifest = self.of(run)

        def counted() -> dict[str, SplitCounts]:
            return {
                name: SplitCounts(len(split), count_labels(split.known), count_labels(split.observed))
                for name, split in manifest.splits.items()
            }

        return _once(self._counted, manifest, counted)


def training_counts(groups: Sequence[RunGroup], data: DataSets) -> tuple[list[np.ndarray | None], list[Absence]]:
    """Observed positives of every class in each group's training split, int64 [C]; None without its data set.

    Args:
        groups: of the report.
        data: of its runs.
    """
    counts: list[np.ndarray | None] = []
    absences = []
    for group in groups:
        run = group.runs[0]
        try:
            split = data.of(run).split(str(run.options.get("data.train_split", "train")))
            counts.append(np.asarray(split.observed.class_counts(POSITIVE)))
        except UserError as error:
            counts.append(None)
            absences.append(Absence(CLASS_LABELS, group.label, str(error)))
    return counts, absences

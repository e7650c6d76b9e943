"""Small OpenImages releases, prepared in the process of the test, and their labels read in the plainest way."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.make_openimages import Release
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.datasets.openimages.grouping import Conflicts, Grouped, group_rows
from spml_fast.prepare.datasets.openimages.label_files import read_labels
from tests.support.prepare import prepare

# Images of each split of a small release.
SMALL_RELEASE = {"train": 60, "validation": 12, "test": 15}
LABEL_HEADER = "ImageID,Source,LabelName,Confidence\n"

# (image id, class id) -> code.
Labels = dict[tuple[int, str], int]


def prepare_release(
    release: Release, out: Path, *options: object, images: object = None, labels: Sequence[object] = ()
) -> Manifest:
    """Prepare a release.

    Args:
        release: the files.
        out: Manifest to write.
        options: more words of the command line.
        images: image folder; None for the release's own, if it has one.
        labels: label files; empty for all of the release.
    """
    chosen = labels or release.labels.values()
    arguments = ["openimages", "--labels", *chosen, "--classes", release.classes]
    arguments += ["--descriptions", release.descriptions, "--images", images or release.images or "none"]
    return prepare(*arguments, "--out", out, *options)


def read_plainly(path: Path) -> list[tuple[int, str, float]]:
    """Rows of a label file: id, class id, confidence; by the standard library, a line at a time."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(int(r["ImageID"], 16), r["LabelName"], float(r["Confidence"])) for r in csv.DictReader(file)]


def labels_of(split: Split, labels: SparseLabels, class_ids: Sequence[str]) -> Labels:
    """Everything that is listed in labels of a split."""
    assert split.ids is not None
    rows = labels.entry_rows()
    entries = zip(split.ids[rows].tolist(), labels.classes.tolist(), labels.codes.tolist(), strict=True)
    listed = {(image, class_ids[c]): code for image, c, code in entries}
    assert len(listed) == len(labels.codes)
    return listed


def expected_labels(path: Path, class_ids: Sequence[str]) -> Labels:
    """What a file of verified labels says of some classes."""
    wanted = set(class_ids)
    return {(image, name): int(value) for image, name, value in read_plainly(path) if name in wanted}


def write_labels(
    path: Path, rows: Sequence[tuple[int, str, object]], source: str = "verification", end: str = "\n"
) -> Path:
    """Write a label file of rows, and return its path.

    Args:
        path: the file.
        rows: (image id, class id, confidence) each.
        source: their Source.
        end: what ends a line.
    """
    lines = [LABEL_HEADER.strip()] + [f"{image:016x},{source},{name},{value}" for image, name, value in rows]
    path.write_text("".join(line + end for line in lines), newline="")
    return path


def group_files(
    paths: Sequence[Path],
    conflicts: Conflicts = "positive",
    machine: Path | None = None,
    classes: Sequence[str] = ("/m/0a", "/m/0b"),
    threshold: float = 0.5,
) -> Grouped:
    """Read label files and group their rows by image.

    Args:
        paths: files of verified labels.
        conflicts: as in `group_rows`.
        machine: a file of machine labels.
        classes: wanted class ids.
        threshold: confidence from which on a machine label counts.
    """
    machine_rows = None if machine is None else read_labels([machine], classes, threshold)
    return group_rows(read_labels(paths, classes), machine_rows, len(classes), conflicts)


@dataclass
class PlainlyGrouped:
    """What `Grouped` says, as dictionaries of (image id, class number)."""

    ids: list[int]
    human: dict[tuple[int, int], int]
    machine: dict[tuple[int, int], int]
    named: int
    repeated: int
    conflicts: int
    overruled: int


def group_plainly(
    paths: Sequence[Path], machine: Sequence[Path], classes: Sequence[str], conflicts: Conflicts, threshold: float
) -> PlainlyGrouped:
    """Labels by image, a row at a time.

    Args:
        paths: files of verified labels.
        machine: files of machine labels.
        classes: wanted class ids.
        conflicts: as in `group_rows`.
        threshold: confidence from which on a machine label counts.
    """
    number = {name: i for i, name in enumerate(classes)}
    verified: dict[tuple[int, int], list[int]] = defaultdict(list)
    guessed: dict[tuple[int, int], int] = defaultdict(int)
    named = set()
    for image, name, value in (row for path in paths for row in read_plainly(path)):
        named.add(image)
        if name in number:
            verified[image, number[name]].append(int(value))
    for image, name, value in (row for path in machine for row in read_plainly(path)):
        named.add(image)
        if name in number and value >= threshold:
            guessed[image, number[name]] += 1
    choices: dict[str, Callable[[list[int]], int]] = {"negative": min, "last": lambda codes: codes[-1]}
    choose = choices.get(conflicts, max)
    contradictory = {pair for pair, codes in verified.items() if len(set(codes)) == 2}
    human = {p: choose(codes) for p, codes in verified.items() if conflicts != "drop" or p not in contradictory}
    alone = {pair: 1 for pair in guessed if pair not in verified}
    return PlainlyGrouped(
        sorted({image for image, _ in (*human, *alone)}),
        human,
        alone,
        len(named),
        sum(len(codes) - 1 for codes in verified.values()),
        len(contradictory),
        sum(rows for pair, rows in guessed.items() if pair in verified),
    )

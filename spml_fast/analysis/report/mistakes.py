"""Thumbnails with maps: labels that a run contradicts most, and labels that its method took for positives.

Which ones they are stands in the run (`evaluation.json`, `metrics.jsonl`), so that no split is gone through again: of
each run its weights are loaded, and the images that are shown go through the network once, for their maps.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from spml_fast.analysis.report.data_sets import MISTAKES, REJECTED, Absence, DataSets
from spml_fast.analysis.report.decisions import Record
from spml_fast.analysis.report.groups import RunGroup
from spml_fast.analysis.review.pictures import Pictures, collect, encoded_map, map_scale
from spml_fast.analysis.suggest import Suggestions
from spml_fast.core.errors import UserError
from spml_fast.core.io import printable
from spml_fast.data.labels import POSITIVE, UNKNOWN
from spml_fast.data.manifest import Split
from spml_fast.runs.read import Run

# Pixels of a thumbnail's longer side.
SIDE = 160
# Epochs of which rejected or corrected labels are shown, evenly spaced.
EPOCHS = 4
# Classes of an image that are named.
NAMED = 5


@dataclass(frozen=True)
class Card:
    """An image, a class, and the class's map.

    Attributes:
        src: address of the thumbnail within the page.
        width: of the thumbnail.
        height: of the thumbnail.
        cells: the map, int8 in base64; "" without one.
        class_name: whose label it is about.
        text: what is to be said of the label.
        right: whether the method was right; None where that is not known or not asked.
        there: classes that the image is known to have.
        path: of the image.
    """

    src: str
    width: int
    height: int
    cells: str
    class_name: str
    text: str
    right: bool | None
    there: str
    path: str


@dataclass(frozen=True)
class Sheet:
    """Cards under a heading.

    Attributes:
        title: heading.
        cards: at least one.
        grid: [h, w] of the maps; None without any.
    """

    title: str
    cards: list[Card]
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Wanted:
    """A label to show: sample, path, class, what is said of it, and whether the method was right."""

    sample: int
    path: str
    class_id: int
    text: str
    right: bool | None = None


def hardest_labels(record: Record, count: int) -> list[tuple[str, list[Wanted]]]:
    """The hardest false positives and misses of a record, the hardest first.

    Args:
        record: of an evaluation.
        count: of each kind at most.
    """
    titles = {"false_positives": "Hardest false positives", "misses": "Hardest misses"}
    found = []
    for name, title in titles.items():
        rows = [
            Wanted(int(sample), str(path), int(class_id), f"probability {probability:.3f}")
            for sample, path, class_id, probability in record[name][:count]
        ]
        found.append((title, rows))
    return [(title, rows) for title, rows in found if rows]


def selected_labels(run: Run, count: int) -> list[tuple[str, list[Wanted]]]:
    """Labels that the method took for positives at the ends of some epochs.

    Args:
        run: whose log notes them.
        count: of each epoch at most.
    """
    epochs = [(e["epoch"], rows) for e in run.epochs if (rows := _logged_labels(e, len(run.classes or [])))]
    places = np.unique(np.linspace(0, len(epochs) - 1, min(EPOCHS, len(epochs))).round().astype(int))
    return [(f"Epoch {epochs[k][0]}", epochs[k][1][:count]) for k in places.tolist()]


TOLD = {True: "right: a hidden positive", False: "wrong: not there", None: "the truth is not known"}


def _logged_labels(epoch: dict[str, Any], classes: int) -> list[Wanted]:
    """The labels that an epoch's line notes; none where it is damaged."""
    try:
        rows = [
            Wanted(int(sample), str(path), int(class_id), TOLD[right], right)
            for sample, path, class_id, right in epoch.get("selected_examples", ())
        ]
    except (TypeError, ValueError, KeyError, OverflowError):
        return []
    return [one for one in rows if 0 <= one.class_id < classes and one.sample >= 0]


def open_split(run: Run, name: str, data: DataSets) -> Split:
    """A split of the run's data set.

    Args:
        run: of the report.
        name: of the split.
        data: of the report's runs.

    Raises:
        UserError: it is not there, or has other classes now.
    """
    manifest = data.of(run)
    if manifest.classes != run.classes:
        raise UserError(f"{manifest.source} has other classes than the run")
    return manifest.split(name)


def _readable(split: Split, wanted: Sequence[Wanted]) -> list[Wanted]:
    """Those whose image is where it was, under the same path.

    Raises:
        UserError: none of them is.
    """
    same = [one for one in wanted if one.sample < len(split) and split.relative_path(one.sample) == one.path]
    if not same:
        raise UserError("the data set has other images than when the run was made")
    there = same if split.shards is not None else [one for one in same if os.path.isfile(split.path(one.sample))]
    if not there:
        raise UserError(f"the data set's images are not in {printable(str(split.image_root))} any more")
    return there


def sheets(
    run: Run, split_name: str, wanted: Sequence[tuple[str, list[Wanted]]], device: torch.device, data: DataSets
) -> list[Sheet]:
    """Labels with their images and maps.

    Args:
        run: whose network draws the maps.
        split_name: of the images.
        wanted: titles with labels.
        device: where the network runs.
        data: of the report's runs.

    Raises:
        UserError: the images, or the run's weights, cannot be used; the sentence says why.
    """
    try:
        split = open_split(run, split_name, data)
        _readable(split, [one for _, rows in wanted for one in rows])
        kept = [(title, _these(split, rows)) for title, rows in wanted]
        pairs = sorted({(one.sample, one.class_id) for _, rows in kept for one in rows})
        index, class_id = np.array(pairs, np.int64).T
        # Which label it is does not matter to pictures.
        asked = Suggestions(UNKNOWN, index, class_id, np.ones(len(pairs)), len(pairs), (str(run.folder),))
        pictures = collect([asked], split, split.known.num_classes, device, SIDE)
    except (OSError, ValueError) as error:
        raise UserError(f"the images cannot be read: {error}") from error
    return _filled(run, split, kept, pictures)


def _these(split: Split, rows: list[Wanted]) -> list[Wanted]:
    try:
        return _readable(split, rows) if rows else []
    except UserError:
        # Others of the sheets are there.
        return []


def _filled(run: Run, split: Split, wanted: Sequence[tuple[str, list[Wanted]]], pictures: Pictures) -> list[Sheet]:
    names = run.classes or []
    maps = list(pictures.maps.values())
    scale = map_scale(maps)
    grid = (int(maps[0].shape[0]), int(maps[0].shape[1])) if maps else None
    out = []
    for title, rows in wanted:
        cards = []
        for one in rows:
            thumbnail, cells = pictures.thumbnails[one.sample], pictures.maps.get((one.sample, one.class_id))
            if not thumbnail.jpeg:
                continue
            there = np.flatnonzero(split.known.rows([one.sample])[0] == POSITIVE).tolist()
            text = ", ".join(printable(names[c]) for c in there[:NAMED]) + (" ..." if len(there) > NAMED else "")
            src = "data:image/jpeg;base64," + base64.b64encode(thumbnail.jpeg).decode()
            drawn = "" if cells is None else encoded_map(cells, scale)
            name, path = printable(names[one.class_id]), printable(one.path)
            size = thumbnail.width, thumbnail.height
            cards.append(Card(src, *size, drawn, name, one.text, one.right, text, path))
        if cards:
            out.append(Sheet(title, cards, grid))
    return out


Sheets = list[tuple[str, list[Sheet]]]


def shown_mistakes(
    groups: Sequence[RunGroup],
    evaluations: Sequence[Sequence[Record | None]],
    count: int,
    device: torch.device,
    data: DataSets,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Sheets, Sheets, list[Absence]]:
    """Sheets of the first run of each setting that has any.

    Args:
        groups: of the report.
        evaluations: of the runs of each group.
        count: images of each sheet at most; 0 for no images.
        device: where networks run.
        data: of the report's runs.
        say: called with what is being done.

    Returns:
        (run, hardest false positives and misses), (run, what the method took for positives), and what is not shown.
    """
    found: dict[str, Sheets] = {MISTAKES: [], REJECTED: []}
    absences = []
    for group, records in zip(groups, evaluations, strict=True) if count else ():
        for part, run, split, wanted in _jobs(group, records, count):
            try:
                # Before it is told that images are drawn.
                open_split(run, split, data)
                say(f"drawing {part} of {printable(run.name)}, {split} split")
                if drawn := sheets(run, split, wanted, device, data):
                    found[part].append((run.name, drawn))
            except UserError as error:
                absences.append(Absence(part, group.label, str(error)))
    return found[MISTAKES], found[REJECTED], absences


def _jobs(
    group: RunGroup, records: Sequence[Record | None], count: int
) -> list[tuple[str, Run, str, list[tuple[str, list[Wanted]]]]]:
    """What is drawn of a setting: (part of the page, run, split, labels by title)."""
    jobs = []
    first = next(((run, record) for run, record in zip(group.runs, records, strict=True) if record), None)
    if first is not None:
        run, record = first
        jobs.append((MISTAKES, run, str(record["split"]), hardest_labels(record, count)))
    logged = next((run for run in group.runs if selected_labels(run, 1)), None)
    if logged is not None:
        train = str(logged.options.get("data.train_split", "train"))
        jobs.append((REJECTED, logged, train, selected_labels(logged, count)))
    return [job for job in jobs if job[-1]]

"""Rows of OpenImages grouped by image: contradictions, machine labels, any order, many classes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.make_openimages import make_release
from spml_fast.data.sparse_labels import SparseLabels
from spml_fast.prepare.datasets.openimages import csv_blocks, grouping
from spml_fast.prepare.datasets.openimages.grouping import group_rows
from spml_fast.prepare.datasets.openimages.label_files import read_labels
from tests.support.openimages import (
    LABEL_HEADER,
    expected_labels,
    group_files,
    group_plainly,
    write_labels,
)

A, B, C = "/m/0a", "/m/0b", "/m/0c"
CONFLICTING = [(1, A, 1), (1, A, 0), (2, A, 0), (2, A, 1), (2, B, 1), (3, A, 1), (3, A, 1), (4, B, 0), (5, C, 1)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("positive", {1: [1, -1], 2: [1, 1], 3: [1, -1], 4: [-1, 0]}),
        ("negative", {1: [0, -1], 2: [0, 1], 3: [1, -1], 4: [-1, 0]}),
        ("last", {1: [0, -1], 2: [1, 1], 3: [1, -1], 4: [-1, 0]}),
        ("drop", {2: [-1, 1], 3: [1, -1], 4: [-1, 0]}),
    ],
)
def test_contradictions(tmp_path, policy, expected):
    # The rows of an image lie apart, in two files.
    first = write_labels(tmp_path / "a.csv", CONFLICTING[4:] + CONFLICTING[:1])
    second = write_labels(tmp_path / "b.csv", CONFLICTING[1:4], "crowdsource-verification")
    grouped = group_files([first, second], policy)
    assert grouped.ids.tolist() == list(expected)
    assert grouped.human.rows(range(len(expected))).tolist() == list(expected.values())
    assert (grouped.named, grouped.repeated, grouped.conflicts, grouped.machine) == (5, 3, 2, None)


def test_machine_labels(tmp_path):
    human = write_labels(tmp_path / "human.csv", [(1, A, 0), (1, A, 1), (2, A, 0), (3, C, 1), (4, B, 1)])
    rows = [(1, A, 0.9), (1, B, 0.7), (2, A, 1.0), (2, A, 0.9), (2, B, 0.6), (3, C, 1.0), (5, B, 0.8), (5, B, 0.7)]
    machine = write_labels(tmp_path / "machine.csv", rows, "machine")
    grouped = group_files([human], "drop", machine, threshold=0.7)
    assert grouped.ids.tolist() == [1, 2, 4, 5]
    assert grouped.human.rows(range(4)).tolist() == [[-1, -1], [0, -1], [-1, 1], [-1, -1]]
    # A contradicted pair has been verified, so the machine has no say in it.
    assert grouped.machine is not None
    assert grouped.machine.rows(range(4)).tolist() == [[-1, 1], [-1, -1], [-1, -1], [-1, 1]]
    assert (grouped.repeated, grouped.conflicts, grouped.overruled) == (1, 1, 3)
    assert group_files([human], "positive", machine, threshold=0.7).human.rows([0]).tolist() == [[1, -1]]


def test_order_of_the_file_does_not_matter(tmp_path):
    sizes = {"images": {"train": 3000}, "rows": {"train": 20_000}, "classes": 200, "other_classes": 20}
    made = make_release(tmp_path / "a", "v7", order="shuffled", **sizes)
    lines = made.labels["train"].read_text().splitlines(keepends=True)
    ordered = tmp_path / "sorted.csv"
    ordered.write_text(lines[0] + "".join(sorted(lines[1:])))
    assert lines[1:] != sorted(lines[1:])
    class_ids = made.classes.read_text().split()
    results = []
    for path in (made.labels["train"], ordered):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(csv_blocks, "BLOCK", 100_000)
            patch.setattr(grouping, "_CHUNK", 1000)
            results.append(group_files([path], "last", classes=class_ids))
    first, second = results
    assert np.array_equal(first.ids, second.ids) and np.array_equal(first.human.indptr, second.human.indptr)
    assert np.array_equal(first.human.classes, second.human.classes)
    assert np.array_equal(first.human.codes, second.human.codes)
    expected = expected_labels(ordered, class_ids)
    assert len(first.human.codes) == len(expected) > 18_000


def test_many_classes_need_wider_numbers(tmp_path):
    classes = [f"/m/0{i:05d}" for i in range(40_000)]
    path = write_labels(tmp_path / "labels.csv", [(1, classes[39_999], 1), (1, classes[16_384], 0)])
    grouped = group_files([path], classes=classes)
    assert grouped.human.classes.tolist() == [16_384, 39_999] and grouped.human.codes.tolist() == [0, 1]
    assert grouped.human.classes.dtype == np.int32


# Class ids of every form, the last of which is not wanted.
CLASS_FORMS = ["/m/0a", "/m/01c_0l", "/g/11b-c_x", "/oi/m_0dzf4", "/m/0other"]
SOURCES = {"human": ["verification", "crowdsource-verification"], "machine": ["machine"]}
CONFIDENCES = {"human": ["0", "1", "0.0", "1.0"], "machine": ["0.5", "0.6", "0.7", "0.9", "1.0"]}
WAYS: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "quoted": lambda text: "\n".join(",".join(f'"{w}"' for w in line.split(",")) for line in text.splitlines()) + "\n",
    "windows": lambda text: text.replace("\n", "\r\n"),
    "open end": lambda text: text.rstrip("\n"),
    "empty lines": lambda text: text.replace("\n", "\n\n"),
    "capitals": lambda text: "".join(line[:16].upper() + line[16:] + "\n" for line in text.splitlines()),
}


def random_file(
    path: Path, rng: random.Random, kind: str, images: list[int], rows: int, in_order: bool, way: str
) -> Path:
    """A label file of any rows, repeated and contradictory ones among them."""
    drawn = [(rng.choice(images), rng.choice(CLASS_FORMS)) for _ in range(rows)]
    if in_order:
        drawn.sort(key=lambda row: row[0])
    lines = [f"{i:016x},{rng.choice(SOURCES[kind])},{name},{rng.choice(CONFIDENCES[kind])}\n" for i, name in drawn]
    header, body = LABEL_HEADER, "".join(lines)
    if way == "capitals":
        path.write_text(header + WAYS[way](body), newline="")
    else:
        path.write_text(WAYS[way](header + body), newline="")
    return path


def entries(ids: np.ndarray, labels: SparseLabels) -> dict[tuple[int, int], int]:
    """Everything that is listed, checked to be in the order that a Manifest needs."""
    rows = labels.entry_rows()
    keys = rows * len(CLASS_FORMS) + labels.classes
    assert (np.diff(keys) > 0).all() and labels.indptr[0] == 0 and len(labels) == len(ids)
    assert (labels.indptr.dtype, labels.classes.dtype, labels.codes.dtype) == (np.int64, np.int16, np.int8)
    return dict(zip(zip(ids[rows].tolist(), labels.classes.tolist(), strict=True), labels.codes.tolist(), strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["positive", "negative", "last", "drop"])
def test_labels_are_those_of_the_plainest_reader(tmp_path, monkeypatch, policy, way):
    rng, repeated, contradictions, overruled = random.Random(f"{policy} {way}"), 0, 0, 0
    images = [0, 7, 2**63, 2**64 - 1, *(rng.getrandbits(64) for _ in range(12))]
    for trial, in_order in enumerate((True, True, False)):
        # Blocks that cut lines anywhere, and parts of few rows.
        monkeypatch.setattr(csv_blocks, "BLOCK", rng.choice([100, 1000, 1 << 20]))
        monkeypatch.setattr(grouping, "_CHUNK", rng.choice([1, 7, 1 << 15]))
        human = [random_file(tmp_path / "a.csv", rng, "human", images, 80, in_order, way)]
        if trial:
            human.append(random_file(tmp_path / "b.csv", rng, "human", images, 9, in_order, way))
        machine = [random_file(tmp_path / "m.csv", rng, "machine", images, 30, in_order, way)] if trial else []
        expected = group_plainly(human, machine, CLASS_FORMS[:-1], policy, 0.7)
        guesses = read_labels(machine, CLASS_FORMS[:-1], 0.7) if machine else None
        found = group_rows(read_labels(human, CLASS_FORMS[:-1]), guesses, len(CLASS_FORMS) - 1, policy)
        assert found.ids.dtype == np.uint64 and found.ids.tolist() == expected.ids
        assert entries(found.ids, found.human) == expected.human
        assert (found.machine is None) == (not machine)
        assert found.machine is None or entries(found.ids, found.machine) == expected.machine
        for name in ("named", "repeated", "conflicts", "overruled"):
            assert getattr(found, name) == getattr(expected, name), name
        repeated, contradictions = repeated + found.repeated, contradictions + found.conflicts
        overruled += found.overruled
    assert min(repeated, contradictions, overruled) > 0


def test_images_without_a_wanted_class_and_files_without_rows(tmp_path):
    path = write_labels(tmp_path / "labels.csv", [(1, C, 1), (2, A, 1), (3, C, 0), (4, C, 1)])
    grouped = group_files([path])
    assert grouped.ids.tolist() == [2] and grouped.named == 4 and grouped.human.rows([0]).tolist() == [[1, -1]]
    for rows in ([], [(1, C, 1)]):
        grouped = group_files([write_labels(tmp_path / "labels.csv", rows)])
        assert len(grouped.ids) == len(grouped.human) == len(grouped.human.codes) == 0

"""Rows of OpenImages grouped by image: contradictions, machine labels, any order, many classes."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.make_openimages import make_release
from spml_fast.prepare.datasets.openimages import csv_blocks, grouping
from tests.support.openimages import (
    expected_labels,
    group_files,
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

"""A Manifest whose files were cut, edited or forged is one sentence, and never an access out of bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import LabelStore, SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.data.manifest_check import check_labels
from spml_fast.prepare.manifest_writer import ManifestWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A split with every kind of array."""
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"], tmp_path)
    known = SparseLabels.from_entries([0, 0, 1, 3], [0, 2, 1, 1], [1, 0, 1, -1], 4, 3)
    boxes = np.array([0, 1, 1, 2, 2]), np.array([[0, 0, 0, 1, 1], [2, 0.1, 0.2, 0.3, 0.4]])
    writer.add_split(
        "train",
        known=known,
        observed=known,
        width=[1, 2, 3, 4],
        height=[4, 3, 2, 1],
        orientation=[1, 8, 1, 3],
        paths=["a.jpg", "b/ü.jpg", "c", "d"],
        boxes=boxes,
    )
    writer.add_split(
        "test",
        known=known,
        width=[1, 1, 1, 1],
        height=[1, 2, 1, 1],
        ids=[1, 2, 3, 2**64 - 1],
        template=["{split}/{id:016x}.jpg", "a{{b}}/{id}.jpg"],
        template_of=np.array([0, 1, 1, 0]),
    )
    writer.finish({})
    return tmp_path / "m"


def use_all(folder: Path) -> None:
    """Touch everything that a Manifest holds."""
    manifest = Manifest(folder)
    for split in manifest.splits.values():
        assert split.boxes is None or len(split.boxes) == 2
        for index in range(len(split)):
            split.path(index)
        for labels in (split.known, split.observed):
            assert len(LabelStore(labels)) == len(labels.rows(range(len(split)))) == len(split)
        assert len(split.width) == len(split.height) == len(split.orientation) == len(split)


def test_a_whole_one_is_read(folder):
    use_all(folder)


# A file of the Manifest, and what is written into its array.
ARRAYS: list[tuple[str, Callable[[Any], Any]]] = [
    ("train/known/classes.npy", lambda a: a + 1),
    ("train/known/classes.npy", lambda a: a - 1),
    ("train/known/classes.npy", lambda a: a * 0 + 1),
    ("train/known/classes.npy", lambda a: a[:-1]),
    ("train/known/classes.npy", lambda a: a.astype(np.float32)),
    ("train/known/classes.npy", lambda a: a.astype(">i2")),
    ("train/known/classes.npy", lambda a: a[::-1].copy()),
    ("train/observed/codes.npy", lambda a: a * 2),
    ("train/observed/codes.npy", lambda a: a[:, None]),
    ("train/observed/codes.npy", lambda a: np.zeros((), np.int8)),
    ("train/known/indptr.npy", lambda a: a[::-1].copy()),
    ("train/known/indptr.npy", lambda a: a - 1),
    ("train/known/indptr.npy", lambda a: a * 2),
    ("train/known/indptr.npy", lambda a: np.array([0, 3, 2, 3, 4])),
    ("train/known/indptr.npy", lambda a: np.array([0, 4])),
    ("train/known/indptr.npy", lambda a: np.zeros(0, np.int64)),
    ("train/known/indptr.npy", lambda a: a.astype(np.int32)),
    ("train/width.npy", lambda a: -a),
    ("train/height.npy", lambda a: a[:-1]),
    ("train/orientation.npy", lambda a: a * 0),
    ("train/orientation.npy", lambda a: a + 8),
    ("train/paths.npy", lambda a: a * 2),
    ("train/paths.npy", lambda a: a[::-1].copy()),
    ("train/boxes.npy", lambda a: a * np.nan),
    ("train/boxes.npy", lambda a: a * 2),
    ("train/boxes.npy", lambda a: a + 0.5),
    ("train/boxes.npy", lambda a: a[:, :4]),
    ("train/boxes_indptr.npy", lambda a: a + 1),
    ("test/template.npy", lambda a: a + 1),
    ("test/ids.npy", lambda a: a[1:]),
    ("test/ids.npy", lambda a: a.astype(np.int64)),
]


@pytest.mark.parametrize(("name", "damage"), ARRAYS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(ARRAYS)])
def test_arrays_out_of_range(folder, name, damage):
    np.save(folder / name, damage(np.load(folder / name)))
    with pytest.raises(UserError, match=rf"{folder}/{os.path.dirname(name)}\S* .*prepare the data again") as caught:
        use_all(folder)
    assert "\n" not in str(caught.value)


def test_the_place_is_named(folder):
    """Also beyond the values that are checked at a time."""
    np.save(folder / "train" / "known" / "classes.npy", np.array([0, 2, 3, 1], np.int16))
    with pytest.raises(UserError, match=r"classes\.npy is damaged: value 2 is 3, not between 0 and 2; prepare"):
        use_all(folder)
    rows, nnz = 300_000, 1_200_000
    indptr = np.arange(0, nnz + 1, 4)
    classes, codes = np.tile(np.arange(4, dtype=np.int16), rows), np.ones(nnz, np.int8)
    meta = {"num_classes": 4, "default": -1}
    assert check_labels(folder, indptr, classes, codes, meta) == (4, -1)
    for array, place, value, message in (
        (classes, 700_001, 4, r"value 700001 is 4, not between 0 and 3"),
        (classes, 700_001, 0, r"row 175000 lists class 0 behind class 0"),
        (codes, 1_199_999, -2, r"value 1199999 is -2, not between -1 and 1"),
        (indptr, 299_999, 1, r"it descends at row 299998"),
    ):
        kept, array[place] = array[place].copy(), value
        with pytest.raises(UserError, match=message):
            check_labels(folder, indptr, classes, codes, meta)
        array[place] = kept


@pytest.mark.parametrize("boundary", [2**19 - 1, 2**19, 2**19 + 1])
def test_rows_may_begin_anywhere(folder, boundary):
    """The parts that are checked at a time end within rows, and at their ends."""
    indptr = np.array([0, boundary, boundary, 2**20])
    classes = np.concatenate([np.arange(boundary), np.arange(2**20 - boundary)]).astype(np.int32)
    codes, meta = np.zeros(2**20, np.int8), {"num_classes": 2**20, "default": 0}
    check_labels(folder, indptr, classes, codes, meta)
    with pytest.raises(UserError, match=rf"row 0 lists class 0 behind class {boundary - 1}"):
        check_labels(folder, np.array([0, boundary + 1, 2**20]), classes, codes, meta)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("train/known/labels.json", {"num_classes": 4, "default": -1}),
        ("train/known/labels.json", {"num_classes": 2, "default": -1}),
        ("train/known/labels.json", {"num_classes": "3", "default": -1}),
        ("train/known/labels.json", {"num_classes": 3, "default": 1}),
        ("train/known/labels.json", {"num_classes": True, "default": 0}),
        ("train/known/labels.json", [3, 0]),
    ],
)
def test_label_metadata(folder, name, values):
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{folder}/train/known.* is damaged: "):
        use_all(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"splits": []},
        {"splits": {"train": {"size": -1}}},
        {"splits": {"train": {"size": 5}}},
        {"splits": {"train": {"size": 2**80}}},
        {"splits": {"../m/train": {"size": 4}}},
        {"splits": {"test": {"size": 4, "template": "{id:999999999d}.jpg"}}},
        {"splits": {"test": {"size": 4, "template": "{id.__class__}.jpg"}}},
        {"splits": {"test": {"size": 4, "template": "{0}.jpg"}}},
        {"splits": {"test": {"size": 4, "template": [1]}}},
        {"splits": {"train": {"size": 4, "constant": {"width": -1}}}},
        {"splits": {"train": {"size": 4, "constant": {"orientation": 9}}}},
        {"splits": {"train": {"size": 4, "hides_labels": "no"}}},
        {"name": None},
        {"image_root": 3},
    ],
    ids=str,
)
def test_metadata(folder, change):
    meta = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=f"{folder}/.* is damaged: "):
        use_all(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "holds no dictionary"),
        ('{"format": 2}', "has format 2"),
        ("9" * 5000, "is damaged"),
        ("\udcff", "is not UTF-8 text"),
    ],
    ids=["deep", "list", "format", "number", "bytes"],
)
def test_odd_json(folder, text, message):
    (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        Manifest(folder)


@pytest.mark.parametrize("name", ["train/known/codes.npy", "train/paths.bin", "train/known/labels.json", "classes.txt"])
def test_a_pipe_in_place_of_a_file_does_not_wait(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=r"cannot be read.*named pipe, not a regular file"):
        use_all(folder)

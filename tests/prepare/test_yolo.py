"""YOLO's detection sets as image labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from tests.support import data as make
from tests.support.prepare import notes_of, prepare

DATA = "path: ../pets\ntrain: images/train\nval: [images/val]\nnames: {0: cat, 1: dog, 2: 7}\n"


def write(root: Path, data: str = DATA, **labels: str) -> Path:
    """A data set; images of training a, b, c, d and validation e; `a="1 ..."` writes a's label file."""
    images = {f"images/train/{n}.jpg": make.encoded() for n in "abcd"} | {"images/val/e.png": make.encoded(fmt="PNG")}
    make.write_files(root, {**images, "images/train/notes.txt": b"", "data.yaml": data.encode()})
    for name, text in labels.items():
        path = root / "labels" / ("val" if name == "e" else "train") / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


BOX = "0 0.5 0.5 0.5 0.25\n"
POLYGON = "1 0.1 0.2 0.5 0.2 0.5 0.9\n"


def test_yolo(tmp_path):
    """Boxes, polygons, an empty file and a missing one; a name that YAML reads as a number."""
    root = write(tmp_path / "pets", a=BOX + BOX, b=POLYGON + "\n" + BOX, c="", e="2 0.5 0.5 1 1 0.9\n")
    manifest = prepare("yolo", "--data", root, "--out", tmp_path / "m")
    assert manifest.name == "pets" and manifest.classes == ["cat", "dog", "7"]
    train = manifest.split("train")
    assert [train.relative_path(i) for i in range(4)] == [f"images/train/{n}.jpg" for n in "abcd"]
    assert train.known.rows(range(4)).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert manifest.split("val").known.rows([0]).tolist() == [[0, 0, 1]]
    assert train.boxes is not None and np.diff(train.boxes[0]).tolist() == [2, 2, 0, 0]
    assert np.allclose(train.boxes[1][1:3], [[0, 0.25, 0.375, 0.75, 0.625], [1, 0.1, 0.2, 0.5, 0.9]])
    assert "train: 1 of 4 images have no label file and count as without objects" in notes_of(manifest)


def test_missing_files_may_be_unlabelled(tmp_path):
    root = write(tmp_path / "pets", a=BOX, e=BOX)
    manifest = prepare("yolo", "--data", root / "data.yaml", "--missing", "unknown", "--out", tmp_path / "m")
    assert manifest.split("train").known.rows([0, 1]).tolist() == [[1, 0, 0], [-1, -1, -1]]


def test_lists_roboflow_and_poses(tmp_path):
    """A text file of images, paths that begin with ../, key points behind the box, no path at all."""
    data = "train: train.txt\nval: ../images/val\nnc: 2\nkpt_shape: [2, 2]\nnames: [cat, dog]\n"
    root = write(tmp_path / "pets", data, a="1 0.5 0.5 0.5 0.25 0.1 0.1 0.2 0.2\n", e=BOX.strip() + " 0 0 0 0\n")
    (root / "train.txt").write_text(f"./images/train/a.jpg\r\n\n{root / 'images' / 'train' / 'b.jpg'}\n")
    manifest = prepare("yolo", "--data", root, "--out", tmp_path / "m")
    train = manifest.split("train")
    assert len(train) == 2 and train.known.rows([0, 1]).tolist() == [[0, 1], [0, 0]]
    assert train.boxes is not None and np.allclose(train.boxes[1], [[1, 0.25, 0.375, 0.75, 0.625]])


def test_boxes_follow_the_image_as_it_is_shown(tmp_path):
    """YOLO's boxes are of the turned image; pixels taken as they are stored have them where they are."""
    root = write(tmp_path / "pets", a="0 0.25 0.5 0.5 1\n", e=BOX)
    (root / "images" / "train" / "a.jpg").write_bytes(make.encoded(exif=make.exif(6)))
    shown = prepare("yolo", "--data", root, "--out", tmp_path / "m").split("train").boxes
    stored = prepare("yolo", "--data", root, "--orientation", "ignore", "--out", tmp_path / "n").split("train").boxes
    assert shown is not None and np.allclose(shown[1], [[0, 0, 0, 0.5, 1]])
    # Orientation 6 shows the stored image turned clockwise: its left half is the lower one as stored.
    assert stored is not None and np.allclose(stored[1], [[0, 0, 0.5, 1, 1]])


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        ("a: [", BOX, r"data\.yaml, line 1 is not valid YAML"),
        ("3", BOX, "has no names and no train"),
        (DATA.replace("train:", "training:"), BOX, "has no 'train'"),
        (DATA.replace("names", "name"), BOX, "'names' is no list of class names"),
        (DATA.replace("1: dog", "5: dog"), BOX, r"the numbers of 'names' must be 0 to 2, not \[0, 5, 2\]"),
        (DATA.replace("dog", "cat"), BOX, "names class 'cat' twice"),
        (DATA.replace("images/train", "photos"), BOX, "'train' is photos, but .*photos does not exist"),
        (DATA.replace("images/train", "labels/val"), BOX, "'train' names no image"),
        (DATA, "0 0.5 0.5\n", r"a\.txt, line 1: expected a class number and fractions"),
        (DATA, BOX + "0 0.5 x 1 1\n", r"a\.txt, line 2: expected a class number"),
        (DATA, "0 nan 0.5 1 1\n", r"a\.txt, line 1: expected a class number"),
        (DATA, BOX + "3 0.5 0.5 1 1\n", r"a\.txt, line 2: 3 is no class number from 0 to 2"),
        (DATA, "0.5 0.5 0.5 1 1\n", r"0\.5 is no class number"),
        (DATA, "0 0.5 0.5 1 1 1 1 1\n", "a polygon needs pairs of numbers, not 7"),
        (DATA, None, r"no image of train has a label file; that of .*a\.jpg would be .*labels/train/a\.txt"),
    ],
)
def test_what_is_wrong(tmp_path, data, labels, message):
    given = {} if labels is None else {"a": labels}
    root = write(tmp_path / "pets", data, e=BOX, **given)
    with pytest.raises(UserError, match=message):
        prepare("yolo", "--data", root, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()

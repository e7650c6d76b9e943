"""PASCAL VOC from its files to a Manifest, and what can be wrong with those files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.prepare.observed_labels import draw_published, published_split
from tests.support import data as make
from tests.support.prepare import prepare, report_of


def test_voc(tmp_path):
    root = make.make_voc(tmp_path / "VOC2012")
    manifest = prepare("voc", "--root", root, "--out", tmp_path / "m")
    assert manifest.classes == make.VOC_CLASSES
    rows = {name: len(split) for name, split in manifest.splits.items()}
    assert rows == {"train": 16, "val": 4, "test": 6}
    train, val = published_split(20)
    for name, official, prefix in (("train", train, "2008"), ("val", val, "2008"), ("test", range(6), "2009")):
        split = manifest.split(name)
        assert [split.relative_path(i) for i in range(len(split))] == [f"{prefix}_{i:06d}.jpg" for i in official]
        # Difficult is negative.
        expected = [[int(make.voc_flag(i, c) == 1) for c in range(20)] for i in official]
        assert split.known.rows(range(len(split))).tolist() == expected
        assert (split.width == make.WIDTH).all() and (split.height == make.HEIGHT).all()
        assert split.boxes is not None
        # Pixels 13..24 of 48 and 9..16 of 32, counted from 1, the last included.
        assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    # The draw runs over all official rows before the cut.
    full = SparseLabels.from_dense(
        np.array([[make.voc_flag(i, c) == 1 for c in range(20)] for i in range(20)], np.int8), 0
    )
    drawn = draw_published(full)
    assert np.array_equal(manifest.split("train").observed.rows(range(16)), drawn.rows(train))
    assert np.array_equal(manifest.split("val").observed.rows(range(4)), drawn.rows(val))


def test_voc_without_annotations_and_without_cut(tmp_path):
    root = make.make_voc(tmp_path / "VOC2012", xml=False)
    manifest = prepare("voc", "--root", root, "--out", tmp_path / "m", "--val-fraction", "0", "--observe", "all")
    assert set(manifest.splits) == {"train", "test"} and manifest.split("train").boxes is None
    assert not manifest.split("train").hides_labels
    assert any("no boxes" in note for note in report_of(manifest)["notes"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "ImageSets"), "ImageSets/Main does not exist"),
        (lambda r: (r / "ImageSets/Main/cat_val.txt").unlink(), r"cat_val\.txt cannot be read"),
        (lambda r: _append(r / "ImageSets/Main/cat_train.txt", "2008_000099 1\n"), "same images.*2008_000099"),
        (lambda r: _append(r / "ImageSets/Main/cat_train.txt", "2008_000001 -1\n"), "line 21: image 2008_000001"),
        (
            lambda r: _append(r / "ImageSets/Main/cat_train.txt", "2008_000001 maybe\n"),
            "line 21: expected an image name",
        ),
        (
            lambda r: (r / "Annotations/2008_000003.xml").write_text("<annotation><obj"),
            r"2008_000003\.xml is not valid XML",
        ),
        (lambda r: shutil.rmtree(r / "JPEGImages"), "none of the 20 images of split 'train'.*missing file"),
    ],
)
def test_voc_bad_input(tmp_path, damage, message):
    root = make.make_voc(tmp_path / "VOC2012")
    damage(root)
    with pytest.raises(UserError, match=message):
        prepare("voc", "--root", root, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)

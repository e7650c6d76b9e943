"""Lists of images with class numbers."""

from __future__ import annotations

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.prepare.observed_labels import published_split
from tests.support import data as make
from tests.support.paths import need_data
from tests.support.prepare import notes_of, prepare, report_of

FULL = "a.jpg, 0 2\nb, c.jpg,1\r\nd.jpg,\n\ne.jpg,2\n"


def write(tmp_path, **lists: str) -> list[object]:
    """Options for lists of that content; classes ant, bee, cow."""
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\n")
    options: list[object] = ["--classes", tmp_path / "classes.txt", "--out", tmp_path / "m"]
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
        options += [f"--{name.replace('_', '-')}", tmp_path / f"{name}.txt"]
    return options


def test_lists(tmp_path):
    images = make.write_files(
        tmp_path / "mine", {n: make.encoded() for n in ("a.jpg", "b, c.jpg", "d.jpg", "e.jpg", "f")}
    )
    single = "e.jpg,2\na.jpg,2\nb, c.jpg,1\nd.jpg,\n"
    options = write(tmp_path, train=FULL, train_observed=single, val="f,0 0 1\n")
    manifest = prepare("lists", *options, "--images", images)
    train = manifest.split("train")
    assert manifest.name == "mine" and [train.relative_path(i) for i in range(4)] == [
        "a.jpg",
        "b, c.jpg",
        "d.jpg",
        "e.jpg",
    ]
    assert train.known.rows(range(4)).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert train.observed.rows(range(4)).tolist() == [[-1, -1, 1], [-1, 1, -1], [-1, -1, -1], [-1, -1, 1]]
    assert train.hides_labels and manifest.split("val").known.rows([0]).tolist() == [[1, 1, 0]]
    assert "no list of test images" in notes_of(manifest)
    # The record says that nothing was drawn.
    assert report_of(manifest)["observe"]["first_split_read_from"] == "the data set's own list"


def test_a_list_of_observed_labels_and_a_draw_exclude_each_other(tmp_path):
    options = [*write(tmp_path, train="a.jpg,0 1\nb.jpg,2\n", train_observed="a.jpg,1\nb.jpg,2\n"), "--images", "none"]
    with pytest.raises(UserError, match="--observe draws labels, but the files say which are observed"):
        prepare("lists", *options, "--observe", "single")
    assert not (tmp_path / "m").exists()


def test_the_published_coco_lists(tmp_path):
    """82,081 images with all labels, and one published draw of single ones."""
    (tmp_path / "classes.txt").write_text("".join(f"class {i}\n" for i in range(80)))
    full = need_data("coco_labels", "coco_train_full.txt")
    single = need_data("coco_labels", "coco_train_singlelabel.txt")
    options = ["--train", full, "--train-observed", single, "--classes", tmp_path / "classes.txt", "--images", "none"]
    manifest = prepare("lists", *options, "--out", tmp_path / "m")
    train, val = manifest.split("train"), manifest.split("val")
    kept, cut = published_split(82_081)
    assert (len(train), len(val)) == (len(kept), len(cut))
    assert (train.observed.row_counts(1) == 1).all() and (train.observed.row_counts(0) == 0).all()
    rows = np.arange(0, len(train), 500)
    observed, known = train.observed.rows(rows), train.known.rows(rows)
    assert (known[observed == 1] == 1).all()
    total = train.known.row_counts(1).sum() + val.known.row_counts(1).sum()
    assert total / 82_081 == pytest.approx(2.94, abs=0.01)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": "a.jpg\n"}, r"train\.txt, line 1: expected an image, a comma and class numbers, not 'a\.jpg'"),
        ({"train": "a.jpg,0\na.jpg,1\n"}, r"train\.txt, line 2: image a\.jpg is listed twice"),
        ({"train": "a.jpg,0 3\n"}, r"train\.txt, line 1: '3' is no class number from 0 to 2"),
        ({"train": "a.jpg,-1\n"}, "line 1: '-1' is no class number"),
        ({"train": "a.jpg,1" + "0" * 99 + "\n"}, "line 1: '1000"),
        ({"train": "\n"}, r"train\.txt lists no image"),
        ({"train": FULL, "test": "a.jpg,0\n"}, r"test\.txt: image a\.jpg is in the list of split train too"),
        ({"train": FULL, "train_observed": "a.jpg,0\n"}, r"name different images \(3; the first is b, c\.jpg\)"),
        ({"train": "a.jpg,0\n", "train_observed": "a.jpg,1\n"}, r"image a\.jpg has class 1 only here"),
    ],
)
def test_bad_lists(tmp_path, lists, message):
    with pytest.raises(UserError, match=message):
        prepare("lists", *write(tmp_path, **lists), "--images", "none")

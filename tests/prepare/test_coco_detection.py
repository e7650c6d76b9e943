"""Detection sets in COCO's format, beside the papers' protocol of `coco`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from tests.support import data as make
from tests.support.paths import need_data
from tests.support.prepare import notes_of, prepare

TRAIN = {9: [7, 1], 10: [1], 100: [90, 90, 1], 11: [], 2: [7], 30: [90]}
VAL = {5: [1], 40: []}


def test_images_without_objects_are_kept(tmp_path):
    train, _ = make.make_coco(tmp_path, "train", TRAIN)
    val, _ = make.make_coco(tmp_path, "val", VAL)
    # Another numbering of the categories, and only one of them: names decide.
    data = json.loads(val.read_text())
    data["categories"] = [{"id": 3, "name": "ant"}]
    data["annotations"] = [{**a, "category_id": 3, "iscrowd": 1} for a in data["annotations"]]
    val.write_text(json.dumps(data))
    manifest = prepare(
        *("coco-detection", "--train", train, "--images", tmp_path / "train", "--val", val),
        *("--val-images", tmp_path / "val", "--out", tmp_path / "m"),
    )
    split = manifest.split("train")
    assert manifest.classes == ["zebra", "ant", "traffic light"]
    # In the order of the file, which is by descending id.
    expected = [[0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert split.known.rows(range(6)).tolist() == expected and split.observed.rows(range(6)).tolist() == expected
    assert split.boxes is not None and np.diff(split.boxes[0]).tolist() == [3, 1, 0, 1, 2, 1]
    assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    assert manifest.split("val").known.rows([0, 1]).tolist() == [[0, 0, 0], [0, 1, 0]]
    notes = notes_of(manifest)
    assert "train: 1 images without any object are kept" in notes and "val: 1 crowds (iscrowd)" in notes


@pytest.mark.parametrize("frame", ["stored", "shown"])
def test_boxes_of_images_on_their_side(tmp_path, frame):
    """The size in the file says whether boxes are of the stored image or of the one that EXIF shows."""
    train, _ = make.make_coco(tmp_path, "train", {1: [7], 2: [7], 3: [7]})
    data = json.loads(train.read_text())
    first = data["images"][0]
    stored_size = (first["width"], first["height"])
    (tmp_path / "train" / first["file_name"]).write_bytes(make.encoded(exif=make.exif(6)))
    (box,) = (a for a in data["annotations"] if a["image_id"] == first["id"])
    width, height = stored_size
    # The left half of what is shown: orientation 6 turns clockwise, so it is the lower half as stored.
    box["bbox"] = [0, height / 2, width, height / 2]
    if frame == "shown":
        first["width"], first["height"] = height, width
        box["bbox"] = [0, 0, height / 2, width]
    train.write_text(json.dumps(data))
    words = ["coco-detection", "--train", train, "--images", tmp_path / "train"]
    for orientation, expected in (("exif", [0, 0, 0.5, 1]), ("ignore", [0, 0.5, 1, 1])):
        manifest = prepare(*words, "--orientation", orientation, "--out", tmp_path / orientation)
        boxes = {
            split.relative_path(row): split.boxes[1][split.boxes[0][row], 1:]
            for split in manifest.splits.values()
            for row in range(len(split))
            if split.boxes is not None
        }
        assert np.allclose(boxes[first["file_name"]], expected)
        assert "another size" not in notes_of(manifest)


def test_the_real_format(tmp_path):
    folder = need_data("coco_mini")
    names = {
        s: folder / "coco_format" / "lizhogn+tiny_coco_dataset" / f"instances_{s}2017.json" for s in ("train", "val")
    }
    manifest = prepare(
        *("coco-detection", "--train", names["train"], "--test", names["val"], "--images", folder / "images"),
        *("--verify", "none", "--out", tmp_path / "m"),
    )
    listed = {s: len(json.loads(p.read_text())["images"]) for s, p in names.items()}
    sizes = {name: len(split) for name, split in manifest.splits.items()}
    assert sizes["train"] + sizes["val"] == listed["train"] and sizes["test"] == listed["val"]
    assert manifest.num_classes == 80 and all(s.boxes is not None for s in manifest.splits.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "categories": [{"id": 7, "name": "horse"}]}, r"val.*: category 7 \(horse\) is not in the tr"),
        (lambda d: {**d, "categories": d["categories"] + d["categories"][:1]}, "two categories have the id 7"),
        (
            lambda d: {**d, "images": [*d["images"], {"id": 99, "file_name": d["images"][0]["file_name"]}]},
            "listed twice",
        ),
        (lambda d: {**d, "images": [{**d["images"][0], "file_name": "a\0"}, *d["images"][1:]]}, "is no file name"),
        (lambda d: "[", "not valid JSON"),
    ],
)
def test_what_is_wrong(tmp_path, change, message):
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    val, _ = make.make_coco(tmp_path, "val", VAL)
    changed = change(json.loads(val.read_text()))
    val.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=message):
        prepare("coco-detection", "--train", train, "--val", val, "--images", images, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()

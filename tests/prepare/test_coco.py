"""COCO from its files to a Manifest, and what can be wrong with those files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from tests.support import data as make
from tests.support.paths import need_data
from tests.support.prepare import prepare, report_of

TRAIN = {9: [7, 1], 10: [1], 100: [90, 90, 1], 11: [], 2: [7], 30: [90]}
TEST = {5: [1], 40: [7, 90]}


def test_coco(tmp_path):
    train, train_images = make.make_coco(tmp_path, "train2014", TRAIN)
    test, test_images = make.make_coco(tmp_path, "val2014", TEST)
    manifest = prepare(
        *("coco", "--annotations", train, "--images", train_images, "--test-annotations", test),
        *("--test-images", test_images, "--val-fraction", "0", "--out", tmp_path / "m"),
    )
    # Class index in the file's order of categories; ids sorted as strings; images without annotation left out.
    assert manifest.classes == ["zebra", "ant", "traffic light"]
    split = manifest.split("train")
    assert [Path(split.path(i)).stem.lstrip("0") for i in range(len(split))] == ["10", "100", "2", "30", "9"]
    assert split.known.rows(range(5)).tolist() == [[0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0]]
    assert split.boxes is not None and np.diff(split.boxes[0]).tolist() == [1, 3, 1, 1, 2]
    assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    assert manifest.split("test").known.rows([0, 1]).tolist() == [[1, 0, 1], [0, 1, 0]]
    assert all(Path(s.path(i)).is_file() for s in manifest.splits.values() for i in range(len(s)))
    assert report_of(manifest)["notes"][0].startswith("train: 1 images without any annotation are not used")


def test_coco_annotated_sizes_without_looking(tmp_path):
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    shutil.rmtree(images)
    images.mkdir()
    manifest = prepare(
        *("coco", "--annotations", train, "--images", images, "--val-fraction", "0", "--verify", "none"),
        *("--out", tmp_path / "m"),
    )
    assert manifest.split("train").width.tolist() == [make.WIDTH] * 5


def test_coco_boxes_follow_the_annotated_size(tmp_path):
    # Images that somebody scaled down after annotating: boxes are fractions of the annotated size.
    train, images = make.make_coco(tmp_path, "train", {1: [1], 2: [7]})
    make.write_files(images, {f"{i:012d}.jpg": make.encoded(make.drawn_image(24, 16)) for i in (1, 2)})
    manifest = prepare("coco", "--annotations", train, "--images", images, "--val-fraction", 0, "--out", tmp_path / "m")
    split = manifest.split("train")
    assert split.width.tolist() == [24, 24] and split.boxes is not None
    assert np.allclose(split.boxes[1][:, 1:], [12 / 48, 8 / 32, 24 / 48, 16 / 32])
    assert any("another size than the annotation says: 2 images" in note for note in report_of(manifest)["notes"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "{", "not valid JSON"),
        (lambda d: [], "no list 'images'"),
        (lambda d: {**d, "categories": 3}, "no list 'categories'"),
        (lambda d: {**d, "annotations": [{"image_id": 9}]}, "entry 0 of 'annotations' has no 'category_id'"),
        (lambda d: {**d, "annotations": [{"image_id": [9], "category_id": 1}]}, "as its 'image_id'"),
        (lambda d: {**d, "annotations": [{"image_id": 77, "category_id": 1}]}, "image 77"),
        (lambda d: {**d, "annotations": [{"image_id": 9, "category_id": 5}]}, "category 5"),
        (
            lambda d: {**d, "annotations": [{"image_id": 9, "category_id": 1, "bbox": [1, 2]}]},
            "annotation 0 has .* 'bbox'",
        ),
        (lambda d: {**d, "images": d["images"] + d["images"][:1]}, "listed twice"),
        (lambda d: {**d, "images": [{**d["images"][0], "width": "wide"}]}, "'wide' as its 'width'"),
        (lambda d: {**d, "categories": d["categories"] + [{"id": 7, "name": "x"}]}, "same id"),
        (lambda d: {**d, "categories": d["categories"] + [{"id": 8, "name": "ant"}]}, "class 'ant' is listed twice"),
        (lambda d: {**d, "annotations": []}, "split 'train' of coco is empty"),
    ],
)
def test_coco_bad_input(tmp_path, change, message):
    path, images = make.make_coco(tmp_path, "train", TRAIN)
    changed = change(make.coco_instances(TRAIN))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(UserError, match=message):
        prepare("coco", "--annotations", path, "--images", images, "--val-fraction", "0", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_coco_test_categories_must_match(tmp_path):
    train, images = make.make_coco(tmp_path, "train", TRAIN)
    other = make.coco_instances(TEST)
    other["categories"] = [{"id": 7, "name": "horse"}]
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"category 7 \(horse\) is zebra"):
        prepare(
            *("coco", "--annotations", train, "--images", images, "--test-annotations", tmp_path / "other.json"),
            *("--out", tmp_path / "m"),
        )
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        prepare("coco", "--annotations", tmp_path / "absent.json", "--images", images, "--out", tmp_path / "m")


def test_coco_mini(tmp_path):
    folder = need_data("coco_mini")
    files = [folder / "coco_format" / "lizhogn+tiny_coco_dataset" / f"instances_{s}2017.json" for s in ("train", "val")]
    manifest = prepare(
        *("coco", "--annotations", files[0], "--images", folder / "images"),
        *("--test-annotations", files[1], "--test-images", folder / "images", "--out", tmp_path / "m"),
    )
    assert manifest.num_classes == 80 and manifest.classes[0] == "person" and manifest.classes[79] == "toothbrush"
    report = report_of(manifest)
    # Every photo is a real one, whole, and of the size that its annotation says; one of the set is grey.
    assert report["left_out"]["total"] == 0 and not any("another size" in note for note in report["notes"])
    table = json.loads((folder / "labels.json").read_text())
    assert table["classes"] == manifest.classes
    truth = {line.split(",")[0]: line.split(",")[2] for line in (folder / "labels.csv").read_text().splitlines()[1:]}
    for split in manifest.splits.values():
        assert split.observed.row_counts(1).tolist() == [1] * len(split)
        for i in range(len(split)):
            positives = np.nonzero(split.known.rows([i])[0] == 1)[0]
            assert {manifest.classes[c] for c in positives} == set(truth[Path(split.path(i)).name].split(";"))

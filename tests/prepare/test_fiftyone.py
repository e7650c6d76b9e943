"""Exports of FiftyOne. The files have the form that its exporters write (fiftyone 1.22); it was not run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from tests.support import data as make
from tests.support.prepare import notes_of, prepare


def sample(name: str, labels: Any, *tags: str) -> dict[str, Any]:
    """One sample of samples.json."""
    return {
        "_id": {"$oid": "65f0c0ffee0123456789abcd"},
        "filepath": f"data/{name}.jpg",
        "tags": list(tags),
        "_media_type": "image",
        "metadata": {"_cls": "ImageMetadata", "width": 48, "height": 32},
        "ground_truth": labels,
    }


def classified(*names: str) -> dict[str, Any]:
    """A field of several classes."""
    labels = [{"_id": {"$oid": "0"}, "_cls": "Classification", "label": n, "confidence": None} for n in names]
    return {"_cls": "Classifications", "classifications": labels}


def detected(*names: str) -> dict[str, Any]:
    """A field of objects."""
    boxes = [{"_cls": "Detection", "label": n, "bounding_box": [0.25, 0.5, 0.5, 0.25]} for n in names]
    return {"_cls": "Detections", "detections": boxes}


def write(root: Path, **files: Any) -> Path:
    """Images a to e, and JSON files by their name without ending."""
    make.write_files(root, {f"data/{n}.jpg": make.encoded() for n in "abcde"})
    for name, content in files.items():
        (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


SAMPLES = [
    sample("a", classified("cat", "sofa"), "train", "checked"),
    sample("b", classified(), "train"),
    sample("c", None, "train"),
    sample("d", classified("sofa"), "validation"),
]


def test_a_dataset(tmp_path):
    root = write(tmp_path / "pets", samples={"samples": SAMPLES}, metadata={"name": "x"})
    manifest = prepare("fiftyone", "--data", root, "--out", tmp_path / "m")
    assert manifest.name == "pets" and manifest.classes == ["cat", "sofa"]
    train = manifest.split("train")
    assert train.relative_path(0) == "data/a.jpg"
    assert train.known.rows(range(3)).tolist() == [[1, 1], [0, 0], [-1, -1]]
    assert manifest.split("val").known.rows([0]).tolist() == [[0, 1]]
    assert "1 images have no labels" in notes_of(manifest)


def test_objects_in_a_folder_of_files(tmp_path):
    root = write(tmp_path / "pets")
    (root / "samples").mkdir()
    for i, name in enumerate("abcde"):
        content = sample(name, classified("x"), *[[], ["test"]][i == 4]) | {"boxes": detected("cat", "dog")}
        (root / "samples" / f"{i:06d}-5f.json").write_text(json.dumps(content))
    manifest = prepare("fiftyone", "--data", root, "--field", "boxes", "--unlisted", "unknown", "--out", tmp_path / "m")
    boxes = manifest.split("train").boxes
    assert manifest.classes == ["cat", "dog"] and len(manifest.split("test")) == 1
    assert boxes is not None and np.allclose(boxes[1][:2], [[0, 0.25, 0.5, 0.75, 0.75], [1, 0.25, 0.5, 0.75, 0.75]])
    assert "4 images have no tag of a split" in notes_of(manifest)


def test_labels_json(tmp_path):
    labels = {"a": [0, 1], "b": 1, "c": None, "d": [{"label": 0, "confidence": 0.5}], "e": []}
    root = write(tmp_path / "pets", labels={"classes": ["cat", "sofa"], "labels": labels})
    manifest = prepare("fiftyone", "--data", root, "--out", tmp_path / "m")
    rows = {
        split.relative_path(i)[5]: split.known.rows([i])[0].tolist()
        for split in manifest.splits.values()
        for i in range(len(split))
    }
    assert rows == {"a": [1, 1], "b": [0, 1], "c": [-1, -1], "d": [1, 0], "e": [0, 0]}


def test_labels_json_with_boxes_and_paths(tmp_path):
    objects = [{"label": "cat", "bounding_box": [0.1, 0.2, 0.3, 0.4]}]
    root = write(
        tmp_path / "pets",
        labels={"classes": None, "labels": {"x": objects, "y": objects, "z": objects, "w": objects, "v": objects}},
        data={key: f"data/{n}.jpg" for key, n in zip("xyzwv", "abcde", strict=True)},
    )
    boxes = prepare("fiftyone", "--data", root, "--out", tmp_path / "m").split("val").boxes
    assert boxes is not None and np.allclose(boxes[1], [[0, 0.1, 0.2, 0.4, 0.6]])


def test_two_files_of_one_key_are_named(tmp_path):
    objects = [{"label": "cat", "bounding_box": [0.1, 0.2, 0.3, 0.4]}]
    root = write(tmp_path / "pets", labels={"classes": None, "labels": dict.fromkeys("acde", objects)})
    (root / "data" / "b.png").write_bytes((root / "data" / "b.jpg").read_bytes())
    prepare("fiftyone", "--data", root, "--out", tmp_path / "m")
    (root / "data" / "a.png").write_bytes((root / "data" / "a.jpg").read_bytes())
    with pytest.raises(UserError, match=r"image 'a' may be data/a\.jpg or data/a\.png; rename or remove one"):
        prepare("fiftyone", "--data", root, "--out", tmp_path / "n")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, (), "has neither samples.json nor labels.json"),
        ({"samples": "{"}, (), r"samples\.json \(samples\) is not valid JSON"),
        ({"samples": []}, (), "has no list 'samples'"),
        ({"samples": {"samples": []}}, (), "has no samples"),
        ({"samples": {"samples": [{"tags": []}]}}, (), r"samples\.json, sample 0 has no 'filepath'"),
        ({"samples": {"samples": [sample("a", None)]}}, (), "no field of any sample holds labels"),
        ({"samples": {"samples": SAMPLES}}, ("--field", "x"), "in field 'x'; there are ground_truth"),
        (
            {"samples": {"samples": [sample("a", classified("c"), "train", "test")]}},
            (),
            "tags of several splits: test, tr",
        ),
        (
            {"samples": {"samples": [SAMPLES[0], sample("b", {"_cls": "Classifications"})]}},
            (),
            r"sample 1, field 'ground_truth' has no list 'classifications'",
        ),
        (
            {"samples": {"samples": [SAMPLES[0], sample("b", {"_cls": "Heatmap"})]}},
            (),
            "sample 1, field 'ground_truth' is no labels",
        ),
        (
            {"samples": {"samples": [sample("a", {"_cls": "Detection", "label": "x", "bounding_box": [1, 2]})]}},
            (),
            r"label 0 has \[1, 2\] as its box",
        ),
        ({"labels": {"labels": 3}}, (), "has no dictionary 'labels'"),
        (
            {"labels": {"classes": ["a"], "labels": {"a": [1]}}},
            (),
            "image 'a', label 0: 1 is no class number from 0 to 0",
        ),
        (
            {"labels": {"classes": ["a"], "labels": {"q": [0]}}},
            (),
            "image 'q' is neither below .*data nor",
        ),
        ({"labels": {"labels": {"a": [0]}}}, (), "label 0: 0 is no class name"),
    ],
)
def test_what_is_wrong(tmp_path, files, options, message):
    root = write(tmp_path / "pets", **files)
    with pytest.raises(UserError, match=message):
        prepare("fiftyone", "--data", root, *options, "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()

"""Label Studio's JSON export. The form is that of its converter (label-studio-sdk 2.1); the server was not run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from tests.support import data as make
from tests.support.prepare import notes_of, prepare

BOX = {"x": 10, "y": 20.0, "width": 30, "height": 40, "rotation": 0}


def choices(*names: str, control: str = "choice") -> dict[str, Any]:
    """A result of a Choices control."""
    return {"id": "x", "from_name": control, "to_name": "image", "type": "choices", "value": {"choices": list(names)}}


def rectangle(name: str) -> dict[str, Any]:
    """A result of a RectangleLabels control."""
    value = {**BOX, "rectanglelabels": [name]}
    size = {"original_width": 48, "original_height": 32, "image_rotation": 0}
    return {**size, "from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value}


def task(image: str, *results: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A task with one annotation."""
    annotation = {"id": 7, "was_cancelled": False, "created_at": "2026-01-01T10:00:00Z", "result": list(results)}
    return {"id": 1, "data": {"image": image, **more}, "annotations": [annotation], "predictions": []}


TASKS = [
    task("/data/upload/3/0a1b2c3d-a.jpg", choices("cat", "sofa"), fold="train"),
    task("/data/local-files/?d=photos/sub/b%20b.jpg", rectangle("cat"), rectangle("dog"), fold="train"),
    task("sub/c.jpg", fold="train"),
    task("/data/upload/d.jpg", choices("dog"), fold="valid"),
]


def write(tmp_path: Path, tasks: Any) -> tuple[Any, ...]:
    """The export and its images."""
    make.write_files(
        tmp_path / "photos", {n: make.encoded() for n in ("0a1b2c3d-a.jpg", "sub/b b.jpg", "sub/c.jpg", "d.jpg")}
    )
    export = tmp_path / "project.json"
    export.write_text(tasks if isinstance(tasks, str) else json.dumps(tasks))
    return ("labelstudio", "--export", export, "--images", tmp_path / "photos", "--out", tmp_path / "m")


def test_choices_and_boxes(tmp_path):
    manifest = prepare(*write(tmp_path, TASKS), "--split-key", "fold")
    train = manifest.split("train")
    assert (manifest.classes == ["cat", "dog", "sofa"] and manifest.name == "photos") or manifest.name == tmp_path.name
    assert [train.relative_path(i) for i in range(3)] == ["0a1b2c3d-a.jpg", "sub/b b.jpg", "sub/c.jpg"]
    # A submitted task without a result has none of the classes.
    assert train.known.rows(range(3)).tolist() == [[1, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert train.boxes is not None and np.allclose(train.boxes[1], [[0, 0.1, 0.2, 0.4, 0.6], [1, 0.1, 0.2, 0.4, 0.6]])
    assert manifest.split("val").known.rows([0]).tolist() == [[0, 1, 0]]


def test_skipped_and_several_annotations(tmp_path):
    tasks = json.loads(json.dumps(TASKS))
    tasks[0]["annotations"].append(
        {"result": [choices("dog"), choices("red", control="colour")], "created_at": "2026-02-01T10:00:00Z"}
    )
    tasks[1]["annotations"][0]["was_cancelled"] = True
    tasks[2]["annotations"] = []
    manifest = prepare(*write(tmp_path, tasks), "--split-key", "fold", "--from-name", "choice")
    assert manifest.classes == ["dog"]
    assert manifest.split("train").known.rows(range(3)).tolist() == [[1], [-1], [-1]]
    notes = notes_of(manifest)
    assert "1 tasks have several annotations; the newest counts" in notes and "2 tasks have no annotation" in notes


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("{", r"project\.json \(tasks\) is not valid JSON"),
        ("{}", "is no list of tasks"),
        ([{"image": "a.jpg", "choice": "cat"}], "task 0 has no 'data'; export the project as JSON, not as JSON-MIN"),
        ([{"data": {"image": "a.jpg"}}], "task 0 has no list 'annotations'"),
        (
            [task("https://example.org/a.jpg", choices("cat"))],
            "task 0: the image is at https://example.org/a.jpg; download",
        ),
        ([task("s3://bucket/a.jpg", choices("cat"))], "the image is at s3://bucket/a.jpg"),
        ([task("/data/local-files/?x=1", choices("cat"))], r"names no file \(\?d=\)"),
        ([{**TASKS[0], "data": {"text": "a", "more": 1}}], "its data have no 'image', only text, more"),
        ([task("a", {"type": "choices", "value": {}})], "task 0, result 0 has no list 'choices'"),
        ([task("a", choices(""))], "task 0, result 0: '' is no class name"),
        (
            [task("a", {**rectangle("cat"), "value": {"rectanglelabels": ["cat"], "x": 1}})],
            "result 0 has .* as its box",
        ),
        ([task("a", 3)], "task 0, result 0 is no object of JSON"),
        ([TASKS[0], TASKS[0]], "is listed twice"),
    ],
)
def test_what_is_wrong(tmp_path, tasks, message):
    with pytest.raises(UserError, match=message):
        prepare(*write(tmp_path, tasks))
    assert not (tmp_path / "m").exists()

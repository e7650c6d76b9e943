"""What a Manifest stores, and what stands in the way of writing or opening one."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.prepare.manifest_writer import ManifestWriter

PATHS = ["a.jpg", "sub folder/ünï.jpg", "日本/🦊.png", "not\udcffutf8.jpg", ""]


def known(size: int = 5) -> SparseLabels:
    return SparseLabels.from_positives([[i % 3] for i in range(size)], 3, 0)


def write(folder, image_root, classes=("ant", "bee", "cat"), **options):
    writer = ManifestWriter(folder, "mine", classes, image_root, **options)
    writer.add_split("train", known=known(), width=range(1, 6), height=range(6, 11), paths=PATHS)
    return writer.finish({"note": "ü"})


def test_round_trip(tmp_path):
    (tmp_path / "images").mkdir()
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee cat", "ü;,"], tmp_path / "images")
    observed = SparseLabels.from_positives([[0], [], [], [], []], 3, -1)
    boxes = np.array([0, 1, 1, 3, 3, 3]), np.arange(15).reshape(3, 5) / 20
    writer.add_split(
        "train",
        known=known(),
        observed=observed,
        width=range(1, 6),
        height=range(6, 11),
        orientation=[1, 8, 1, 1, 3],
        paths=PATHS,
        boxes=boxes,
    )
    writer.add_split(
        "test", known=known(2), width=[3, 4], height=[5, 6], ids=[7, 2**63], template="{split}/{id:016x}.jpg"
    )
    writer.finish({"note": "ü"})
    manifest = Manifest(tmp_path / "m")
    assert manifest.name == "mine" and manifest.classes == ["ant", "bee cat", "ü;,"] and manifest.num_classes == 3
    train, test = manifest.split("train"), manifest.split("test")
    assert len(train) == 5 and [train.relative_path(i) for i in range(5)] == PATHS
    assert train.path(1) == str(tmp_path / "images" / PATHS[1])
    assert train.width.tolist() == [1, 2, 3, 4, 5] and train.height.tolist() == [6, 7, 8, 9, 10]
    assert train.orientation.tolist() == [1, 8, 1, 1, 3]
    assert train.hides_labels and train.observed.rows([0, 1]).tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert np.array_equal(train.known.rows(range(5)), known().rows(range(5)))
    assert train.boxes is not None and train.boxes[0].tolist() == [0, 1, 1, 3, 3, 3]
    assert np.allclose(train.boxes[1], boxes[1])
    assert test.relative_path(0) == "test/0000000000000007.jpg"
    assert test.relative_path(1) == "test/8000000000000000.jpg"
    assert test.boxes is None and not test.hides_labels and test.observed is test.known
    assert test.orientation.tolist() == [1, 1]
    assert isinstance(train.width, np.memmap)


def test_other_image_folder(tmp_path):
    write(tmp_path / "m", tmp_path / "old")
    assert Manifest(tmp_path / "m", tmp_path / "new").split("train").path(0) == str(tmp_path / "new" / "a.jpg")


def test_images_inside_move_with_the_manifest(tmp_path):
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"])
    writer.image_root = writer.staging / "images"
    writer.image_root.mkdir()
    writer.add_split("train", known=known(), width=[1] * 5, height=[1] * 5, paths=PATHS)
    writer.finish({})
    (tmp_path / "m").rename(tmp_path / "moved")
    assert Manifest(tmp_path / "moved").split("train").path(0) == str(tmp_path / "moved" / "images" / "a.jpg")


def test_nothing_is_a_manifest_until_it_is_finished(tmp_path):
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"], tmp_path / "images")
    writer.add_split("train", known=known(), width=[1] * 5, height=[1] * 5, paths=PATHS)
    assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="not a Manifest"):
        Manifest(writer.staging)
    # What a killed preparation left behind does not hinder the next one.
    write(tmp_path / "m", tmp_path / "images")
    assert not writer.staging.exists()


def test_overwrite(tmp_path):
    write(tmp_path / "m", tmp_path / "p")
    with pytest.raises(UserError, match="--overwrite"):
        write(tmp_path / "m", tmp_path / "p")
    assert write(tmp_path / "m", tmp_path / "p", ["x", "y", "z"], overwrite=True).classes == ["x", "y", "z"]


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("dear")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a Manifest"):
        write(tmp_path / "thesis", tmp_path / "p", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / "file", tmp_path / "p", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "dear"
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "below", tmp_path / "p")


def test_images_are_never_deleted_by_overwriting(tmp_path):
    write(tmp_path / "m", tmp_path / "p")
    (tmp_path / "m" / "images").mkdir()
    with pytest.raises(UserError, match="images lie inside"):
        write(tmp_path / "m", tmp_path / "m" / "images", overwrite=True)
    assert (tmp_path / "m" / "images").is_dir() and not (tmp_path / "m.partial").exists()


def test_two_commands_never_write_one_manifest(tmp_path):
    ours, theirs = multiprocessing.Pipe()

    def other() -> None:
        writer = ManifestWriter(tmp_path / "m", "mine", ["ant"], tmp_path / "p")
        theirs.send("begun")
        theirs.recv()
        assert writer.staging.exists()

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    assert ours.recv() == "begun"
    with pytest.raises(UserError, match=r"another command is writing .*m; wait for it"):
        write(tmp_path / "m", tmp_path / "p")
    ours.send("end")
    process.join()
    assert process.exitcode == 0 and (tmp_path / "m.partial").exists()
    # It is gone, and left its work unfinished.
    assert len(write(tmp_path / "m", tmp_path / "p").split("train")) == 5
    assert not list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize("classes", [["a", "a"], ["a", ""], ["a", "b\nc"], ["a", "b\rc"]])
def test_class_names(tmp_path, classes):
    with pytest.raises(UserError, match="class"):
        ManifestWriter(tmp_path / "m", "mine", classes, tmp_path)
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()


def test_columns_must_have_one_value_a_sample(tmp_path):
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"], tmp_path / "p")
    with pytest.raises(ValueError, match="5 expected"):
        writer.add_split("train", known=known(), width=[1] * 4, height=[1] * 5, paths=PATHS)
    with pytest.raises(ValueError, match="either paths"):
        writer.add_split("val", known=known(), width=[1] * 5, height=[1] * 5)
    with pytest.raises(ValueError, match="observed"):
        writer.add_split("test", known=known(), observed=known(3), width=[1] * 5, height=[1] * 5, paths=PATHS)


def test_opening(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Manifest(tmp_path)
    manifest = write(tmp_path / "m", tmp_path / "p")
    with pytest.raises(UserError, match="no split 'tset'; it has train"):
        manifest.split("tset")
    (tmp_path / "m" / "train" / "width.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"width\.npy cannot be read"):
        _ = Manifest(tmp_path / "m").split("train").width
    meta = tmp_path / "m" / "manifest.json"
    text = meta.read_text()
    meta.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Manifest(tmp_path / "m")
    meta.write_text(text[:20])
    with pytest.raises(UserError, match="damaged"):
        Manifest(tmp_path / "m")

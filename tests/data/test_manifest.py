"""What a Manifest stores, and what stands in the way of opening one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Manifest
from spml_fast.data.remote import mirror
from spml_fast.prepare.manifest_writer import ManifestWriter
from tests.support.data import ODD_PATHS, small_labels, write_manifest


def test_round_trip(tmp_path):
    (tmp_path / "images").mkdir()
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee cat", "ü;,"], tmp_path / "images")
    observed = SparseLabels.from_positives([[0], [], [], [], []], 3, -1)
    boxes = np.array([0, 1, 1, 3, 3, 3]), np.arange(15).reshape(3, 5) / 20
    boxes[1][:, 0] = [0, 2, 1]
    writer.add_split(
        "train",
        known=small_labels(),
        observed=observed,
        width=range(1, 6),
        height=range(6, 11),
        orientation=[1, 8, 1, 1, 3],
        paths=ODD_PATHS,
        boxes=boxes,
    )
    writer.add_split(
        "test", known=small_labels(2), width=[3, 4], height=[5, 6], ids=[7, 2**63], template="{split}/{id:016x}.jpg"
    )
    writer.finish({"note": "ü"})
    manifest = Manifest(tmp_path / "m")
    assert manifest.name == "mine" and manifest.classes == ["ant", "bee cat", "ü;,"] and manifest.num_classes == 3
    train, test = manifest.split("train"), manifest.split("test")
    assert len(train) == 5 and [train.relative_path(i) for i in range(5)] == ODD_PATHS
    assert train.path(1) == str(tmp_path / "images" / ODD_PATHS[1])
    assert train.width.tolist() == [1, 2, 3, 4, 5] and train.height.tolist() == [6, 7, 8, 9, 10]
    assert train.orientation.tolist() == [1, 8, 1, 1, 3]
    assert train.hides_labels and train.observed.rows([0, 1]).tolist() == [[1, -1, -1], [-1, -1, -1]]
    assert np.array_equal(train.known.rows(range(5)), small_labels().rows(range(5)))
    assert train.boxes is not None and train.boxes[0].tolist() == [0, 1, 1, 3, 3, 3]
    assert np.allclose(train.boxes[1], boxes[1])
    assert test.relative_path(0) == "test/0000000000000007.jpg"
    assert test.relative_path(1) == "test/8000000000000000.jpg"
    assert test.boxes is None and not test.hides_labels and test.observed is test.known
    assert test.orientation.tolist() == [1, 1]
    assert isinstance(train.width, np.memmap)


def test_where_it_is_found_is_plain_text(tmp_path, monkeypatch):
    """A run's config.yaml has it, and YAML refuses any other type."""
    write_manifest(tmp_path / "m", tmp_path / "images")
    monkeypatch.setattr(mirror, "fetch_manifest", lambda url, cache: tmp_path / "m")
    for source, where in ((tmp_path / "m", str(tmp_path / "m")), ("s3://bucket/set/", "s3://bucket/set")):
        found = Manifest(source).where
        assert found == where and type(found) is str and yaml.safe_load(yaml.safe_dump({"dir": found}))["dir"] == where


def test_other_image_folder(tmp_path):
    write_manifest(tmp_path / "m", tmp_path / "old")
    assert Manifest(tmp_path / "m", tmp_path / "new").split("train").path(0) == str(tmp_path / "new" / "a.jpg")


def test_images_inside_move_with_the_manifest(tmp_path):
    writer = ManifestWriter(tmp_path / "m", "mine", ["ant", "bee", "cat"])
    writer.image_root = writer.staging / "images"
    writer.image_root.mkdir()
    writer.add_split("train", known=small_labels(), width=[1] * 5, height=[1] * 5, paths=ODD_PATHS)
    writer.finish({})
    (tmp_path / "m").rename(tmp_path / "moved")
    assert Manifest(tmp_path / "moved").split("train").path(0) == str(tmp_path / "moved" / "images" / "a.jpg")


def test_opening(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        Manifest(tmp_path)
    manifest = write_manifest(tmp_path / "m", tmp_path / "p")
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

"""Packing images out of other people's tar files."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.manifest import Split
from spml_fast.prepare.manifest_writer import ManifestWriter
from tests.support.shards import checksums, make_files, pack_quietly, tar_members, write_tar


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Split:
    return make_files(tmp_path_factory.mktemp("files"))


def _special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.fixture
def labels_alone(files, tmp_path) -> Path:
    """A Manifest of two splits by ids, with images that nobody has looked at."""
    writer = ManifestWriter(tmp_path / "labels", "ids", ["a", "b", "c", "d"], tmp_path / "nowhere")
    for name, ids in (("train", range(10)), ("val", range(10, 14))):
        known = SparseLabels.from_positives([[i % 4] for i in ids], 4, 0)
        zeros = np.zeros(len(ids))
        writer.add_split(name, known=known, width=zeros, height=zeros, ids=ids, template=name + "/{id:016x}.jpg")
    return writer.finish({}).folder


def test_foreign_tar_files(files, labels_alone, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    evil = [
        ("/etc/passwd", b"x"),
        ("../../0000000000000003.jpg", b"x"),
        _special("train_0/0000000000000004.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        _special("train_0/0000000000000005.jpg", tarfile.LNKTYPE, "../outside"),
        _special("train_0/0000000000000006.jpg", tarfile.CHRTYPE),
        _special("train_0/0000000000000007.jpg", tarfile.FIFOTYPE),
        _special("train_0", tarfile.DIRTYPE),
        ("train_0/readme.txt", b"x"),
    ]
    write_tar(tars / "train_1.tar", tar_members(files, [9, 3, 11, 5]))
    write_tar(tars / "train_0.tar.gz", evil + tar_members(files, [8, 12, 1, 0, 2, 13, 7, 6, 4]))
    with pytest.raises(
        UserError, match=r"1 of the 4 images of split 'val' are in no tar file .*000a\.jpg.*--leave-out"
    ):
        pack_quietly(labels_alone, tmp_path / "out", tars=tars)
    assert not list(tmp_path.glob("out*"))
    before = sorted(p for p in tmp_path.rglob("*") if "out" not in p.relative_to(tmp_path).parts[0])
    options = {"tars": tars, "leave_out": True, "shard_size": 30_000}
    manifest = pack_quietly(labels_alone, tmp_path / "out2", **options)
    assert sorted(p for p in tmp_path.rglob("*") if "out" not in p.relative_to(tmp_path).parts[0]) == before
    train, val = manifest.split("train"), manifest.split("val")
    # Samples have the order of the tar files, labels and ids follow, sizes are known now.
    assert train.ids.tolist() == [8, 1, 0, 2, 7, 6, 4, 9, 3, 5] and val.ids.tolist() == [12, 13, 11]
    for split in (train, val):
        for i, sample in enumerate(split.ids.tolist()):
            assert split.read(i) == files.read(sample)
            assert split.known.rows([i]).argmax() == sample % 4
            with Image.open(io.BytesIO(split.read(i))) as image:
                assert image.size == (split.width[i], split.height[i])
    report = json.loads((manifest.folder / "report.json").read_text())
    assert report["left_out"]["reasons"] == {"in no tar file": 1}
    notes = " ".join(report["notes"])
    assert "2 members, with an unsafe path" in notes and "2 members, links" in notes
    assert "2 members, devices" in notes and "1 members, not in the Manifest" in notes
    names = set()
    for number in range(len(train.shards.files)):
        with tarfile.open(train.shards.path(number)) as archive:
            names.update(archive.getnames())
    assert "000000004.png" in names and "000000003.jpg" in names
    assert checksums(pack_quietly(labels_alone, tmp_path / "out3", workers=2, **options)) == checksums(manifest)
    # A tar file that is cut off after it was looked through once.
    _killed_tar = tars / "train_0.tar.gz"
    _killed_tar.write_bytes(_killed_tar.read_bytes()[:-9000])
    with pytest.raises(UserError, match=r"tar file .*train_0\.tar\.gz cannot be read beyond .*; download it again"):
        pack_quietly(labels_alone, tmp_path / "out4", **options)


def test_a_image_in_two_tar_files(files, labels_alone, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "a.tar", tar_members(files, range(14)))
    write_tar(tars / "b.tar", tar_members(files, [3]))
    with pytest.raises(UserError, match=r"0003\.jpg is more than once in .*a\.tar and .*b\.tar; keep one"):
        pack_quietly(labels_alone, tmp_path / "out", tars=tars)
    with pytest.raises(UserError, match="is not a folder"):
        pack_quietly(labels_alone, tmp_path / "out5", tars=tmp_path / "none")


def test_equal_file_names_are_told_apart_by_their_folders(files, tmp_path):
    paths = ["a/1.jpg", "b/1.jpg", "b/2.jpg"]
    writer = ManifestWriter(tmp_path / "m", "mine", ["x"], tmp_path)
    labels = SparseLabels.from_positives([[0]] * 3, 1, 0)
    writer.add_split("train", known=labels, width=[0] * 3, height=[0] * 3, paths=paths)
    writer.finish({})
    (tmp_path / "tars").mkdir()
    write_tar(
        tmp_path / "tars" / "a.tar", [(name, files.read(i)) for i, name in enumerate(["b/2.jpg", "b/1.jpg", "a/1.jpg"])]
    )
    split = pack_quietly(tmp_path / "m", tmp_path / "out", tars=tmp_path / "tars").split("train")
    assert [split.relative_path(i) for i in range(3)] == ["b/2.jpg", "b/1.jpg", "a/1.jpg"]

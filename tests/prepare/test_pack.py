"""Packing images into shards: what is carried over, what stops it, and resuming what was cut off."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.labels import SparseLabels
from spml_fast.data.loader import EvalLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.pack import run
from spml_fast.prepare.pack import writer as shard_writer
from tests.support.loading import GREY
from tests.support.pil import make_split, photo
from tests.support.shards import COUNT, checksums, make_files, pack_quietly


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Split:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory) -> Split:
    """The same images in shards."""
    return pack_quietly(files.folder.parent, tmp_path_factory.mktemp("packed") / "m").split("train")


def test_shards_are_plain_tar_with_an_index(files, packed):
    shards = packed.shards
    assert len(shards.files) > 3 and sum(f.samples for f in shards.files) == COUNT
    assert (np.lexsort((shards.table[:, 1], shards.table[:, 0])) == np.arange(COUNT)).all()
    members: dict[str, bytes] = {}
    for number, file in enumerate(shards.files):
        assert os.path.getsize(shards.path(number)) == file.size <= 60_000 + tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
        with tarfile.open(shards.path(number)) as archive:
            for member in archive:
                # How webdataset splits a name; a key may not come twice.
                key, ending = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
                assert member.isreg() and key not in members and ending in ("jpg", "png")
                members[key] = archive.extractfile(member).read()
    for i in range(COUNT):
        original = Path(files.path(i)).read_bytes()
        assert members[f"{i:09d}"] == packed.read(i) == files.read(i) == original
    many = [5, 30, 5, 0, 36]
    assert [a.tobytes() for a in shards.read_many(many)] == [files.read(i) for i in many]


def test_everything_else_is_carried_over(small_digits, tmp_path):
    old = Manifest(small_digits)
    new = pack_quietly(small_digits, tmp_path / "m", shard_size=100_000)
    assert new.classes == old.classes and new.name == old.name and list(new.splits) == list(old.splits)
    for name, split in old.splits.items():
        ours = new.split(name)
        for column in ("width", "height", "orientation", "ids"):
            np.testing.assert_array_equal(getattr(ours, column), getattr(split, column))
        assert ours.hides_labels == split.hides_labels
        for labels in ("known", "observed"):
            np.testing.assert_array_equal(
                getattr(ours, labels).rows(range(len(split))), getattr(split, labels).rows(range(len(split)))
            )
        assert all((a == b).all() for a, b in zip(ours.boxes, split.boxes, strict=True))
        assert [ours.relative_path(i) for i in range(9)] == [split.relative_path(i) for i in range(9)]
    report = json.loads((new.folder / "report.json").read_text())
    assert report["shards"]["bytes"] == sum(f.stat().st_size for f in (new.folder / "shards").iterdir())
    # Packing what is packed already gives the same shards.
    again = pack_quietly(new.folder, tmp_path / "again", shard_size=100_000)
    assert checksums(again) == checksums(new)


def test_content_does_not_depend_on_the_processes(files, packed, tmp_path):
    shrunk = [pack_quietly(files.folder.parent, tmp_path / f"{n}", workers=n, short_side=50) for n in (1, 2)]
    assert checksums(shrunk[0]) == checksums(shrunk[1])
    copied = pack_quietly(files.folder.parent, tmp_path / "copied", workers=2)
    assert checksums(copied) == [f.sha256 for f in packed.shards.files]


def test_short_side(files, tmp_path):
    manifest = pack_quietly(files.folder.parent, tmp_path / "m", short_side=75, quality=95)
    split = manifest.split("train")
    for i in range(COUNT):
        width, height = int(files.width[i]), int(files.height[i])
        with Image.open(io.BytesIO(split.read(i))) as image:
            if min(width, height) <= 75:
                assert split.read(i) == files.read(i) and split.orientation[i] == files.orientation[i]
                continue
            assert image.format == "JPEG" and not image.getexif() and split.orientation[i] == 1
            assert image.size == (split.width[i], split.height[i]) and min(image.size) == 75
            assert max(image.size) == round(max(width, height) * 75 / min(width, height))
    assert {int(min(w, h)) for w, h in zip(split.width, split.height, strict=True)} == {70, 75}
    # Turned as the loader turns the original.
    views = [
        torch.cat([v.views["eval"][: v.real] for v in EvalLoader(s, DataConfig(image_size=40), batch_size=8, **GREY)])
        for s in (files, split)
    ]
    assert (views[0] - views[1]).abs().mean(dim=(1, 2, 3)).max() < 4


def test_sixteen_bits_are_not_clipped(tmp_path):
    grey = np.array(photo(1, 80, 60).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    make_split(tmp_path / "manifest", tmp_path, ["deep.png"])
    split = pack_quietly(tmp_path / "manifest", tmp_path / "m", short_side=30).split("train")
    with Image.open(io.BytesIO(split.read(0))) as image:
        small = Image.fromarray(grey).resize((40, 30), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(image.convert("L"), int) - np.asarray(small, int)).mean() < 4


@pytest.mark.parametrize(
    "data, says",
    [
        (None, "missing file"),
        (b"", "empty file"),
        (b"no image", "not an image"),
        ("other size", r"another size than .* \(9 x 7 pixels now, 111 x 70 then\)"),
    ],
)
def test_bad_images_stop_the_work_or_are_left_out(data, says, files, tmp_path):
    root = tmp_path / "files"
    names = [files.relative_path(i) for i in range(6)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(files.read(i))
    labels = SparseLabels.from_positives([[i % 3] for i in range(6)], 3, 0)
    writer = ManifestWriter(tmp_path / "m", "mine", ["a", "b", "c"], root)
    columns = {name: getattr(files, name)[:6] for name in ("width", "height", "orientation")}
    writer.add_split("train", known=labels, paths=names, **columns)
    writer.finish({"splits": {"train": {"left_out": 2}}})
    bad = root / names[3]
    if data is None:
        bad.unlink()
    elif isinstance(data, str):
        photo(1, 9, 7).save(bad)
    else:
        bad.write_bytes(data)
    with pytest.raises(UserError, match=rf"image .*3\.x\.jpg of split 'train' cannot be packed: {says}.*--leave-out"):
        pack_quietly(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Decided on the way: the command goes on.
    split = pack_quietly(tmp_path / "m", tmp_path / "out", leave_out=True).split("train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "m", "out"]
    assert [split.relative_path(i) for i in range(len(split))] == [names[i] for i in (0, 1, 2, 4, 5)]
    assert [split.read(i) for i in range(5)] == [files.read(i) for i in (0, 1, 2, 4, 5)]
    assert split.known.rows(range(5)).argmax(1).tolist() == [0, 1, 2, 1, 2]
    report = json.loads((split.folder.parent / "report.json").read_text())
    assert report["left_out"]["total"] == 1 and report["left_out"]["images"][0]["path"] == names[3]
    assert report["splits"]["train"]["left_out"] == 3, "those of preparation, too"


def _killed(source: Path, out: Path, after: int) -> None:
    """Pack in a process that is killed in the middle of writing an image."""

    def work() -> None:
        made = run.make_image
        count = itertools.count()

        def make(*args):
            if next(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(*args)

        run.make_image = make
        pack_quietly(source, out)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_run_goes_on(files, packed, tmp_path):
    out, work = tmp_path / "m", tmp_path / "m.packing"
    source = files.folder.parent
    _killed(source, out, 30)
    whole = sorted(work.glob("*.npz"))
    done = [p.stem for p in whole if p.stem != "plan"]
    assert 1 < len(done) < len(packed.shards.files) and list((work / "shards").glob("*.partial")) and not out.exists()
    stamps = {name: os.stat(work / "shards" / f"{name}.tar").st_ino for name in done}
    # Damage since then is noticed, and so is other work in the same place.
    spoiled = work / "shards" / f"{done[0]}.tar"
    data = bytearray(spoiled.read_bytes())
    data[700] ^= 1
    spoiled.write_bytes(data)
    with pytest.raises(UserError, match="holds shards of another command"):
        pack_quietly(source, out, short_side=10)
    written: list[str] = []
    finish = shard_writer.ShardWriter.finish

    def note(writer):
        written.append(writer.planned.name)
        finish(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "finish", note)
        manifest = pack_quietly(source, out)
    assert checksums(manifest) == [f.sha256 for f in packed.shards.files]
    assert done[0] in written and not set(done[1:]) & set(written)
    assert {n: os.stat(out / "shards" / f"{n}.tar").st_ino for n in done[1:]} == {n: stamps[n] for n in done[1:]}
    assert not work.exists() and not list(out.rglob("*.partial"))


def test_cut_off_at_the_very_end(files, packed, tmp_path, monkeypatch):
    def fail(self, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ManifestWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            pack_quietly(files.folder.parent, tmp_path / "m")
    monkeypatch.setattr(run, "make_image", lambda *args: pytest.fail("packed again"))
    assert checksums(pack_quietly(files.folder.parent, tmp_path / "m")) == [f.sha256 for f in packed.shards.files]


def test_no_room_is_one_sentence(files, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer.HashingFile, "write", full)
    with pytest.raises(UserError, match=r"failed \(No space left on device\); what is whole is kept"):
        pack_quietly(files.folder.parent, tmp_path / "m")


def test_the_images_are_never_overwritten(files, packed, tmp_path):
    root = files.folder.parent.parent
    for out in (files.folder.parent, root):
        with pytest.raises(UserError, match=r"lies inside --out|exists and is not a Manifest"):
            pack_quietly(files.folder.parent, out, overwrite=True)
    assert (files.folder.parent / "manifest.json").exists()
    with (
        run.locked(tmp_path),
        pytest.raises(UserError, match="another command is packing"),
        run.locked(tmp_path),
    ):
        pass

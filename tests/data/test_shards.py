"""Tar shards: packing, reading them back, what damage does, and that training sees the same batches as from files."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spml_fast.cli import prepare
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import shards as reading
from spml_fast.data.labels import SparseLabels
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.manifest_writer import ManifestWriter
from spml_fast.prepare.pack import PackOptions, command, images, pack, run
from spml_fast.prepare.pack import writer as shard_writer
from tests.support.pil import make_split, photo

GREY = {"device": torch.device("cpu"), "mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
COUNT = 38


def _pack(source: Path, out: Path, **changes) -> Manifest:
    return pack(PackOptions(source, out, **{"shard_size": 60_000, "workers": 1, "progress": False, **changes}))


def _checksums(manifest: Manifest) -> list[str]:
    return [file.sha256 for split in manifest.splits.values() for file in split.shards.files]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Split:
    """Images of several sizes and kinds as files, some turned by their EXIF data."""
    root = tmp_path_factory.mktemp("files")
    (root / "föl der").mkdir()
    names, turned = [], []
    for i in range(COUNT):
        names.append(f"föl der/{i}.x.{'png' if i % 9 == 4 else 'jpg'}")
        photo(i, 90 + 7 * (i % 5), 70 + 11 * (i % 3)).save(root / names[-1], quality=90)
        turned.append(1 + i % 8 if i % 4 == 0 else 1)
    return make_split(root / "manifest", root, names, orientation=turned)


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory) -> Split:
    """The same images in shards."""
    return _pack(files.folder.parent, tmp_path_factory.mktemp("packed") / "m").split("train")


def _opened_anew(split: Split) -> tuple[Split, Callable[[int], bool]]:
    """The same split with files of its own, and whether a descriptor is one of them.

    Loaders of other tests in this process may still be reading ahead from theirs.
    """
    anew = Manifest(split.folder.parent).split(split.name)
    return anew, lambda fd: fd in {file.fd for file in list(anew.shards._open.values())}


def _copy(split: Split, tmp_path: Path) -> Split:
    """A copy of a packed Manifest that a test may damage."""
    for path in split.folder.parent.rglob("*"):
        target = tmp_path / "copy" / path.relative_to(split.folder.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    return Manifest(tmp_path / "copy").split("train")


# --- Packing ---------------------------------------------------------------------------------------------------------


def test_shards_are_plain_tar_with_an_index(files, packed):
    shards = packed.shards
    assert len(shards.files) > 3 and sum(f.samples for f in shards.files) == COUNT
    assert (np.lexsort((shards.table[:, 1], shards.table[:, 0])) == np.arange(COUNT)).all()
    found: dict[str, bytes] = {}
    for number, file in enumerate(shards.files):
        assert os.path.getsize(shards.path(number)) == file.size <= 60_000 + tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE
        with tarfile.open(shards.path(number)) as archive:
            for member in archive:
                # How webdataset splits a name; a key may not come twice.
                key, ending = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name).groups()
                assert member.isreg() and key not in found and ending in ("jpg", "png")
                found[key] = archive.extractfile(member).read()
    for i in range(COUNT):
        original = Path(files.path(i)).read_bytes()
        assert found[f"{i:09d}"] == packed.read(i) == files.read(i) == original
    many = [5, 30, 5, 0, 36]
    assert [a.tobytes() for a in shards.read_many(many)] == [files.read(i) for i in many]


def test_everything_else_is_carried_over(small_digits, tmp_path):
    old = Manifest(small_digits)
    new = _pack(small_digits, tmp_path / "m", shard_size=100_000)
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
    again = _pack(new.folder, tmp_path / "again", shard_size=100_000)
    assert _checksums(again) == _checksums(new)


def test_content_does_not_depend_on_the_processes(files, packed, tmp_path):
    shrunk = [_pack(files.folder.parent, tmp_path / f"{n}", workers=n, short_side=50) for n in (1, 2)]
    assert _checksums(shrunk[0]) == _checksums(shrunk[1])
    copied = _pack(files.folder.parent, tmp_path / "copied", workers=2)
    assert _checksums(copied) == [f.sha256 for f in packed.shards.files]


def test_short_side(files, tmp_path):
    manifest = _pack(files.folder.parent, tmp_path / "m", short_side=75, quality=95)
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
    split = _pack(tmp_path / "manifest", tmp_path / "m", short_side=30).split("train")
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
    writer.finish({})
    bad = root / names[3]
    if data is None:
        bad.unlink()
    elif isinstance(data, str):
        photo(1, 9, 7).save(bad)
    else:
        bad.write_bytes(data)
    with pytest.raises(UserError, match=rf"image .*3\.x\.jpg of split 'train' cannot be packed: {says}.*--leave-out"):
        _pack(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # Decided on the way: the command goes on.
    split = _pack(tmp_path / "m", tmp_path / "out", leave_out=True).split("train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "m", "out"]
    assert [split.relative_path(i) for i in range(len(split))] == [names[i] for i in (0, 1, 2, 4, 5)]
    assert [split.read(i) for i in range(5)] == [files.read(i) for i in (0, 1, 2, 4, 5)]
    assert split.known.rows(range(5)).argmax(1).tolist() == [0, 1, 2, 1, 2]
    report = json.loads((split.folder.parent / "report.json").read_text())
    assert report["left_out"]["total"] == 1 and report["left_out"]["images"][0]["path"] == names[3]


def _killed(source: Path, out: Path, after: int) -> None:
    """Pack in a process that is killed in the middle of writing an image."""

    def work() -> None:
        made = images.make_image
        count = itertools.count()

        def make(*args):
            if next(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(*args)

        images.make_image = make
        _pack(source, out)

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
        _pack(source, out, short_side=10)
    written: list[str] = []
    finish = shard_writer.ShardWriter.finish

    def note(writer):
        written.append(writer.planned.name)
        finish(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "finish", note)
        manifest = _pack(source, out)
    assert _checksums(manifest) == [f.sha256 for f in packed.shards.files]
    assert done[0] in written and not set(done[1:]) & set(written)
    assert {n: os.stat(out / "shards" / f"{n}.tar").st_ino for n in done[1:]} == {n: stamps[n] for n in done[1:]}
    assert not work.exists() and not list(out.rglob("*.partial"))


def test_cut_off_at_the_very_end(files, packed, tmp_path, monkeypatch):
    def fail(self, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ManifestWriter, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            _pack(files.folder.parent, tmp_path / "m")
    monkeypatch.setattr(images, "make_image", lambda *args: pytest.fail("packed again"))
    assert _checksums(_pack(files.folder.parent, tmp_path / "m")) == [f.sha256 for f in packed.shards.files]


def test_no_room_is_one_sentence(files, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer.HashingFile, "write", full)
    with pytest.raises(UserError, match=r"failed \(No space left on device\); what is whole is kept"):
        _pack(files.folder.parent, tmp_path / "m")


def test_the_images_are_never_overwritten(files, packed, tmp_path):
    root = files.folder.parent.parent
    for out in (files.folder.parent, root):
        with pytest.raises(UserError, match=r"lies inside --out|exists and is not a Manifest"):
            _pack(files.folder.parent, out, overwrite=True)
    assert (files.folder.parent / "manifest.json").exists()
    with (
        run.locked(tmp_path),
        pytest.raises(UserError, match="another command is packing"),
        run.locked(tmp_path),
    ):
        pass


# --- Foreign tar files -----------------------------------------------------------------------------------------------


def _tar(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    path.write_bytes(gzip.compress(data.getvalue(), 1) if path.suffix == ".gz" else data.getvalue())


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


def _openimages(files: Split, ids) -> list[tuple[str, bytes]]:
    # PNG files under a name that says JPEG are packed by what they are.
    return [(f"./train_0/{i:016x}.jpg", files.read(i)) for i in ids]


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
    _tar(tars / "train_1.tar", _openimages(files, [9, 3, 11, 5]))
    _tar(tars / "train_0.tar.gz", evil + _openimages(files, [8, 12, 1, 0, 2, 13, 7, 6, 4]))
    with pytest.raises(
        UserError, match=r"1 of the 4 images of split 'val' are in no tar file .*000a\.jpg.*--leave-out"
    ):
        _pack(labels_alone, tmp_path / "out", tars=tars)
    assert not list(tmp_path.glob("out*"))
    before = sorted(p for p in tmp_path.rglob("*") if "out" not in p.relative_to(tmp_path).parts[0])
    options = {"tars": tars, "leave_out": True, "shard_size": 30_000}
    manifest = _pack(labels_alone, tmp_path / "out2", **options)
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
    assert _checksums(_pack(labels_alone, tmp_path / "out3", workers=2, **options)) == _checksums(manifest)
    # A tar file that is cut off after it was looked through once.
    _killed_tar = tars / "train_0.tar.gz"
    _killed_tar.write_bytes(_killed_tar.read_bytes()[:-9000])
    with pytest.raises(UserError, match=r"tar file .*train_0\.tar\.gz cannot be read on from .*; fetch it again"):
        _pack(labels_alone, tmp_path / "out4", **options)


def test_a_image_in_two_tar_files(files, labels_alone, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    _tar(tars / "a.tar", _openimages(files, range(14)))
    _tar(tars / "b.tar", _openimages(files, [3]))
    with pytest.raises(UserError, match=r"0003\.jpg is more than once in .*a\.tar and .*b\.tar; keep one"):
        _pack(labels_alone, tmp_path / "out", tars=tars)
    with pytest.raises(UserError, match="is not a folder"):
        _pack(labels_alone, tmp_path / "out5", tars=tmp_path / "none")


def test_equal_file_names_are_told_apart_by_their_folders(files, tmp_path):
    paths = ["a/1.jpg", "b/1.jpg", "b/2.jpg"]
    writer = ManifestWriter(tmp_path / "m", "mine", ["x"], tmp_path)
    labels = SparseLabels.from_positives([[0]] * 3, 1, 0)
    writer.add_split("train", known=labels, width=[0] * 3, height=[0] * 3, paths=paths)
    writer.finish({})
    (tmp_path / "tars").mkdir()
    _tar(
        tmp_path / "tars" / "a.tar", [(name, files.read(i)) for i, name in enumerate(["b/2.jpg", "b/1.jpg", "a/1.jpg"])]
    )
    split = _pack(tmp_path / "m", tmp_path / "out", tars=tmp_path / "tars").split("train")
    assert [split.relative_path(i) for i in range(3)] == ["b/2.jpg", "b/1.jpg", "a/1.jpg"]


# --- Batches ---------------------------------------------------------------------------------------------------------


def _config(**changes) -> DataConfig:
    return DataConfig(**{"image_size": 40, "threads": 2, "shuffle_window": 12, "shuffle_block": 3, **changes})


def _train(split: Split, config: DataConfig, **changes) -> TrainLoader:
    options = {"views": ("weak",), "batch_size": 4, "accumulation": 1, "seed": 5, "world_size": 1, "rank": 0}
    return TrainLoader(split, config, **{**options, **GREY, **changes})


def _same(ours, theirs) -> bool:
    return torch.equal(ours.index, theirs.index) and all(
        torch.equal(ours.views[name], theirs.views[name]) for name in theirs.views
    )


def _flat(updates) -> list:
    return list(itertools.chain.from_iterable(updates))


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_batches_of_files_and_shards_are_equal(shuffle, files, packed):
    config = _config(shuffle=shuffle, train_crop="random_resized", prefetch=3)
    loaders = [_train(split, config, views=("weak", "strong")) for split in (packed, files)]
    for epoch in range(2):
        ours, theirs = (_flat(loader.epoch(epoch)) for loader in loaders)
        assert len(ours) == len(theirs) == 10
        assert all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    if shuffle == "global":
        pairs = [EvalLoader(split, config, batch_size=8, world_size=2, rank=1, **GREY) for split in (packed, files)]
        for _ in range(2):
            assert all(_same(a, b) for a, b in zip(*pairs, strict=True))


def test_windows_resume_anywhere_and_may_be_left(packed):
    config = _config(shuffle="window")
    whole = {epoch: _flat(_train(packed, config).epoch(epoch)) for epoch in range(3)}
    loader = _train(packed, config)
    for start in (1, 4, 9):
        # A window is 3 updates long, so this is within one, and at the start of the last.
        assert all(_same(a, b) for a, b in zip(_flat(loader.epoch(1, start)), whole[1][start:], strict=True))
    left = loader.epoch(0)
    assert _same(next(left)[0], whole[0][0])
    left.close()
    assert all(_same(a, b) for a, b in zip(_flat(loader.epoch(0, 1)), whole[0][1:], strict=True))
    # The next epoch has been read ahead by now.
    assert loader._stream._ahead[0].requests[0].key[0] == 1
    assert all(_same(a, b) for a, b in zip(_flat(loader.epoch(2)), whole[2], strict=True))


def test_two_ranks_see_the_batches_of_one(packed):
    config = _config(shuffle="window")
    one = _flat(_train(packed, config).epoch(3))
    two = [_flat(_train(packed, config, world_size=2, rank=rank).epoch(3)) for rank in range(2)]
    for whole, first, second in zip(one, *two, strict=True):
        assert torch.equal(whole.index, torch.cat([first.index, second.index]))
        assert torch.equal(whole.views["weak"], torch.cat([first.views["weak"], second.views["weak"]]))


def test_a_window_is_read_in_the_order_of_the_disk(packed, monkeypatch):
    # Large enough for the holes not to be read through.
    reads: list[tuple[str, int, int]] = []
    packed, ours = _opened_anew(packed)

    def note(fd, buffers, offset):
        got = preadv(fd, buffers, offset)
        if ours(fd):
            reads.append((os.readlink(f"/proc/self/fd/{fd}"), offset, got))
        return got

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", note)
    monkeypatch.setattr(reading, "_READ_THROUGH", 0)
    loader = _train(packed, _config(shuffle="window", read_threads=1))
    depth = 0
    order = loader.order.permutation(0)
    for _ in loader.epoch(0):
        depth = max(depth, len(loader._stream._ahead))
    assert depth == 2
    monkeypatch.undo()
    table = packed.shards.table
    position = 0
    for window in range(4):
        rows = np.sort(order[12 * window : 12 * window + 12])
        wanted = [(packed.shards.path(int(table[i, 0])), int(table[i, 1])) for i in rows]
        found = reads[position : position + len(wanted)]
        assert [entry[:2] for entry in found] == wanted
        position += len(wanted)


def test_images_that_follow_each_other_are_read_in_one_go(packed, monkeypatch):
    calls: list[int] = []
    packed, ours = _opened_anew(packed)
    preadv = os.preadv

    def note(fd, buffers, offset):
        if ours(fd):
            calls.append(fd)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    got = reading.ShardReader(packed.shards, 1).submit(np.arange(COUNT)[::-1]).result()
    assert [a.tobytes() for a in got] == [packed.read(i) for i in range(COUNT)][::-1]
    # Reading one by one afterwards took the other calls.
    assert len(calls) == len(packed.shards.files) + COUNT


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_spans_cover_what_is_asked_for_once(data):
    """Whatever is asked for: every position is in one span, and the spans are in the order of the disk."""
    count = data.draw(st.integers(0, 40))
    sizes = data.draw(st.lists(st.integers(0, 3 << 20), min_size=count, max_size=count))
    shard = np.sort(np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), np.int64))
    ends = np.cumsum(np.array(sizes, np.int64) + 1024)
    rows = np.stack([shard, ends - np.array(sizes, np.int64), np.array(sizes, np.int64)], 1).reshape(-1, 3)
    asked = np.array(data.draw(st.lists(st.integers(0, max(0, count - 1)), max_size=60 if count else 0)), np.int64)
    rows = rows[asked].reshape(-1, 3)
    tasks = reading._tasks(rows, data.draw(st.integers(1, 5)))
    spans = [span for task in tasks for span in task]
    assert sorted(np.concatenate(spans).tolist() if spans else []) == list(range(len(asked)))
    places = [tuple(rows[i, :2]) for span in spans for i in span]
    assert places == sorted(places)
    for span in spans:
        assert len(span) and len(set(rows[span, 0].tolist())) == 1
        gaps = rows[span[1:], 1] - (rows[span[:-1], 1] + rows[span[:-1], 2])
        assert ((gaps >= 0) & (gaps <= reading._READ_THROUGH)).all()
        assert len(span) == 1 or rows[span, 2].sum() <= reading._TASK_BYTES


def test_short_reads_are_continued(tmp_path, monkeypatch):
    data = os.urandom(5000)
    (tmp_path / "f").write_bytes(data)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [memoryview(buffers[0])[:7]], at))
    parts = [bytearray(n) for n in (3, 700, 1, 296)]
    with open(tmp_path / "f", "rb") as file:
        assert reading._read_into(file.fileno(), [memoryview(p) for p in parts], 100) == 1000
        assert b"".join(parts) == data[100:1100]
        assert reading._read_into(file.fileno(), [memoryview(bytearray(50))], 4990) == 10


# --- Damage ----------------------------------------------------------------------------------------------------------


def _damage_image(split: Split, path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)


def _cut_short(split: Split, path: Path, offset: int) -> None:
    path.write_bytes(path.read_bytes()[: offset + 10])


def _remove(split: Split, path: Path, offset: int) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            _damage_image,
            r"image föl der/20\.x\.jpg at offset {o} of shard {p} \(sample 20 of split 'train'\) cannot be read",
        ),
        (
            _cut_short,
            r"image at offset \d+ of shard {p} \(sample 2\d of .*\) cannot be read \(the shard ends at byte {e}\)",
        ),
        (_remove, r"image at offset \d+ of shard {p} \(sample \d+ of .*cannot be read \(the shard is missing\)"),
    ],
)
def test_damage_is_named_and_can_be_put_right(spoil, says, packed, tmp_path):
    split = _copy(packed, tmp_path)
    shard, offset, _ = split.shards.table[20].tolist()
    path = Path(split.shards.path(shard))
    says = says.format(o=offset, e=offset + 10, p=re.escape(str(path)))
    whole = path.read_bytes()
    loader = _train(split, _config(shuffle="window"))
    first = _flat(loader.epoch(0))
    spoil(split, path, offset)
    split.shards.forget(shard)
    for read in (lambda: list(loader.epoch(2)), lambda: list(EvalLoader(split, _config(), batch_size=4, **GREY))):
        with pytest.raises(UserError, match=f"{says}.*; restore the shard, or pack the images again"):
            read()
    with pytest.raises(UserError, match=rf"shard {re.escape(str(path))} \(samples \d+ to \d+ of split 'train'\)"):
        command.check(Manifest(tmp_path / "copy"))
    path.write_bytes(whole)
    split.shards.forget(shard)
    assert all(_same(a, b) for a, b in zip(_flat(loader.epoch(0)), first, strict=True))


def test_check_finds_one_flipped_bit(packed, tmp_path, capsys):
    split = _copy(packed, tmp_path)
    assert prepare.main(["shard", "--check", str(tmp_path / "copy")]) == 0
    assert "every checksum is right" in capsys.readouterr().out
    path = Path(split.shards.path(2))
    data = bytearray(path.read_bytes())
    data[-6000] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} .* is damaged: its checksum has changed") as caught:
        prepare.main(["shard", "--check", str(tmp_path / "copy")])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give --manifest and --out"):
        prepare.main(["shard", "--out", str(tmp_path / "x")])
    (split.folder / "shards.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"shard index .* cannot be read"):
        _ = Manifest(tmp_path / "copy").split("train").shards


def test_reading_threads_end_with_their_reader(packed):
    reader = reading.ShardReader(packed.shards, 3)
    before = set(threading.enumerate())
    reader.submit(np.arange(5)).result()
    threads = set(threading.enumerate()) - before
    # Daemons: a program that ends does not wait for what is being read ahead.
    assert len(threads) == 3 and all(thread.daemon for thread in threads)
    del reader
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_many_shards_do_not_keep_many_files_open(packed, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_OPEN", 2)
    shards = reading.Shards(packed.folder, packed.image_root)
    before = len(os.listdir("/proc/self/fd"))
    assert all(shards.read(i) == packed.read(i) for i in range(COUNT))
    assert len(os.listdir("/proc/self/fd")) - before <= 2 + len(packed.shards.files)
    assert len(shards._open) == 2

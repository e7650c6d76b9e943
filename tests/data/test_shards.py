"""Reading shards: the same batches as from files, in the order of the disk, and what damage does."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data import shards as reading
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.prepare.pack import command
from tests.support.loading import GREY, flat
from tests.support.prepare import run_prepare
from tests.support.shards import COUNT, make_files, pack_quietly


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Split:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory) -> Split:
    """The same images in shards."""
    return pack_quietly(files.folder.parent, tmp_path_factory.mktemp("packed") / "m").split("train")


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


def _config(**changes) -> DataConfig:
    """Shards are read in every epoch."""
    given = {"image_size": 40, "threads": 2, "shuffle_window": 12, "shuffle_block": 3, "keep_decoded": 0}
    return DataConfig(**{**given, **changes})


def _train(split: Split, config: DataConfig, **changes) -> TrainLoader:
    options = {"views": ("weak",), "batch_size": 4, "accumulation": 1, "seed": 5, "world_size": 1, "rank": 0}
    return TrainLoader(split, config, **{**options, **GREY, **changes})


def _same(ours, theirs) -> bool:
    return torch.equal(ours.index, theirs.index) and all(
        torch.equal(ours.views[name], theirs.views[name]) for name in theirs.views
    )


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_batches_of_files_and_shards_are_equal(shuffle, files, packed):
    config = _config(shuffle=shuffle, train_crop="random_resized", prefetch=3)
    loaders = [_train(split, config, views=("weak", "strong")) for split in (packed, files)]
    for epoch in range(2):
        ours, theirs = (flat(loader.epoch(epoch)) for loader in loaders)
        assert len(ours) == len(theirs) == 10
        assert all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    if shuffle == "global":
        pairs = [EvalLoader(split, config, batch_size=8, world_size=2, rank=1, **GREY) for split in (packed, files)]
        for _ in range(2):
            assert all(_same(a, b) for a, b in zip(*pairs, strict=True))


def test_windows_resume_anywhere_and_may_be_left(packed):
    config = _config(shuffle="window")
    whole = {epoch: flat(_train(packed, config).epoch(epoch)) for epoch in range(3)}
    loader = _train(packed, config)
    for start in (1, 4, 9):
        # A window is 3 updates long, so this is within one, and at the start of the last.
        assert all(_same(a, b) for a, b in zip(flat(loader.epoch(1, start)), whole[1][start:], strict=True))
    left = loader.epoch(0)
    assert _same(next(left)[0], whole[0][0])
    left.close()
    assert all(_same(a, b) for a, b in zip(flat(loader.epoch(0, 1)), whole[0][1:], strict=True))
    # The next epoch has been read ahead by now.
    assert loader._stream._ahead[0].requests[0].key[0] == 1
    assert all(_same(a, b) for a, b in zip(flat(loader.epoch(2)), whole[2], strict=True))


def test_two_ranks_see_the_batches_of_one(packed):
    config = _config(shuffle="window")
    one = flat(_train(packed, config).epoch(3))
    two = [flat(_train(packed, config, world_size=2, rank=rank).epoch(3)) for rank in range(2)]
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
    order = loader.sampler.permutation(0)
    for _ in loader.epoch(0):
        depth = max(depth, len(loader._stream._ahead))
    assert depth == 2
    monkeypatch.undo()
    table = packed.shards.table
    position = 0
    for window in range(4):
        rows = np.sort(order[12 * window : 12 * window + 12])
        wanted = [(packed.shards.path(int(table[i, 0])), int(table[i, 1])) for i in rows]
        got = reads[position : position + len(wanted)]
        assert [entry[:2] for entry in got] == wanted
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
    positions = [tuple(rows[i, :2]) for span in spans for i in span]
    assert positions == sorted(positions)
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
    first = flat(loader.epoch(0))
    spoil(split, path, offset)
    split.shards.forget(shard)
    for read in (lambda: list(loader.epoch(2)), lambda: list(EvalLoader(split, _config(), batch_size=4, **GREY))):
        with pytest.raises(UserError, match=f"{says}.*; restore the shard, or pack the images again"):
            read()
    with pytest.raises(UserError, match=rf"shard {re.escape(str(path))} \(samples \d+ to \d+ of split 'train'\)"):
        command.check(Manifest(tmp_path / "copy"))
    path.write_bytes(whole)
    split.shards.forget(shard)
    assert all(_same(a, b) for a, b in zip(flat(loader.epoch(0)), first, strict=True))


def test_check_finds_one_flipped_bit(packed, tmp_path, capsys):
    split = _copy(packed, tmp_path)
    run_prepare("shard", "--check", tmp_path / "copy")
    assert "every checksum is right" in capsys.readouterr().out
    path = Path(split.shards.path(2))
    data = bytearray(path.read_bytes())
    data[-6000] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} .* is damaged: its checksum has changed") as caught:
        run_prepare("shard", "--check", tmp_path / "copy")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give --manifest and --out"):
        run_prepare("shard", "--out", tmp_path / "x")
    (split.folder / "shards.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"shards\.json is not a list of shards"):
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


@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_bad_images_in_shards_are_replaced(shuffle, packed, tmp_path):
    """One whose bytes are no image, and the last ones of a shard that is cut short."""
    split = _copy(packed, tmp_path)
    table = np.asarray(split.shards.table)
    last = int(table[:, 0].max())
    inside = np.flatnonzero(table[:, 0] == last)
    end = inside[np.argmax(table[inside, 1])]
    os.truncate(split.shards.path(last), int(table[end, 1]) + 5)
    shard, offset, size = table[3].tolist()
    with open(split.shards.path(shard), "r+b") as file:
        file.seek(offset)
        file.write(bytes(size))
    config = _config(shuffle=shuffle, bad_images="replace")
    loader = _train(split, config)
    seen = torch.cat([batch.index for batch in flat(loader.epoch(0))]).tolist()
    assert set(loader.bad_images.reasons) == {3, int(end)}
    assert len(seen) == COUNT and not {3, int(end)} & set(seen)
    with pytest.raises(UserError, match="cannot be read"):
        flat(_train(split, _config(shuffle=shuffle)).epoch(0))

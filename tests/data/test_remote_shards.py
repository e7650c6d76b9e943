"""Data sets that are read from a web server: the same batches as from the disk, whatever the network does."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.range_server import Fault
from spml_fast.core.config import DataConfig
from spml_fast.core.errors import UserError
from spml_fast.data.loader import EvalLoader, TrainLoader
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.remote import mirror
from spml_fast.data.remote.store import StoreError
from spml_fast.data.shards import ShardReader
from spml_fast.prepare.pack import command
from tests.support.loading import GREY, flat
from tests.support.remote import need_http, serve
from tests.support.remote import no_pauses as no_pauses
from tests.support.shards import COUNT, make_files, pack_quietly

need_http()
BLOCK = 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Split:
    """Images in shards on the disk: MANIFEST in a folder that servers serve."""
    files = make_files(tmp_path_factory.mktemp("files"))
    return pack_quietly(files.folder.parent, tmp_path_factory.mktemp("served") / "m").split("train")


def served(split: Split) -> Path:
    return split.folder.parent.parent


def copied(split: Split, tmp_path: Path) -> Split:
    """A copy that a test may damage."""
    shutil.copytree(split.folder.parent, tmp_path / "served" / "m")
    return Manifest(tmp_path / "served" / "m").split("train")


def opened(server, cache: Path, name: str = "m") -> Split:
    return Manifest(f"{server.url}/{name}", cache=cache).split("train")


def config(**changes) -> DataConfig:
    options = {"image_size": 40, "threads": 2, "shuffle": "window", "shuffle_window": 12, "shuffle_block": BLOCK}
    return DataConfig(**{**options, "cache_size": 1.0, **changes})


def loader(split: Split, options: DataConfig, **changes) -> TrainLoader:
    given = {"views": ("weak",), "batch_size": 4, "accumulation": 1, "seed": 5, "world_size": 1, "rank": 0}
    return TrainLoader(split, options, **{**given, **GREY, **changes})


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.index, b.index) and all(torch.equal(a.views[name], b.views[name]) for name in b.views)


def shard_requests(server) -> list[tuple[str, int]]:
    return [(path, start) for method, path, start in server.requests if path.endswith(".tar") and method == "GET"]


@pytest.mark.parametrize("shuffle, cache_size", [("window", 1.0), ("window", 0.0), ("global", 1.0)])
def test_batches_from_a_server_and_from_the_disk_are_equal(shuffle, cache_size, packed, tmp_path):
    options = config(shuffle=shuffle, cache_size=cache_size)
    with serve(served(packed)) as server:
        split = opened(server, tmp_path)
        ours, theirs = loader(split, options), loader(packed, options)
        for epoch in range(2):
            assert_same(flat(ours.epoch(epoch)), flat(theirs.epoch(epoch)))
        # Within a window, as a run that was cut off resumes.
        assert_same(flat(loader(split, options).epoch(1, 4)), flat(theirs.epoch(1))[4:])
        asked = len(shard_requests(server))
        pair = [EvalLoader(s, options, batch_size=8, world_size=2, rank=1, **GREY) for s in (split, packed)]
        assert_same(list(pair[0]), list(pair[1]))
        if cache_size:
            # Everything is here by now, and every piece was fetched once.
            assert len(shard_requests(server)) == asked
            assert len(set(shard_requests(server))) == asked <= -(-COUNT // BLOCK) + len(packed.shards.files)


def test_two_ranks_see_the_batches_of_one_and_share_a_cache(packed, tmp_path):
    with serve(served(packed)) as server:
        one = flat(loader(packed, config()).epoch(3))
        two = [flat(loader(opened(server, tmp_path), config(), world_size=2, rank=rank).epoch(3)) for rank in range(2)]
        for whole, first, second in zip(one, *two, strict=True):
            assert torch.equal(whole.index, torch.cat([first.index, second.index]))
            assert torch.equal(whole.views["weak"], torch.cat([first.views["weak"], second.views["weak"]]))
        # Both ranks opened the data set, and one fetched it.
        assert sum(path.endswith("codes.npy") and method == "GET" for method, path, _ in server.requests) == 1


def test_random_reads_of_more_than_the_cache_holds_are_refused(packed, tmp_path):
    with serve(served(packed)) as server:
        split = opened(server, tmp_path)
        with pytest.raises(UserError, match=r"every image would be a request of its own; give --data\.shuffle window"):
            loader(split, config(shuffle="global", cache_size=0.0))
        loader(split, config(shuffle="global", cache_size=split.shards.size / 1e9 + 1e-6))


def test_one_image_is_one_request_and_is_not_kept(packed, tmp_path):
    with serve(served(packed)) as server:
        split = opened(server, tmp_path)
        assert split.read(17) == packed.read(17) and len(shard_requests(server)) == 1
        assert not list((tmp_path / "pieces").glob("*/*")) if (tmp_path / "pieces").exists() else True
        assert "http://" in split.place(17) and "sample 17" in split.place(17)


def test_images_in_any_order_and_twice(packed, tmp_path):
    index = np.array([30, 2, 2, 17, 0, 37, 30])
    with serve(served(packed)) as server:
        shards = opened(server, tmp_path).shards
        for limit in (0, 10**9):
            shards.use_cache(BLOCK, limit)
            for _ in range(2):
                got = ShardReader(shards, 3).submit(index).result()
                assert [a.tobytes() for a in got] == [packed.read(i) for i in index.tolist()]


def test_bursts_of_errors_and_bodies_cut_off_change_nothing(packed, tmp_path, no_pauses):
    faults = {3: Fault(status=503), 4: Fault(status=503), 7: Fault(cut=50), 11: Fault(status=429), 15: Fault(cut=1)}
    with serve(served(packed), faults=lambda path, start, number: faults.get(number)) as server:
        ours = flat(loader(opened(server, tmp_path), config()).epoch(0))
        assert_same(ours, flat(loader(packed, config()).epoch(0)))
        assert len(server.requests) > 15


def test_wrong_bytes_are_asked_for_again(packed, tmp_path):
    """A bit that flips on the way; in the cache too."""
    flip = {0: Fault(flip=3000), 2: Fault(flip=5000)}
    seen = []

    def faults(path: str, start: int, number: int) -> Fault | None:
        if not path.endswith(".tar"):
            return None
        seen.append(path)
        return flip.get(len(seen) - 1)

    with serve(served(packed), faults=faults) as server:
        split = opened(server, tmp_path)
        assert_same(flat(loader(split, config(read_threads=1)).epoch(0)), flat(loader(packed, config()).epoch(0)))
        pieces = sorted(p for p in (tmp_path / "pieces").glob("*/*") if p.is_file())
        for piece in pieces[:3]:
            data = bytearray(piece.read_bytes())
            data[len(data) // 2] ^= 1
            piece.write_bytes(data)
        asked = len(shard_requests(server))
        assert_same(flat(loader(split, config()).epoch(1)), flat(loader(packed, config()).epoch(1)))
        assert 1 <= len(shard_requests(server)) - asked <= 3


def test_damage_in_the_store_names_the_image_and_may_be_replaced(packed, tmp_path, no_pauses):
    split = copied(packed, tmp_path)
    shard, offset, size = split.shards.table[20].tolist()
    with open(split.shards.path(shard), "r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"\x00\x01\x02")
    with serve(served(split)) as server:
        remote = opened(server, tmp_path / "cache")
        says = rf"at offset {offset} of shard http://\S+ \(sample 20 of .*has other bytes than when it was packed"
        with pytest.raises(UserError, match=says):
            flat(loader(remote, config()).epoch(0))
        replaced = loader(remote, config(bad_images="replace"))
        flat(replaced.epoch(0))
        assert set(replaced.bad_images.reasons) == {20}
        with pytest.raises(UserError, match="its checksum has changed since it was packed"):
            command.check(Manifest(f"{server.url}/m", cache=tmp_path / "cache"))
    with serve(served(packed)) as server:
        assert "every checksum is right" in command.check(Manifest(f"{server.url}/m", cache=tmp_path / "cache"))


def test_a_store_that_is_gone_makes_no_image_bad(packed, tmp_path, no_pauses):
    with serve(served(packed)) as server:
        split = opened(server, tmp_path)
        split.shards.read(0)
    reader = loader(split, config(bad_images="replace"))
    with pytest.raises(StoreError, match="cannot be reached"):
        flat(reader.epoch(0))
    assert not reader.bad_images.reasons


def test_the_files_of_a_manifest_are_fetched_once_and_compared(packed, tmp_path):
    split = copied(packed, tmp_path)
    with serve(served(split)) as server:
        first = Manifest(f"{server.url}/m/", cache=tmp_path / "c")
        count = len(server.requests)
        again = Manifest(f"{server.url}/m", cache=tmp_path / "c")
        assert again.folder == first.folder and len(server.requests) - count <= 2
        assert again.where == f"{server.url}/m" and again.classes == first.classes
        assert np.array_equal(again.split("train").known.codes, split.known.codes)
        # Another data set at the same URL is another one.
        meta_path = split.folder.parent / "manifest.json"
        meta = json.loads(meta_path.read_text())
        meta_path.write_text(json.dumps(meta | {"name": "other"}))
        assert Manifest(f"{server.url}/m", cache=tmp_path / "c").folder != first.folder
        (split.folder / "known" / "codes.npy").write_bytes(bytes((split.folder / "known" / "codes.npy").stat().st_size))
        with pytest.raises(UserError, match=r"train/known/codes\.npy has other bytes than when it was written"):
            Manifest(f"{server.url}/m", cache=tmp_path / "d")


def _open_and_die(url: str, cache: Path, at: int) -> None:
    fetch, count = mirror._fetch, iter(range(100))

    def killed(*arguments: object) -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        fetch(*arguments)  # type: ignore[arg-type]

    mirror._fetch = killed
    Manifest(url, cache=cache)


def test_a_fetch_that_was_killed_resumes(packed, tmp_path):
    with serve(served(packed)) as server:
        process = multiprocessing.get_context("fork").Process(
            target=_open_and_die, args=(f"{server.url}/m", tmp_path, 4)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        before = {path for method, path, _ in server.requests if method == "GET" and path.endswith(".npy")}
        assert before and not list(tmp_path.rglob("manifest.json"))
        count = len(server.requests)
        opened(server, tmp_path)
        assert not before & {path for method, path, _ in server.requests[count:] if method == "GET"}


def _open(url: str, cache: Path) -> None:
    Manifest(url, cache=cache)


def test_processes_of_a_machine_fetch_together(packed, tmp_path):
    slow = lambda path, start, number: Fault(wait=0.05)  # noqa: E731
    with serve(served(packed), faults=slow) as server:
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=_open, args=(f"{server.url}/m", tmp_path)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        got = [path for method, path, _ in server.requests if method == "GET" and path.endswith(".npy")]
        assert len(got) == len(set(got))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"files": {"../../evil.npy": {"size": 1, "sha256": "0" * 64}}}, r"it lists the file '\.\./\.\./evil\.npy'"),
        ({"files": {"/etc/x": {"size": 1, "sha256": "0" * 64}}}, "it lists the file '/etc/x'"),
        ({"files": {"manifest.json": {"size": 1, "sha256": "0" * 64}}}, "it lists the file 'manifest.json'"),
        ({"files": {"a.npy": {"size": -1, "sha256": "0" * 64}}}, "it lists the file 'a.npy'"),
        ({"files": {"a.npy": {"size": 1, "sha256": "x"}}}, "'a.npy' has no checksum"),
        ({"files": None}, "has no checksums of its files"),
        ({"image_root": "../../other"}, "outside of it"),
    ],
)
def test_a_hostile_manifest_writes_nowhere_else(change, says, packed, tmp_path):
    split = copied(packed, tmp_path)
    path = split.folder.parent / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with serve(served(split)) as server, pytest.raises(UserError, match=says):
        Manifest(f"{server.url}/m", cache=tmp_path / "a" / "b" / "cache")
    assert not list(tmp_path.rglob("evil.npy"))


def test_hostile_shard_names_and_missing_checksums(packed, tmp_path):
    split = copied(packed, tmp_path)
    with serve(served(split)) as server:
        folder = Manifest(f"{server.url}/m", cache=tmp_path / "c").folder / "train"
        text = (folder / "shards.json").read_text()
        (folder / "shards.json").write_text(text.replace("train-00000.tar", "../../x"))
        with pytest.raises(UserError, match="has the invalid shard"):
            _ = Manifest(folder.parent, f"{server.url}/m/shards", tmp_path / "c").split("train").shards
        (folder / "shards.json").write_text(text)
        (folder / "shard_crc32.npy").unlink()
        with pytest.raises(UserError, match=r"shard_crc32\.npy is missing, since an older version packed the images"):
            _ = Manifest(folder.parent, f"{server.url}/m/shards", tmp_path / "c").split("train").shards


def test_single_files_and_missing_data_sets_are_refused(tmp_path):
    (tmp_path / "files").mkdir()
    split = make_files(tmp_path / "files")
    with serve(tmp_path / "files") as server:
        with pytest.raises(UserError, match=r"single files at http\S+, and each would be a request; pack them"):
            _ = Manifest(split.folder.parent, server.url).split("train").shards
        with pytest.raises(UserError, match=r"/none is not a Manifest that can be read: http\S+ does not exist"):
            Manifest(f"{server.url}/none", cache=tmp_path / "c")


def test_data_sets_that_nobody_opens_are_removed_after_a_month(packed, tmp_path):
    old = tmp_path / "manifests" / "abc"
    read = tmp_path / "manifests" / "def"
    for folder in (old, read):
        folder.mkdir(parents=True)
        month = time.time() - 31 * 24 * 3600
        os.utime(folder, (month, month))
    with serve(served(packed)) as server:
        opened(server, tmp_path)
    assert not old.exists() and not read.exists()


class _Halting:
    """A store that gives the first parts of an object, and then takes its time."""

    def __init__(self, parts: int) -> None:
        self.go_on, self._stop = threading.Event(), parts * mirror._RANGE

    def read_range(self, url: str, start: int, length: int) -> bytes:
        if start >= self._stop:
            self.go_on.wait(30)
        return bytes([start // mirror._RANGE]) * min(length, 3)


def test_a_large_file_comes_in_order_and_an_interrupt_does_not_wait():
    size = 40 * mirror._RANGE + 2
    assert b"".join(mirror._ranges(_Halting(100), "", size)) == bytes(n for n in range(41) for _ in range(3))[:-1]
    store = _Halting(2)
    parts = mirror._ranges(store, "", size)
    assert [next(parts), next(parts)] == [bytes(3), b"\x01" * 3]
    began = time.monotonic()
    # As an exception in whoever reads does.
    parts.close()
    assert time.monotonic() - began < 10
    store.go_on.set()


def test_a_data_set_that_somebody_opens_or_removes_is_left_alone(packed, tmp_path, monkeypatch):
    held, gone = tmp_path / "manifests" / "abc", tmp_path / "manifests" / "def"
    month = time.time() - 31 * 24 * 3600
    for folder in (held, gone):
        folder.mkdir(parents=True)
        os.utime(folder, (month, month))
    guarded = mirror.guarded

    def removed(path, wait=True):
        if path.name == "def.lock":
            # Another process was faster.
            gone.rmdir()
        return guarded(path, wait)

    monkeypatch.setattr(mirror, "guarded", removed)
    with serve(served(packed)) as server, guarded(tmp_path / "manifests" / "abc.lock"):
        opened(server, tmp_path)
    assert held.exists() and not gone.exists()


def test_checksums_of_a_packed_manifest(packed):
    meta = json.loads((packed.folder.parent / "manifest.json").read_text())
    for name, entry in meta["files"].items():
        data = (packed.folder.parent / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {"classes.txt", "train/shard_index.npy", "train/shard_crc32.npy"} <= meta["files"].keys()
    assert not any(name.endswith(".tar") for name in meta["files"])

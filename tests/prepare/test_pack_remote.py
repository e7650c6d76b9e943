"""Packing to S3: shards one by one, the Manifest last, resumed, and nothing replaced."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from spml_fast.core.errors import UserError
from spml_fast.core.urls import location
from spml_fast.data.manifest import Manifest, Split
from spml_fast.data.remote.store import Store
from spml_fast.prepare.pack import PackOptions, command, pack
from tests.support.prepare import run_prepare
from tests.support.remote import S3, need_s3
from tests.support.remote import no_pauses as no_pauses
from tests.support.remote import s3 as s3
from tests.support.shards import COUNT, checksums, make_files, pack_quietly

need_s3()
import s3fs  # noqa: E402 (after the skip)

OUT = "s3://bucket/set"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Split:
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "spml_fast"


def pack_remotely(files: Split, out: str = OUT, **changes) -> Manifest:
    options = {"shard_size": 60_000, "workers": 1, "progress": False, **changes}
    return pack(PackOptions(files.folder.parent, location(out), **options))


def test_what_is_written_is_what_would_lie_on_the_disk(files, s3: S3, tmp_path, cache):
    local = pack_quietly(files.folder.parent, tmp_path / "local")
    made = pack_remotely(files)
    assert made.where == OUT and checksums(made) == checksums(local)
    names = {p.relative_to(tmp_path / "local").as_posix() for p in (tmp_path / "local").rglob("*") if p.is_file()}
    assert set(s3.objects("set")) == {name for name in names if not name.startswith(".")}
    puts = [path for method, path in s3.requests if method == "PUT"]
    assert puts[0].endswith("/packing.json") and puts[-1].endswith("/set/manifest.json")
    split = made.split("train")
    assert all(split.read(i) == files.read(i) for i in range(COUNT))
    assert "every checksum is right" in command.check(made)
    assert not list((cache / "packing").glob("*/*")), "the unfinished work is gone"


def test_the_command_line(files, s3: S3, tmp_path, capsys):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine").write_text("")
    run_prepare("shard", "--manifest", files.folder.parent, "--out", OUT, "--work", tmp_path / "w", "--workers", 2)
    assert f"Manifest: {OUT}" in capsys.readouterr().out
    assert list((tmp_path / "w").iterdir()) == [tmp_path / "w" / "mine"], "what else lies there stays"
    run_prepare("shard", "--check", OUT)
    assert "every checksum is right" in capsys.readouterr().out
    # From there to the disk again, and relabelled data sets keep reading there.
    run_prepare("shard", "--manifest", OUT, "--out", tmp_path / "back")
    assert checksums(Manifest(tmp_path / "back")) == checksums(Manifest(OUT))


def test_nothing_is_replaced(files, s3: S3, tmp_path):
    pack_remotely(files)
    before = s3.objects("set")
    with pytest.raises(UserError, match=r"s3://bucket/set already holds a Manifest, which is not replaced"):
        pack_remotely(files)
    with pytest.raises(UserError, match="whoever reads it elsewhere cannot be seen"):
        pack_remotely(files, overwrite=True)
    store = Store(location("s3://bucket"))
    (tmp_path / "mine.txt").write_text("mine")
    store.upload(tmp_path / "mine.txt", location("s3://bucket/other/mine.txt"))
    with pytest.raises(UserError, match=r"s3://bucket/other is not empty \(mine\.txt\), and is no Manifest"):
        pack_remotely(files, "s3://bucket/other")
    assert s3.objects("set") == before and s3.objects("other") == ["mine.txt"]


def _pack_and_die(files: Split, after: int) -> None:
    upload, left = Store.upload, iter(range(100))

    def killed(self: Store, path: Path, url, new: bool = False) -> None:
        if next(left) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        upload(self, path, url, new)

    Store.upload = killed  # type: ignore[method-assign]
    pack_remotely(files)


@pytest.mark.parametrize("after", [0, 3, 7])
def test_a_killed_command_resumes(after, files, s3: S3, tmp_path):
    """Before the claim is written, between shards, and between the files of the Manifest."""
    process = multiprocessing.get_context("fork").Process(target=_pack_and_die, args=(files, after))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert "manifest.json" not in s3.objects("set")
    with pytest.raises(UserError, match="is not a Manifest that can be read"):
        Manifest(OUT)
    s3.requests.clear()
    if after:
        with pytest.raises(UserError, match=r"holds unfinished work of .* \(folder .*\); repeat that command there"):
            pack_remotely(files, work=tmp_path / "elsewhere")
        s3.requests.clear()
    made = pack_remotely(files)
    assert all(made.split("train").read(i) == files.read(i) for i in range(COUNT))
    written = [path for method, path in s3.requests if method == "PUT" and path.endswith(".tar")]
    assert len(written) == len(made.split("train").shards.files) - max(0, min(after - 1, 4))


def _pack_and_die_at_the_end(files: Split) -> None:
    Store.remove = lambda self, url: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    pack_remotely(files)


def test_a_command_that_was_killed_behind_its_manifest_is_done(files, s3: S3, cache):
    process = multiprocessing.get_context("fork").Process(target=_pack_and_die_at_the_end, args=(files,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and {"manifest.json", "packing.json"} <= set(s3.objects("set"))
    s3.requests.clear()
    made = pack_remotely(files)
    assert made.where == OUT and not any(method == "PUT" for method, _ in s3.requests)
    assert "packing.json" not in s3.objects("set") and not list((cache / "packing").glob("*/*"))
    with pytest.raises(UserError, match="already holds a Manifest"):
        pack_remotely(files)


def test_an_upload_whose_answer_was_lost_is_not_somebody_elses(s3: S3, tmp_path, monkeypatch, no_pauses):
    path, url = tmp_path / "claim", location("s3://bucket/claim")
    path.write_text("mine")
    store = Store(location("s3://bucket"))
    upload, lost = store._call_upload, iter([True, False, True])

    def losing(*arguments) -> None:
        upload(*arguments)
        if next(lost):
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(store, "_call_upload", losing)
    store.upload(path, url, new=True)
    assert store.traffic.repeated == 1 and store.read(url, 100) == b"mine"
    # Of the same size, and there from the start.
    for text in ("mine", "othr"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"s3://bucket/claim exists, and is not replaced"):
            store.upload(path, url, new=True)


def test_slow_down_is_waited_for_on_both_ways(files, s3: S3, no_pauses):
    refused: dict[str, int] = {}

    def fault(method: str, path: str) -> tuple[int, str] | None:
        refused[path] = refused.get(path, 0) + 1
        return (503, "SlowDown") if path.endswith((".tar", ".npy")) and refused[path] % 3 == 1 else None

    s3.fault = fault
    made = pack_remotely(files)
    assert all(made.split("train").read(i) == files.read(i) for i in range(COUNT))


def test_what_is_wrong_is_one_sentence(files, s3: S3, monkeypatch, no_pauses):
    with pytest.raises(UserError, match=r"there is no bucket nobucket; check its name") as caught:
        Manifest("s3://nobucket/set")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"s3://bucket/none is not a Manifest that can be read: \S+ does not exist"):
        Manifest("s3://bucket/none")
    with pytest.raises(UserError, match="there is no bucket nobucket"):
        pack_remotely(files, "s3://nobucket/set")
    with pytest.raises(UserError, match="--out https://host/set cannot be written: web servers are only read"):
        pack_remotely(files, "https://host/set")
    with pytest.raises(UserError, match=r"s3://No Name!/set/manifest\.json is no name that the store takes"):
        Manifest("s3://No Name!/set")
    s3.fault = lambda method, path: (403, "AccessDenied")
    with pytest.raises(UserError, match=r"access to s3://bucket/set/manifest\.json is refused \(.*\), or it does not"):
        Manifest(OUT)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3.fault = lambda method, path: None
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"there are no credentials for s3://bucket/set.*set AWS_PROFILE"):
        Manifest(OUT)


def test_multipart(s3: S3, tmp_path):
    """Objects of more than 100 MB go in parts."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(110_000_000)
    store = Store(location("s3://bucket"))
    store.upload(path, location("s3://bucket/large.bin"))
    assert store.size(location("s3://bucket/large.bin")) == 110_000_000
    assert sum(method == "POST" for method, _ in s3.requests) == 2, "begun and completed"


def test_a_manifest_on_the_disk_may_have_its_shards_there(files, s3: S3, tmp_path):
    """As `data.image_root`, and as a relabelled data set has it."""
    pack_remotely(files)
    local = pack_quietly(files.folder.parent, tmp_path / "local")
    split = Manifest(local.folder, "s3://bucket/set/shards").split("train")
    assert split.read(7) == files.read(7)
    path = local.folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_root": "s3://bucket/set/shards"}))
    assert Manifest(local.folder).split("train").read(8) == files.read(8)

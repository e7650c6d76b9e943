"""A whole training from S3 gives, to the bit, what one from the disk gives; also one that was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from spml_fast.core.urls import location
from spml_fast.prepare.pack import PackOptions, pack
from tests.stress.kills import BASE, compare
from tests.support.remote import S3, need_s3
from tests.support.remote import s3 as s3
from tests.support.runs import Run
from tests.support.shards import pack_quietly
from tests.training.test_training import succeed

pytestmark = pytest.mark.slow
need_s3()

# Three windows an epoch, of four updates each.
WINDOWS = {"data__shuffle": "window", "data__shuffle_window": 64, "data__shuffle_block": 8, "train__batch_size": 16}
# Kills its process in the second epoch, within a window.
KILL = """
import os, signal
from spml_fast.data.loader import TrainLoader

epoch = TrainLoader.epoch

def killed(self, number, start_update=0):
    for update, micro in enumerate(epoch(self, number, start_update), start_update):
        if number == 1 and update == 7 and not start_update:
            os.kill(os.getpid(), signal.SIGKILL)
        yield micro

TrainLoader.epoch = killed
"""


def words(data: object, run: Path, *more: object) -> list[str]:
    given = BASE | WINDOWS | {"data__dir": data, "run__dir": run}
    return [w for key, value in given.items() for w in (f"--{key.replace('__', '.')}", str(value))] + list(
        map(str, more)
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_from_s3_equals_one_from_the_disk(
    ranks: int, small_digits: Path, s3: S3, run_script: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = pack_quietly(small_digits, tmp_path / "local", shard_size=100_000)
    pack(PackOptions(small_digits, location("s3://bucket/digits"), shard_size=100_000, workers=1, progress=False))
    disk, remote, cut = (tmp_path / name for name in ("disk", "remote", "cut"))
    succeed(run_script("train.py", *words(local.folder, disk), ranks=ranks))
    succeed(run_script("train.py", *words("s3://bucket/digits", remote), ranks=ranks))
    assert compare(disk, remote, exact=True) == ""
    assert "dir: s3://bucket/digits" in (remote / "config.yaml").read_text()
    if ranks == 1:
        (tmp_path / "plugin.py").write_text(KILL)
        kill = ["--plugins", tmp_path / "plugin.py"]
        done = run_script("train.py", *words("s3://bucket/digits", cut, *kill), ranks=ranks)
        assert done.returncode == -9, done.stdout + done.stderr
        asked = len(s3.requests)
        assert "resuming at epoch" in succeed(run_script("train.py", *words("s3://bucket/digits", cut), ranks=ranks))
        assert compare(disk, cut, exact=True) == ""
        assert not any(path.endswith(".tar") for _, path in s3.requests[asked:]), "everything is in the cache by now"
        succeed(run_script("evaluate.py", "--run", remote))

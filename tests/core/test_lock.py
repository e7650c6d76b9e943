"""Who uses a folder: living processes count, dead ones never do."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from spml_fast.core import lock
from spml_fast.core.errors import UserError
from spml_fast.core.lock import Owner

HOLD = """
import sys, time
from pathlib import Path
from spml_fast.core import lock

lock.acquire(Path(sys.argv[1]), "run directory x")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def file(tmp_path):
    yield tmp_path / ".lock"
    lock.release_all()


@pytest.fixture
def other(file):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(asdict(owner)))


def test_one_process_alone(file, other):
    with pytest.raises(UserError, match=f"run directory x is in use by process {other.pid} on "):
        lock.acquire(file, "run directory x")
    assert Owner.read(file).pid == other.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_hinders_nobody(file, other, number):
    other.send_signal(number)
    # Not waited for: a process whose parent has not asked for its status is gone as well.
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    lock.acquire(file, "x")
    assert Owner.read(file) == Owner.current()


def test_it_is_given_up(file):
    lock.acquire(file, "x")
    lock.acquire(file, "x")
    lock.release_all()
    assert not file.exists()


def test_of_many_at_once_one_gets_it(file):
    words = [sys.executable, "-c", HOLD, str(file)]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(6)]
    try:
        write(file, replace(Owner.current(), pid=2**22 + 1))
        said = []
        for process in started:
            assert process.stdout is not None
            said.append(process.stdout.readline())
        assert said.count("held\n") == 1
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize("change", [{"start": "1"}, {"pid": 2**22 + 1}])
def test_a_process_id_that_was_given_again_is_another(file, change):
    write(file, replace(Owner.current(), **change))
    lock.acquire(file, "x")
    assert Owner.read(file) == Owner.current()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}'])
def test_half_a_file_counts_for_nothing(file, text):
    file.write_text(text)
    lock.acquire(file, "x")
    assert Owner.read(file) == Owner.current()


FAR = {"host": "node7", "boot": "another", "start": "5", "pid": 77}


@pytest.mark.parametrize("change", [FAR, {"namespace": "pid:[1]", "pid": 77}, {"boot": "another"}])
def test_another_machine_boot_or_container_is_gone_when_it_was_silent(file, change, monkeypatch):
    write(file, replace(Owner.current(), **change))
    old = time.time() - lock.STALE - 5
    os.utime(file, (old, old))
    lock.acquire(file, "x")
    assert Owner.read(file) == Owner.current()


def test_another_machine_that_says_it_is_there_is_believed(file, capsys, monkeypatch):
    write(file, replace(Owner.current(), **FAR))
    sleep = time.sleep

    def touched(seconds):
        sleep(0.01)
        os.utime(file)

    monkeypatch.setattr(lock.time, "sleep", touched)
    with pytest.raises(UserError, match="run directory x is in use by process 77 on node7"):
        lock.acquire(file, "run directory x")
    assert "waiting up to 120 seconds" in capsys.readouterr().err


def test_another_machine_that_goes_silent_is_waited_for(file, monkeypatch):
    write(file, replace(Owner.current(), **FAR))
    monkeypatch.setattr(lock, "STALE", 0.05)
    lock.acquire(file, "x")
    assert Owner.read(file) == Owner.current()


def test_readers(tmp_path):
    folder = tmp_path / "m" / ".readers"
    folder.parent.mkdir()
    assert lock.readers(folder) == []
    lock.register_reader(folder)
    (mine,) = folder.iterdir()
    assert Owner.read(mine) == Owner.current() and lock.readers(folder) == [], "a process does not hinder itself"
    child = subprocess.Popen(["sleep", "600"])
    start = lock._process_start(child.pid)
    there = replace(Owner.current(), pid=child.pid, start=start)
    write(folder / "there.json", there)
    write(folder / "gone.json", replace(there, start="1"))
    try:
        assert lock.readers(folder) == [there]
        assert not (folder / "gone.json").exists()
    finally:
        child.kill()
        child.wait()
    assert lock.readers(folder) == []
    assert lock.register_reader(folder) is None, "it is there already"
    lock.release(mine)
    assert list(folder.iterdir()) == [] and lock.register_reader(folder) == mine
    lock.release_all()
    assert list(folder.iterdir()) == []
    lock.register_reader(tmp_path / "nowhere" / ".readers")


def test_one_at_a_time_and_who_does_not_wait(tmp_path):
    path = tmp_path / "lock"
    with lock.guarded(path) as held:
        assert held.alone
        # A description of the file of its own: another thread of this process is kept out as well.
        with pytest.raises(BlockingIOError), lock.guarded(path, wait=False):
            pass
    with lock.guarded(path, wait=False):
        pass


def test_a_disk_without_locks_says_so(tmp_path, monkeypatch):
    def without(descriptor, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", without)
    with lock.guarded(tmp_path / "lock") as held, lock.guarded(tmp_path / "lock", wait=False) as other:
        assert not held.alone and not other.alone

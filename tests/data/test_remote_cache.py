"""The cache of pieces: its limit, what is removed first, several processes, a full disk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from spml_fast.core.errors import UserError
from spml_fast.data.remote.cache import PieceCache


def key(number: int) -> str:
    return f"{number:02d}{'ab' * 19}-0-100"


def make(folder: Path, limit: int, said: list[str] | None = None) -> PieceCache:
    return PieceCache(folder, limit, ([] if said is None else said).append)


def age(folder: Path, seconds: float, *numbers: int) -> None:
    """Make pieces look as if they had been used that long ago."""
    then = time.time() - seconds
    for number in numbers:
        os.utime(folder / "pieces" / key(number)[:2] / key(number), (then, then))


def there(cache: PieceCache, count: int) -> list[int]:
    return [n for n in range(count) if cache.read(key(n), [(0, 100)])]


def taken(folder: Path) -> int:
    return sum(p.stat().st_size for p in (folder / "pieces").rglob("*") if "-0-" in p.name)


def test_parts_of_a_piece_are_what_was_kept(tmp_path):
    cache = make(tmp_path, 1000)
    data = bytes(range(100))
    assert cache.read(key(1), [(0, 4)]) is None
    assert cache.keep(key(1), data) and cache.keep(key(1), data)
    assert cache.read(key(1), [(0, 4), (90, 10)]) == [data[:4], data[90:]]
    cache.drop(key(1))
    assert cache.read(key(1), [(0, 4)]) is None


def test_a_piece_that_was_cut_off_is_kept_anew(tmp_path):
    """As a power cut leaves it. It is no piece to keep, or it would be fetched in every epoch."""
    cache = make(tmp_path, 1000)
    data = bytes(range(100))
    cache.keep(key(1), data)
    (tmp_path / "pieces" / key(1)[:2] / key(1)).write_bytes(data[:95])
    assert cache.read(key(1), [(90, 10)]) is None
    assert cache.keep(key(1), data) and cache.read(key(1), [(90, 10)]) == [data[90:]]


def test_a_piece_of_another_user_is_read(tmp_path, monkeypatch):
    cache = make(tmp_path, 1000)
    cache.keep(key(1), bytes(100))

    def refused(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    assert cache.read(key(1), [(0, 100)]) == [bytes(100)]


def test_a_piece_counts_whole_while_it_is_written(tmp_path, monkeypatch):
    cache, sizes, opened = make(tmp_path, 1000), [], Path.open

    def watched(path, *arguments, **options):
        file = opened(path, *arguments, **options)
        if path.name.endswith(".partial"):
            sizes.append(path.stat().st_size)
        return file

    monkeypatch.setattr(Path, "open", watched)
    cache.keep(key(1), bytes(100))
    # Once to reserve its place, and once to fill it.
    assert sizes == [0, 100]


def test_the_oldest_of_earlier_runs_go_first(tmp_path):
    earlier = make(tmp_path, 1000)
    for number in range(10):
        assert earlier.keep(key(number), bytes(100))
    age(tmp_path, 50, *range(10))
    age(tmp_path, 100, 3, 7)
    cache = make(tmp_path, 1000)
    assert cache.keep(key(20), bytes(100))
    assert taken(tmp_path) <= 1000 and not {3, 7} & set(there(cache, 10)) and cache.read(key(20), [(0, 1)])
    assert len(there(cache, 10)) == 8


def test_what_this_run_has_used_stays_and_the_rest_is_not_kept(tmp_path):
    """An epoch wants every piece once: the one used longest ago is the next that it wants."""
    cache = make(tmp_path, 1000)
    cache._since = time.time() - 10
    kept = [cache.keep(key(number), bytes(100)) for number in range(15)]
    assert kept == [True] * 10 + [False] * 5 and there(cache, 15) == list(range(10))
    assert not cache.has_room
    # Later ones of the epoch find the folder looked through already.
    assert taken(tmp_path) == 1000


def test_a_smaller_limit_is_held_from_the_next_piece_on(tmp_path):
    cache = make(tmp_path, 1000)
    for number in range(10):
        cache.keep(key(number), bytes(100))
    age(tmp_path, 60, *range(10))
    assert make(tmp_path, 400).keep(key(11), bytes(100))
    assert taken(tmp_path) <= 400


def _fill(folder: Path, first: int) -> None:
    cache = make(folder, 3000)
    for number in range(first, first + 40):
        cache.keep(key(number % 60), bytes([number % 60]) * 100)
        found = cache.read(key(number % 60), [(0, 100)])
        assert found is None or found == [bytes([number % 60]) * 100]


def test_several_processes_hold_the_limit_together(tmp_path):
    # Fresh processes: a fork of a process with threads of other libraries may wait for one that it does not have.
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, first)) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert 2000 <= taken(tmp_path) <= 3000 and not list(tmp_path.rglob("*.partial"))


def _die_in_the_middle(folder: Path) -> None:
    cache, opened = make(folder, 1000), Path.open

    def killed(path, mode="r", *arguments, **options):
        if mode == "r+b":
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(path, mode, *arguments, **options)

    Path.open = killed  # type: ignore[method-assign]
    with open(folder / "pieces" / "note", "w"):
        cache.keep(key(1), bytes(100))


def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    worker = multiprocessing.get_context("spawn").Process(target=_die_in_the_middle, args=(tmp_path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    cache = make(tmp_path, 1000)
    # What it began has its place until an hour has gone, and is removed when room is wanted then.
    (left,) = tmp_path.rglob("*.partial")
    assert left.stat().st_size == 100
    os.utime(left, (time.time() - 7200, time.time() - 7200))
    cache._since = time.time() - 10
    assert all(cache.keep(key(number), bytes(100)) for number in range(10)) and not left.exists()


def test_a_full_disk_is_told_once_and_nothing_is_lost(tmp_path):
    said: list[str] = []
    cache = make(tmp_path, 10_000, said)
    assert cache.keep(key(1), bytes(100))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        assert not cache.keep(key(2), bytes(5000)) and not cache.keep(key(3), bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and "cannot be written (File too large): what does not fit is read from" in said[0]
    assert not cache.has_room and there(cache, 5) == [1] and not list(tmp_path.rglob("*.partial"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file cannot be used \(Not a directory\)"):
        make(tmp_path / "file", 1000)

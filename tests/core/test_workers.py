"""Worker processes that end with the process that started them, and threads whose errors arrive."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest

from spml_fast.core import workers


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait until something is so; fail if it is not in half a minute."""
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_end_with_a_killed_parent(tmp_path):
    path = tmp_path / "lock"

    def parent():
        with path.open("w") as file, workers.worker_pool(2) as pool:
            fcntl.flock(file, fcntl.LOCK_EX)
            pool.submit(os.getpid).result()
            (tmp_path / "ready").touch()
            signal.pause()

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    wait_for((tmp_path / "ready").exists)
    with path.open("w") as file:

        def is_free() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        assert not is_free()
        process.kill()
        process.join()
        # Workers have inherited the lock, and would hold it.
        wait_for(is_free)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_whatever_a_job_raises_arrives(kind):
    threads = workers.DaemonThreads(1, "test")

    def fail() -> None:
        raise kind("what it says")

    with pytest.raises(kind, match="what it says"):
        threads.submit(fail).result(30)
    # The thread goes on.
    assert threads.submit(lambda: None).result(30) is None

"""Ranks end when their launchers do, and only then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spml_fast.training.watch import launcher_name
from tests.support.paths import ROOT
from tests.support.runs import command, environment
from tests.training.test_training import options

RANK = """
import os, sys, time
from pathlib import Path
from spml_fast.training.watch import watch_launchers

above = watch_launchers()
Path(sys.argv[-1], os.environ.get("RANK", "0")).write_text(" ".join(map(str, [os.getpid(), *above])))
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("/opt/venv/bin/python3.11 /opt/venv/bin/torchrun --nproc_per_node 2 train.py", "torchrun"),
        ("python -u -m torch.distributed.run train.py", "torch.distributed.run"),
        ("/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=x train.py", "deepspeed.launcher.launch"),
        ("/usr/bin/python /home/a/.local/bin/deepspeed train.py", "deepspeed"),
        ("bash -c deepspeed train.py", None),
        ("timeout 60 torchrun train.py", None),
        ("python deepspeed_train.py torchrun", None),
        ("python -m spml_fast train", None),
        ("slurmstepd: [123.0]", None),
        ("", None),
    ],
)
def test_what_is_a_launcher(line: str, name: str | None) -> None:
    assert launcher_name(line.split(" ")) == name


def running(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def start(words: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(words, env=environment(), cwd=ROOT, **{**quiet, **kwargs})  # type: ignore[call-overload,no-any-return]


def end_all(pids: list[int]) -> None:
    for pid in pids:
        if running(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("launcher", "victim", "number"),
    [
        ("deepspeed", "deepspeed", signal.SIGKILL),
        ("deepspeed", "launch.py", signal.SIGKILL),
        ("torchrun", "torchrun", signal.SIGTERM),
        ("torchrun", "torchrun", signal.SIGKILL),
    ],
)
def test_ranks_end_with_each_launcher(launcher: str, victim: str, number: int, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    folder = tmp_path / "ranks"
    folder.mkdir()
    process = start([*command("train.py", 2, launcher)[:-1], str(script), str(folder)])
    ranks: list[list[int]] = []

    def started() -> bool:
        ranks[:] = [[int(word) for word in path.read_text().split()] for path in folder.iterdir()]
        return len(ranks) == 2 and all(ranks)

    try:
        wait_until(started, "the ranks did not start")
        above = [process.pid] if launcher == "torchrun" else [ranks[0][1], process.pid]
        assert all(rank[1:] == above for rank in ranks), "the launchers are known"
        os.kill(above[0] if victim == "launch.py" else process.pid, number)
        process.wait(60)
        wait_until(lambda: not any(running(rank[0]) for rank in ranks), "ranks go on without their launcher", 30)
    finally:
        end_all([process.pid, *(pid for rank in ranks for pid in rank)])


def test_a_training_ends_with_deepspeed(small_digits: Path, tmp_path: Path) -> None:
    """As a user ends it: `kill PID` of the command that was started, in the middle of an epoch."""
    run = tmp_path / "run"
    words = command("train.py", 2, "deepspeed") + options(small_digits, run, train__epochs=5000)
    process = start(words)
    metrics, error = run / "metrics.jsonl", "the training did not start"
    ranks: list[int] = []
    try:
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, error)
        below = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True, check=False).stdout
        ranks = [int(pid) for pid in below.split() if int(pid) != process.pid]
        assert len(ranks) >= 3, "launch.py and two ranks"
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)
        wait_until(lambda: not any(map(running, ranks)), "ranks go on without their launcher", 30)
    finally:
        end_all([process.pid, *ranks])


def test_a_closed_shell_does_not_end_a_run(tmp_path: Path) -> None:
    """The shell that started it is no launcher: it may end, and hang up."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    # The tests themselves may run under nohup.
    hang_up = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    shell = start(["bash", "-c", f"nohup {sys.executable} {script} {tmp_path} & wait"], **hang_up)
    pid = 0
    try:
        wait_until(lambda: (tmp_path / "0").exists() and bool((tmp_path / "0").read_text()), "it did not start")
        (pid,) = map(int, (tmp_path / "0").read_text().split())
        os.killpg(shell.pid, signal.SIGHUP)
        shell.wait(30)
        time.sleep(1)
        assert running(pid)
    finally:
        end_all([shell.pid, *([pid] if pid else [])])

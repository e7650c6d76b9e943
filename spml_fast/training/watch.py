"""Ranks end with their launchers.

A launcher that is killed (`kill PID` of `deepspeed`, SIGKILL of `torchrun`) leaves its children running, and they would
train on, or wait for each other, without anybody's knowing. So every rank watches the launchers above it: its parent
and, under `deepspeed`, the parent of that one. Shells, `nohup`, `srun` and the like are not watched: a run outlives the
terminal that started it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from spml_fast.core import env

# Seconds that a rank has to end by itself, saving what it wants to save, before it is ended.
GRACE = 8.0
PROGRAMS = {"deepspeed", "torchrun"}
MODULES = {
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
}
_watched: list[int] = []
# Set when a launcher has ended: the SIGTERM that follows is no second request to end.
launcher_ended = threading.Event()
_grace = [GRACE]


def give_seconds(seconds: float | None = None) -> None:
    """How long a rank has from now on to end by itself once a launcher has ended; None for `GRACE`."""
    _grace[0] = GRACE if seconds is None else seconds


def launcher_name(words: list[str]) -> str | None:
    """Name of the launcher that a command line starts, or None if it starts something else.

    Args:
        words: the command line, as in /proc/PID/cmdline.
    """
    rest = iter(words)
    program = os.path.basename(next(rest, ""))
    if program.startswith("python"):
        for word in rest:
            if word == "-m":
                module = next(rest, "")
                return module if module in MODULES else None
            if not word.startswith("-"):
                program = os.path.basename(word)
                break
    return program if program in PROGRAMS else None


def _parent(pid: int) -> int:
    """Parent of a process; 0 when it is gone."""
    try:
        # The name in brackets may contain anything; the state and the parent follow it.
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except (OSError, ValueError, IndexError):
        return 0


def _launcher_above(pid: int) -> tuple[int, int, str] | None:
    """(process id, open pidfd, name) of a process's parent where that is a launcher."""
    parent = _parent(pid)
    if parent <= 1:
        return None
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        name = launcher_name(words)
        if name is None:
            return None
        handle = os.pidfd_open(parent)
    except OSError:
        return None
    if _parent(pid) != parent:
        # It ended meanwhile, and the number may be another process's.
        os.close(handle)
        return None
    return parent, handle, name


def watch_launchers() -> list[int]:
    """Start to watch the launchers above this process, once; returns their process ids.

    When one of them ends, this process gets SIGTERM as if the launcher had passed it on, and if it is still there after
    `GRACE` seconds, or those of `give_seconds`, it ends, with status 143.
    """
    if _watched:
        return _watched
    found: dict[int, tuple[int, str]] = {}
    pid = os.getpid()
    for _ in range(2):
        launcher = _launcher_above(pid)
        if launcher is None:
            break
        pid, handle, name = launcher
        found[handle] = (pid, name)
    if found:
        _watched.extend(number for number, _ in found.values())
        threading.Thread(target=_wait, args=(found,), name="launcher watch", daemon=True).start()
    return _watched


def _wait(launchers: dict[int, tuple[int, str]]) -> None:
    """Wait for the end of any launcher, then end this process."""
    poll = select.poll()
    for handle in launchers:
        poll.register(handle, select.POLLIN)
    (handle, _), *_ = poll.poll()
    pid, name = launchers[handle]
    with contextlib.suppress(OSError, ValueError):
        # Standard error may have gone with the launcher.
        if env.rank_name() == "0":
            print(
                f"error: the launcher ({name}, process {pid}) has ended, so the ranks end too",
                file=sys.stderr,
                flush=True,
            )
    launcher_ended.set()
    grace = _grace[0]
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(128 + signal.SIGTERM)

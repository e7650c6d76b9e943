"""Forks of this process, some at a time, each with a limit of time and a pipe for what it has to say."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Events = list[dict[str, Any]]


@dataclass
class Fork:
    """Work for one fork.

    Attributes:
        work: called in the fork with the pipe's file descriptor and a folder for temporary files.
        limit: seconds after which it is killed.
        done: called in this process with the events, and whether it was killed.
        folder: where the temporary folder and the log are made.
    """

    work: Callable[[int, Path], None]
    limit: float
    done: Callable[[Events, bool], None]
    folder: Path
    pid: int = 0
    pipe: int = -1
    heard: bytearray = field(default_factory=bytearray)
    end: float = 0.0
    scratch: Path = Path()

    def start(self) -> None:
        """Fork."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="fork-", dir=self.folder))
        self.pipe, report = os.pipe()
        self.end = time.monotonic() + self.limit
        self.pid = os.fork()
        if self.pid == 0:
            self._inside(report)
        os.close(report)

    def _inside(self, report: int) -> None:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # A session of its own, so that nothing it starts outlives it and schedulers count it as a job.
            os.setsid()
            log = os.open(self.scratch / "log", os.O_WRONLY | os.O_CREAT)
            for standard in (1, 2):
                os.dup2(log, standard)
            self.work(report, self.scratch / "tests")
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os.write(report, (json.dumps({"error": traceback.format_exc(limit=-1)}) + "\n").encode())
        finally:
            os._exit(0)

    def finish(self, late: bool) -> None:
        """Collect what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        events = [json.loads(line) for line in self.heard.decode().splitlines()]
        self.done(events, late)
        shutil.rmtree(self.scratch, ignore_errors=True)


def run_all(forks: Iterable[Fork], jobs: int) -> None:
    """Run forks, `jobs` at a time; `forks` may be a generator that is asked for the next one when there is room."""
    waiting, running = iter(forks), dict[int, Fork]()
    more = True
    try:
        while more or running:
            while more and len(running) < jobs:
                fork = next(waiting, None)
                if fork is None:
                    more = False
                    break
                fork.start()
                running[fork.pipe] = fork
            if not running:
                continue
            wait = max(0.0, min(f.end for f in running.values()) - time.monotonic())
            ready, _, _ = select.select(list(running), [], [], wait)
            for pipe in ready:
                part = os.read(pipe, 1 << 16)
                running[pipe].heard += part
                if not part:
                    running.pop(pipe).finish(late=False)
            for fork in [f for f in running.values() if time.monotonic() >= f.end]:
                running.pop(fork.pipe).finish(late=True)
    finally:
        for fork in running.values():
            os.killpg(fork.pid, signal.SIGKILL)

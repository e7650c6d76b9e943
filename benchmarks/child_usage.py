"""What a command takes: wall clock, processor time and peak memory of a process that does nothing else.

    python benchmarks/child_usage.py OUT.json COMMAND ...     runs the command and writes the three into the file

The command is started by a small process of its own, since a child's peak counts from its parent's.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        seconds: wall clock.
        cpu_seconds: user and system time, of its own children too.
        peak_bytes: largest resident memory of one of its processes.
        output: what it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def usage_of(command: Sequence[str | os.PathLike[str]]) -> Usage:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with the last lines of what it printed.
    """
    words = [os.fspath(word) for word in command]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        small = [sys.executable, __file__, file.name, *words]
        done = subprocess.run(small, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"{shlex.join(words)} failed:\n{done.stdout[-2000:]}")
        return Usage(**json.loads(Path(file.name).read_text(encoding="utf-8")), output=done.stdout)


def main() -> int:
    """Run the command of the command line; its exit status is this one's."""
    out, *command = sys.argv[1:]
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, used = os.wait4(child.pid, 0)
    taken = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
    }
    Path(out).write_text(json.dumps(taken), encoding="utf-8")
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    raise SystemExit(main())

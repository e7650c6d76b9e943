"""Runs scripts in forks of a process that has already imported the libraries.

Importing torch, timm, DALI and DeepSpeed takes a process nine seconds, and most runs of the tests two. A fork does what
a fresh process does: it imports this program's own code itself, has the environment, arguments and folder that it is
given, and ends as a process does. Tests of launchers, of kills and of the installed package start real processes, and
with SPML_TEST_COLD=1 all do.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from tests.support.paths import ROOT
from tests.support.runs import command, environment, rank_variables

LIBRARIES = [
    "numpy",
    "scipy.sparse",
    "PIL.Image",
    "matplotlib.figure",
    "rich.console",
    "jsonargparse",
    "yaml",
    "safetensors.torch",
    "triton",
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "timm",
    "nvidia.dali.fn",
    "nvidia.dali.types",
    "nvidia.dali.plugin.pytorch",
    "deepspeed",
]
# When one rank has failed the others get this many seconds to say why they fail too, as under the launchers.
GRACE = 5.0


class Kill(NamedTuple):
    """A signal on a run's way.

    Attributes:
        seconds: after the run's start.
        number: of the signal.
        rank: who gets it; all where there is none of that number.
    """

    seconds: float
    number: int
    rank: int = -1


class WarmProcess:
    """The process that forks; started by the first run."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start it, unless it runs already."""
        if self.process is None or self.process.poll() is not None:
            words = [sys.executable, "-m", "tests.support.warm"]
            path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(words, env={**environment, "PYTHONPATH": path}, cwd=ROOT, **pipes)
            atexit.register(self.process.kill)
        return self.process

    def run(
        self,
        words: Sequence[str],
        ranks: Sequence[dict[str, str]],
        timeout: float,
        environment: dict[str, str],
        kill: Kill | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script to its end, once for each rank at the same time.

        Args:
            words: the script's path and its arguments.
            ranks: what each rank's environment has beside `environment`.
            timeout: seconds after which the ranks are killed.
            environment: of the ranks, and of the process that forks when this call starts it.
            kill: a signal on the way.

        Returns:
            What the ranks wrote, mixed, and the first status that is not 0.

        Raises:
            subprocess.TimeoutExpired: the ranks were killed.
        """
        process = self.start(environment)
        assert process.stdin is not None and process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {"words": list(words), "timeout": timeout, "folder": folder, "kill": kill}
            request["ranks"] = [{**environment, **rank} for rank in ranks]
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            statuses = json.loads(process.stdout.readline())
            out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        if None in statuses:
            raise subprocess.TimeoutExpired(list(words), timeout, out, err)
        status = next((s for s in statuses if s), 0)
        return subprocess.CompletedProcess(list(words), status, out, err)


WARM = WarmProcess()


def run_script(
    script: str, *args: object, ranks: int = 1, launcher: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/ to its end, at most ten minutes.

    Real processes where a launcher or variables of the environment are named; else forks, which start quicker.

    Args:
        script: a file's name, as `train.py`.
        args: words of its command line.
        ranks: how many processes.
        launcher: python, torchrun or deepspeed.
        env: variables beside the usual ones.
    """
    words = [str(a) for a in args]
    if launcher is None and not env and not os.environ.get("SPML_TEST_COLD"):
        return WARM.run([str(ROOT / "launch" / script), *words], rank_variables(ranks), 600, environment())
    words = command(script, ranks, launcher or ("python" if ranks == 1 else "torchrun")) + words
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment(**env), cwd=ROOT)


def _fork(request: dict[str, Any], rank: dict[str, str]) -> int:
    """Returns the fork's process id, or 0 in the fork, which is ready to run the script."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for standard, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), standard)
    os.environ.clear()
    os.environ.update(rank)
    sys.argv = list(request["words"])
    sys.path[0] = str(Path(sys.argv[0]).parent)
    # Forks would all draw the same numbers where a program forgets to seed; processes do not.
    importlib.import_module("numpy").random.seed()
    return 0


def _run_path(path: str) -> None:
    """Run a script as a program, and end the process as it does when it is all that runs."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, (int, NoneType)):
            importlib.import_module("spml_fast.core.process").end_process(leaving.code or 0)
        raise
    finally:
        # Python frees everything now, and nanobind's libraries (triton since 3.9) complain of what stays frozen.
        gc.unfreeze()


def _wait(pids: list[int], timeout: float, kill: Kill | None) -> list[int | None]:
    """Exit statuses of forks; None for one that was killed because it ran too long."""
    statuses: dict[int, int | None] = {}
    start = time.monotonic()
    end = start + timeout
    while len(statuses) < len(pids):
        if kill is not None and time.monotonic() > start + kill.seconds:
            chosen = [pids[kill.rank]] if 0 <= kill.rank < len(pids) else pids
            for pid in [p for p in chosen if p not in statuses]:
                os.killpg(pid, kill.number)
            kill = None
        for pid in [p for p in pids if p not in statuses]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
                if statuses[pid]:
                    end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            failed = any(statuses.values())
            for pid in [p for p in pids if p not in statuses]:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = -signal.SIGKILL if failed else None
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def main() -> None:
    """Serve: a line of JSON in, forks, a line of JSON out."""
    for name in LIBRARIES:
        importlib.import_module(name)
    # This program's own code is imported by every fork, but compiled by the first, also where Python may write no files
    # beside the sources.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / ".pytest_cache" / "bytecode")
    gc.collect()
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in request["ranks"]:
            pid = _fork(request, rank)
            if pid == 0:
                _run_path(sys.argv[0])
                return
            pids.append(pid)
        kill = None if request["kill"] is None else Kill(*request["kill"])
        replies.write(json.dumps(_wait(pids, request["timeout"], kill)) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()

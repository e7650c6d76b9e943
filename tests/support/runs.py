"""Commands run as a user runs them, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def free_port() -> int:
    """A TCP port nobody uses now, on any address, and that the system gives to nobody who asks for just any port."""
    ports = list(range(20000, 32000))
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no TCP port between 20000 and 32000 is free")


def command(script: str, ranks: int, launcher: str) -> list[str]:
    """The words that start `script` with that many ranks."""
    path = str(ROOT / "launch" / script)
    binaries = Path(sys.executable).parent
    if launcher == "python":
        return [sys.executable, path]
    if launcher == "deepspeed":
        head = [str(binaries / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        return [*head, path]
    assert launcher == "torchrun"
    return [str(binaries / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port()), path]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, so that results do not depend on how many ranks share the machine; nothing of a launcher."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in launchers and not k.startswith("SLURM")}
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank of a run on one machine; nothing for one rank."""
    if ranks == 1:
        return [{}]
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    same |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**same, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


Run = Callable[..., subprocess.CompletedProcess[str]]


def read_metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a kind from a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

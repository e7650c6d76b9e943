"""Environment of the launchers: SLURM variables, ports, DeepSpeed's settings."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch


def set_environment() -> None:
    """Environment that DeepSpeed reads when it is imported; call before anything imports it.

    Its compiled extensions go to a folder of our own, so that a lock left by another program's killed build cannot
    hang this one; without a GPU its CPU accelerator is chosen by name.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    if not os.access(cache if cache.exists() else Path.home(), os.W_OK):
        cache = Path(tempfile.gettempdir())
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "spml_fast" / "torch_extensions"))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    read_slurm_environment()
    if "LOCAL_SIZE" in os.environ:
        # DeepSpeed's launcher has its own name for what torchrun calls LOCAL_WORLD_SIZE.
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])


def read_slurm_environment() -> None:
    """Fill in the variables of torch.distributed from SLURM's where `srun` started us and nothing else set them."""
    env = os.environ
    if "RANK" in env or "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return
    if env.get("SLURM_STEP_NUM_TASKS") == "1" and "MASTER_ADDR" not in env:
        return
    env["RANK"] = env["SLURM_PROCID"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    env["WORLD_SIZE"] = env["SLURM_STEP_NUM_TASKS"]
    env.setdefault(
        "LOCAL_WORLD_SIZE", env.get("SLURM_STEP_TASKS_PER_NODE", env["WORLD_SIZE"]).split("(")[0].split(",")[0]
    )
    env.setdefault("MASTER_ADDR", first_slurm_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    # One port per job, so that jobs sharing a machine do not meet.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def first_slurm_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: `rack[1-2]n[003-007,012]-ib,login1` -> `rack1n003-ib`."""
    head = re.match(r"(\[[^\]]*\]|[^,\[])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head[0] if head else nodelist)


def free_port() -> int:
    """A TCP port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

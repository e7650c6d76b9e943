"""Environment of the launchers: SLURM variables, ports, DeepSpeed's settings."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch

from spml_fast.core import env


def set_environment() -> None:
    """Environment that DeepSpeed reads when it is imported; call before anything imports it.

    Its compiled extensions go to a folder of our own, so that a lock left by another program's killed build cannot
    hang this one; without a GPU its CPU accelerator is chosen by name.
    """
    cache = env.cache_home()
    if not os.access(cache if cache.exists() else Path.home(), os.W_OK):
        cache = Path(tempfile.gettempdir())
    env.default_torch_extensions(cache / "spml_fast" / "torch_extensions")
    if not torch.cuda.is_available():
        env.default_accelerator("cpu")
    read_slurm_environment()
    local_size = env.local_size()
    if local_size is not None:
        # DeepSpeed's launcher has its own name for what torchrun calls LOCAL_WORLD_SIZE.
        env.default_local_world_size(local_size)


def read_slurm_environment() -> None:
    """Fill in the variables of torch.distributed from SLURM's where `srun` started us and nothing else set them."""
    step = None if env.has_rank() else env.slurm_step()
    if step is None:
        return
    if step.tasks == "1" and not env.has_master_address():
        return
    env.set_ranks(step.process, step.local_process, step.tasks)
    env.default_local_world_size(step.tasks_per_node.split("(")[0].split(",")[0])
    env.default_master_address(first_slurm_host(step.nodes))
    # One port per job, so that jobs sharing a machine do not meet; below the ports that a system hands out by itself.
    env.default_master_port(20000 + step.job % 12000)


def first_slurm_host(nodelist: str) -> str:
    """First host of SLURM's compressed list: `rack[1-2]n[003-007,012]-ib,login1` -> `rack1n003-ib`."""
    head = re.match(r"(\[[^\]]*\]|[^,\[])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head[0] if head else nodelist)

"""Environment variables: the only file of the package that reads or sets them, a function a variable.

docs/environment.md lists them for users. They are read when they are needed and never at import, so that a launcher or
a test may set them late.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def rank_name() -> str:
    """RANK: this process's number among all, as the launcher wrote it; "0" where none did."""
    return os.environ.get("RANK", "0")


def has_rank() -> bool:
    """RANK: whether a launcher set it."""
    return "RANK" in os.environ


def local_rank() -> int:
    """LOCAL_RANK: this process's number on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """WORLD_SIZE: number of processes of the run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """LOCAL_WORLD_SIZE: number of the run's processes on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def default_local_world_size(processes: str) -> None:
    """LOCAL_WORLD_SIZE: set it unless the launcher did."""
    os.environ.setdefault("LOCAL_WORLD_SIZE", processes)


def local_size() -> str | None:
    """LOCAL_SIZE: what DeepSpeed's launcher calls LOCAL_WORLD_SIZE; None without it."""
    return os.environ.get("LOCAL_SIZE")


def has_launcher() -> bool:
    """LOCAL_SIZE, TORCHELASTIC_RUN_ID, SLURM_PROCID: whether deepspeed, torchrun or srun started this process."""
    return any(name in os.environ for name in ("LOCAL_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"))


def set_ranks(rank: str, local_rank: str, world_size: str) -> None:
    """RANK, LOCAL_RANK and WORLD_SIZE: set all three."""
    os.environ.update(RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=world_size)


def default_ranks() -> None:
    """RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR: those of a process alone, where no launcher set them."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    default_master_address("127.0.0.1")


def has_master_address() -> bool:
    """MASTER_ADDR: whether a launcher set it."""
    return "MASTER_ADDR" in os.environ


def default_master_address(host: str) -> None:
    """MASTER_ADDR: the host that the processes meet at, unless the launcher named one."""
    os.environ.setdefault("MASTER_ADDR", host)


def has_master_port() -> bool:
    """MASTER_PORT: whether a launcher set it."""
    return "MASTER_PORT" in os.environ


def master_port() -> str:
    """MASTER_PORT: the port that the processes meet at; "?" when nobody set it."""
    return os.environ.get("MASTER_PORT", "?")


def default_master_port(port: int) -> None:
    """MASTER_PORT: the port that the processes meet at, unless the launcher named one."""
    os.environ.setdefault("MASTER_PORT", str(port))


@dataclass(frozen=True)
class SlurmStep:
    """What `srun` says of a process.

    Attributes:
        process: SLURM_PROCID, number of the process in the step.
        local_process: SLURM_LOCALID, its number on its node.
        tasks: SLURM_STEP_NUM_TASKS, processes of the step.
        tasks_per_node: SLURM_STEP_TASKS_PER_NODE, for example `2(x3),1`.
        nodes: SLURM_STEP_NODELIST, for example `rack1n[003-007]`.
        job: SLURM_JOB_ID.
    """

    process: str
    local_process: str
    tasks: str
    tasks_per_node: str
    nodes: str
    job: int


def slurm_step() -> SlurmStep | None:
    """SLURM_*: the step that this process is a task of; None outside of `srun`."""
    env = os.environ
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return None
    tasks = env["SLURM_STEP_NUM_TASKS"]
    return SlurmStep(
        process=env["SLURM_PROCID"],
        local_process=env.get("SLURM_LOCALID", "0"),
        tasks=tasks,
        tasks_per_node=env.get("SLURM_STEP_TASKS_PER_NODE", tasks),
        nodes=env.get("SLURM_STEP_NODELIST", "127.0.0.1"),
        job=int(env.get("SLURM_JOB_ID", "0")),
    )


def threads_given() -> bool:
    """OMP_NUM_THREADS: whether somebody decided how many threads a process computes with."""
    return "OMP_NUM_THREADS" in os.environ


def malloc_given() -> bool:
    """GLIBC_TUNABLES, MALLOC_...: whether somebody decided how glibc's malloc gets and keeps memory."""
    names = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in names)


def cache_home() -> Path:
    """XDG_CACHE_HOME: the user's folder for caches; ~/.cache where it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def default_torch_extensions(folder: Path) -> None:
    """TORCH_EXTENSIONS_DIR: where DeepSpeed's compiled extensions go, unless it is set."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))


def default_accelerator(name: str) -> None:
    """DS_ACCELERATOR: what DeepSpeed computes on, unless it is set; read when DeepSpeed is imported."""
    os.environ.setdefault("DS_ACCELERATOR", name)


def default_cublas_workspace(sizes: str) -> None:
    """CUBLAS_WORKSPACE_CONFIG: cuBLAS's workspaces, unless it is set; read when cuBLAS is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", sizes)


def deepspeed_log() -> str:
    """SPML_DEEPSPEED_LOG: from which level on a rank prints what DeepSpeed logs; "error" where it is not set."""
    return os.environ.get("SPML_DEEPSPEED_LOG") or "error"


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """SPML_KERNELS: inside, ops are made of PyTorch's own, which exporters know. The kernels' dispatch reads it."""
    before = os.environ.get("SPML_KERNELS")
    os.environ["SPML_KERNELS"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPML_KERNELS"]
        else:
            os.environ["SPML_KERNELS"] = before

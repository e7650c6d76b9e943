"""Whether a method's state fits, asked before anything is started."""

from __future__ import annotations

import os

import torch

from spml_fast.core import env
from spml_fast.core.errors import UserError


def free_gib() -> float:
    """Free memory in GiB where methods keep state: of this rank's GPU, else this rank's part of the machine's."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / 2**30
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            pages = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration):
        # Not Linux: all of the memory is the best that is known.
        pass
    return pages / env.local_world_size()


def require_memory(what: str, size: float, limit_gib: float | None, option: str) -> None:
    """Raise `UserError` when state does not fit.

    Args:
        what: what needs it, as the sentence's subject.
        size: bytes needed on every rank.
        limit_gib: GiB allowed; None allows half of what is free.
        option: the option that sets the limit.
    """
    need = size / 2**30
    limit = free_gib() / 2 if limit_gib is None else limit_gib
    if need > limit:
        source = "half of the free memory" if limit_gib is None else option
        raise UserError(
            f"{what} needs {need:,.1f} GiB on every rank, and {source} allows {limit:,.1f} GiB; "
            "use a method without a state of samples x classes, such as em or ll_r"
        )

"""How this process gets memory for tensors on a CPU."""

from __future__ import annotations

import ctypes
import platform

from spml_fast.core import env

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed for the next tensor, instead of giving it back to the system.

    By default every tensor of some megabytes is a mapping of its own: the system clears its pages when they are first
    touched and takes them back when it is freed, in every step again, and threads wait for each other meanwhile. Values
    do not change, nor does the peak of a run's memory; between peaks the process keeps what it had.

    Returns:
        Whether it was done. It is not where another C library is in use, or where the user chose a setting of malloc
        (docs/environment.md).
    """
    if env.malloc_given() or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # No block gets a mapping of its own, and the heap never shrinks (-1).
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))

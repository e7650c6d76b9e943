"""Worker processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent, process number `parent`, is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end with this one, even if it is killed.

    Without that they would wait for work for ever, and hold the locks and files that they have inherited.
    """
    # Forked workers start at once and inherit the imports; nothing here has touched a GPU.
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))

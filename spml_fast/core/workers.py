"""Worker processes that end with the process that started them, and threads that do not hold its end up."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cached_property
from queue import SimpleQueue

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


_Job = tuple[Future[None], Callable[[], None]]


def _do_jobs(jobs: SimpleQueue[_Job | None]) -> None:
    """What a thread does until it is handed None."""
    while (job := jobs.get()) is not None:
        future, work = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            work()
        except BaseException as error:
            # Whatever it is, it is raised where the result is asked for, as `concurrent.futures` does: a thread that
            # ended with it would leave that one waiting for ever.
            future.set_exception(error)
        else:
            future.set_result(None)
        # A job holds images; they are not kept until the next one comes.
        del job, future, work


def _end_threads(jobs: SimpleQueue[_Job | None], threads: int) -> None:
    """Let that many threads end."""
    for _ in range(threads):
        jobs.put(None)


class DaemonThreads:
    """Threads that do what they are handed, in turn, and end with this object.

    They are daemons, which those of a `ThreadPoolExecutor` are not: a program that ends, or is interrupted, does not
    wait for work that is not needed any more. They start with the first job.

    Args:
        threads: jobs at a time.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self.threads, self.name = threads, name

    @cached_property
    def _jobs(self) -> SimpleQueue[_Job | None]:
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for _ in range(self.threads):
            threading.Thread(target=_do_jobs, args=(jobs,), name=self.name, daemon=True).start()
        weakref.finalize(self, _end_threads, jobs, self.threads)
        return jobs

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Hand over a job; returns at once."""
        future: Future[None] = Future()
        self._jobs.put((future, work))
        return future

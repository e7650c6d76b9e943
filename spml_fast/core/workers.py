"""Worker processes that end with the process that started them, and threads that do not hold its end up."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cached_property
from queue import Empty, SimpleQueue

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


# Threads whose jobs the end of the program waits for, each with what it is handed.
_native: weakref.WeakKeyDictionary[threading.Thread, SimpleQueue[_Job | None]] = weakref.WeakKeyDictionary()
# Seconds for the jobs that are under way then; longer ones are not worth it.
_PATIENCE = 10.0


@functools.cache
def _wait_at_the_end() -> None:
    """Have the end of the program wait; what is registered later is called first, so not before there are threads."""
    atexit.register(_finish_native)


def _finish_native() -> None:
    """Let threads finish the job that they are at, and end."""
    started, end = list(_native.items()), time.monotonic() + _PATIENCE
    for _, jobs in started:
        with contextlib.suppress(Empty):
            while (job := jobs.get_nowait()) is None or job[0].cancel():
                pass
    for _, jobs in started:
        jobs.put(None)
    for thread, _ in started:
        thread.join(max(0.0, end - time.monotonic()))


class DaemonThreads:
    """Threads that do what they are handed, in turn, and end with this object.

    They are daemons, which those of a `ThreadPoolExecutor` are not: a program that ends, or is interrupted, does not
    wait for work that is not needed any more. They start with the first job.

    Args:
        threads: jobs at a time.
        name: of the threads.
        native: jobs call libraries in C++ that come back to Python, which ends such a thread when the program ends, and
            C++ the whole program then, with another exit status. So the end waits for the jobs that are under way.
    """

    def __init__(self, threads: int, name: str, native: bool = False) -> None:
        self.threads, self.name, self.native = threads, name, native

    @cached_property
    def _jobs(self) -> SimpleQueue[_Job | None]:
        jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for _ in range(self.threads):
            thread = threading.Thread(target=_do_jobs, args=(jobs,), name=self.name, daemon=True)
            if self.native:
                _wait_at_the_end()
                _native[thread] = jobs
            thread.start()
        weakref.finalize(self, _end_threads, jobs, self.threads)
        return jobs

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Hand over a job; returns at once."""
        future: Future[None] = Future()
        self._jobs.put((future, work))
        return future

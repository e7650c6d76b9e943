"""The one exception that stands for a mistake that a user can correct, and the wrapper that prints it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from spml_fast.core import env
from spml_fast.core.process import BROKEN_PIPE, begin_process, end_process, is_whole_program
from spml_fast.core.text import in_whole_words, shortened, without_controls

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cudaErrorMemoryAllocation",
    "bad_alloc",
    "bad alloc",
    "Can't allocate",
)

# Set once the ranks watch each other (`training/peers.py`), which has one of them report an error.
ranks_met = threading.Event()
# Seconds that a launcher needs to notice that a rank has ended, and to end the others.
_LAUNCHER = 3.0


class UserError(Exception):
    """Something a user got wrong: one sentence that names the file, line, field or class and says what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, DALI, NumPy or Python says that memory could not be had, of the GPU or the host.

    PyTorch has an exception of its own for GPUs alone; its CPU allocator and DALI raise `RuntimeError`.
    """
    if isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)


def fail(message: str, status: int = 1) -> NoReturn:
    """Print one sentence to standard error and leave with `status`; ranks other than 0 say which they are.

    Ranks that have not met yet have the same command line, and meet the same errors in it. All but the first of a
    machine give their launcher time to end them before they say it too.
    """
    rank = env.rank_name()
    if env.local_rank() and not ranks_met.is_set():
        # A second Ctrl-C ends the wait.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_LAUNCHER)
    # Names of files and classes come from anywhere, and a terminal obeys what it is sent.
    message = without_controls(shortened(message))
    line = f"error: {message}" if rank == "0" else f"rank {rank}: error: {message}"
    print(in_whole_words(line, sys.stderr), file=sys.stderr, flush=True)
    raise SystemExit(status)


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line program: a `UserError` becomes one sentence and exit status 1, never a traceback.

    Where nothing comes after it the process ends here (`end_process`); else `SystemExit` is raised.
    """
    is_program = is_whole_program(sys._getframe())
    if is_program:
        begin_process()
    try:
        _run(main)
    except SystemExit as leaving:
        status = leaving.code or 0
        if isinstance(status, int) and is_program:
            end_process(status)
        raise


def _run(main: Callable[[], int | None]) -> NoReturn:
    try:
        status = main()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        # `prog | head` closes our standard output early; that is not a failure worth a traceback.
        sys.stderr.close()
        raise SystemExit(BROKEN_PIPE) from None
    except KeyboardInterrupt:
        fail("interrupted; what was already written is kept", status=130)
    raise SystemExit(status or 0)

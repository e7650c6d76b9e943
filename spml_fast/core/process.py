"""The process of a program: a quicker start, and an end that does what others were promised and frees nothing."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from types import FrameType
from typing import NoReturn

# As Python ends when its output cannot be flushed, and as the shell says that nobody reads it any more (`prog | head`).
UNFLUSHED, BROKEN_PIPE = 120, 141
# New objects after which Python looks for cycles among them. At its own 700 a third of the time in which PyTorch, timm
# and DeepSpeed are imported goes into looking at what they keep.
NEW_OBJECTS = 20_000


def begin_process() -> None:
    """Have Python look for garbage in cycles less often, for the rest of the process."""
    _, *older = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *older)


def keep_what_exists() -> None:
    """Have Python look for garbage among objects alone that are made from now on.

    For a program that has imported what it needs and is about to work: its modules are most of the objects there are,
    and stay to its end. Nothing happens where the process is not one of ours (`begin_process`): whoever made its
    objects may want to be rid of them.
    """
    if gc.get_threshold()[0] == NEW_OBJECTS:
        gc.freeze()


def end_process(status: int) -> NoReturn:
    """End the process: wait for threads, call what `atexit` has, flush standard output and error.

    Python would go on to take modules apart one by one, and call destructors of libraries whose threads may still run:
    with PyTorch and timm that takes longer than a second, in which other ranks already wait for sockets to close.

    Args:
        status: of the process.
    """
    # Who interrupts the end does not want to wait for it.
    with contextlib.suppress(KeyboardInterrupt):
        # As the processes of Python's own multiprocessing end. Before it threads of executors would never be done.
        threading._shutdown()  # type: ignore[attr-defined]
    # DALI looks for garbage at the end: a third of a second, and the order in which cycles come apart is nobody's.
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            status = status or BROKEN_PIPE
        except OSError as error:
            if not status and stream is sys.stdout:
                print(f"error: the output cannot be written: {error}", file=sys.stderr)
            status = status or UNFLUSHED
    os._exit(status)


def is_whole_program(frame: FrameType | None) -> bool:
    """Whether what this package was asked to run is the program, so that nothing comes after it.

    A profiler, a debugger, a test or a notebook goes on when a program that it has started is done.

    Args:
        frame: of what asks.
    """
    while frame is not None and frame.f_globals.get("__name__", "").startswith("spml_fast."):
        frame = frame.f_back
    if frame is None or frame.f_globals is not vars(sys.modules["__main__"]) or sys.flags.inspect:
        return False
    names = []
    while (frame := frame.f_back) is not None:
        names.append(frame.f_globals.get("__name__"))
    # `python -m`
    return set(names) <= {"runpy"}

"""Signals that ask a run to save and end.

A scheduler that wants the machine back, a terminal that closes and a user at the keyboard send SIGTERM, SIGUSR1, SIGHUP
or SIGINT. The run then saves at its next update and ends with status 128 + the signal's number. Signals are taken by a
thread, because Python's own handlers do not run while the main thread waits in a collective or a kernel: there a second
signal, or the end of the time that the run has for saving, must still end it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from spml_fast.core import distributed
from spml_fast.training import watch

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Signals within so many seconds of the first are the same request: under `deepspeed` a Ctrl-C reaches a rank as SIGINT
# from the terminal and as SIGTERM from the launcher.
SAME_REQUEST_SECONDS = 3.0
# A program at the other end of our pipe, `tee` for example, ends within this time of the same hang-up.
_FAREWELL_SECONDS = 0.3


class Interrupted(KeyboardInterrupt):
    """A run was asked to end, and has: what there is to resume from is on the disk.

    Attributes:
        number: the signal's.
        status: exit status of a program that ends for it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number


def signal_name(number: int) -> str:
    """`SIGTERM` and the like."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class StopSignals:
    """Inside, signals that ask for an end are noted instead of ending the process.

    Signals that were ignored when the process started stay ignored (`nohup`). Outside of the main thread, where Python
    does not let anybody handle signals, nothing is changed.

    Args:
        seconds: from the first signal on, within which the run has to end.
        program: the process is a program of its own: a later signal, or the end of the time, ends it at once. Else (a
            notebook) a later signal raises `KeyboardInterrupt`, and there is no end of the time.

    Attributes:
        number: the first signal that came; 0 while none has.
        kept: what is on the disk to resume from, for the last line.
    """

    def __init__(self, seconds: float, program: bool) -> None:
        self.seconds, self.program = seconds, program
        self.number = 0
        self.kept = "nothing was saved yet"
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            # None: something other than Python handles it.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)
                # Reads and waits of libraries go on.
                signal.siginterrupt(number, False)
        if self.program:
            watch.give_seconds(self.seconds)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before or (isinstance(error, Interrupted) and self.program):
            # On its way out a program still ends within its time, and at once for a later signal; a launcher's
            # SIGTERM, because another rank has ended, changes nothing.
            return
        watch.give_seconds()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._before = {}
        self._writer.send(b"\0")
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, sooner or later; the thread has the number before."""
        if not self.program and self.number and time.monotonic() - self._first >= SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while True:
            left = max(0.0, self._first + self.seconds - time.monotonic()) if self.number and self.program else None
            if not select.select([self._reader], [], [], left)[0]:
                self._end(self.number, f"it did not end within {self.seconds:g} seconds (run.stop_seconds)")
            for number in self._reader.recv(64):
                if number == 0:
                    return
                if number in self._before:
                    self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if not self.number:
            self._first, self.number = now, number
            if number == signal.SIGHUP:
                self._leave_terminal()
            if self.program and distributed.is_main():
                _print(
                    f"{signal_name(number)}: saving at the next update, then ending; "
                    "another signal after three seconds ends at once"
                )
        elif self.program and now - self._first >= SAME_REQUEST_SECONDS and not self._is_launchers(number):
            self._end(number, f"a second signal, {signal_name(number)}, came before it had ended")

    def _is_launchers(self, number: int) -> bool:
        """Whether a SIGTERM says that a launcher has ended, as `deepspeed` does of a Ctrl-C some seconds later."""
        return number == signal.SIGTERM and watch.launcher_ended.is_set()

    def _leave_terminal(self) -> None:
        """Write to nowhere in the place of a terminal that has gone, or of a pipe to a program that went with it.

        Or the next line that is printed would end the run before it has saved.
        """
        time.sleep(_FAREWELL_SECONDS)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for standard in (1, 2):
            poll = select.poll()
            poll.register(standard, 0)
            # A lost terminal gives POLLHUP, a pipe without a reader POLLERR.
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
                os.dup2(nowhere, standard)
        os.close(nowhere)

    def _end(self, number: int, why: str) -> None:
        """End the process from this thread, whatever the main thread waits for."""
        if distributed.is_main():
            if sys.stderr.isatty():
                # A live line hides the cursor.
                _print("\033[?25h", end="")
            _print(f"error: stopped by {signal_name(number)}: {why}; {self.kept}")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(128 + number)


def _print(text: str, end: str = "\n") -> None:
    # The terminal may be what has gone.
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)

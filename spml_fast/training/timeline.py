"""The time of steps, cut into spans that add up to it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch.profiler import record_function

from spml_fast.core.spans import OTHER


class Clock(Protocol):
    """Tells moments, and the seconds between them once all are over."""

    @property
    def here(self) -> bool:
        """Whether who asks is on the line that is measured, not on one beside it."""

    def now(self) -> Any:
        """This moment."""

    def seconds(self, first: Any, second: Any) -> float:
        """From one moment to another."""

    def wait(self, moment: Any) -> None:
        """Until a moment is over."""


class HostClock:
    """Moments of this thread."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    @property
    def here(self) -> bool:
        """Whether this is the thread that made the clock."""
        return threading.get_ident() == self._thread

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        """Their difference."""
        return second - first

    def wait(self, moment: float) -> None:
        """It is over."""


class DeviceClock:
    """Moments of a GPU's stream: events, for which nobody waits until they are read.

    The host runs ahead of the device. Between two events lies what the device did for what the host called between
    them, and the time in which it had nothing to do because the host did not call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.current_stream(device)

    @property
    def here(self) -> bool:
        """Whether the caller's work goes to the stream that was current when the clock was made."""
        return bool(torch.cuda.current_stream(self._device) == self._stream)

    def now(self) -> torch.cuda.Event:
        """An event behind what the host has called so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Between events that are over."""
        return float(first.elapsed_time(second)) / 1000

    def wait(self, moment: torch.cuda.Event) -> None:
        """Wait for the device."""
        moment.synchronize()


class Timeline:
    """Records the spans of steps, each of which begins and ends outside of all spans.

    Args:
        clock: of the device that computes.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._within = [OTHER]
        # Of every step the moments in order, each with the span that the time before it belongs to.
        self._steps: list[list[tuple[str, Any]]] = []
        self._open = False

    def begin_step(self) -> None:
        """A step begins."""
        self._steps.append([])
        self._open = True
        self._mark()

    def end_step(self) -> None:
        """The step ends."""
        self._mark()
        self._open = False

    def _mark(self) -> None:
        if self._open:
            self._steps[-1].append((self._within[-1], self._clock.now()))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """As `Recorder.span`; in the profiler's trace too, where one is made."""
        with record_function(name):
            if not self._clock.here:
                # Of another thread or stream: the step takes no time for it but where it waits.
                yield
                return
            self._mark()
            self._within.append(name)
            try:
                yield
            finally:
                self._mark()
                self._within.pop()

    def totals(self) -> tuple[float, dict[str, float]]:
        """Seconds of all steps, and those of each span; waits until the last step is over."""
        self._clock.wait(self._steps[-1][-1][1])
        found: dict[str, float] = {}
        whole = 0.0
        for marks in self._steps:
            whole += self._clock.seconds(marks[0][1], marks[-1][1])
            for (_, before), (name, moment) in pairwise(marks):
                found[name] = found.get(name, 0.0) + self._clock.seconds(before, moment)
        return whole, found

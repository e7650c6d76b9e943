"""`run.profile N`: where the time of N updates goes, as a table, as figures, and as a trace of PyTorch's profiler.

Rank 0 measures the updates of one epoch of each phase, after a few that warm up: spans of the code (core/spans.py) cut
their time into parts that add up to it (timeline.py). The network's forward is told by view, and collectives by
wrapping those of PyTorch and DeepSpeed while the measurement lasts. What is computed stays the same.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from spml_fast import __version__
from spml_fast.core import distributed, spans
from spml_fast.core.batch import Batch
from spml_fast.core.io import atomic_write, write_json
from spml_fast.core.progress import say
from spml_fast.training import console
from spml_fast.training.logs import device_name
from spml_fast.training.timeline import Clock, DeviceClock, HostClock, Timeline

if TYPE_CHECKING:
    from spml_fast.training.setup import Phase
    from spml_fast.training.trainer import Trainer

# Updates before those that are measured: they choose algorithms, compile, and use up what was loaded ahead.
WARM_UP = 3
# A view that the method makes of another one, as IGNORE's masked one.
DERIVED = "derived view"
ORDER = (
    spans.DATA,
    spans.DECODING,
    spans.VIEWS,
    spans.LABELS,
    spans.FORWARD,
    spans.METHOD,
    spans.BACKWARD,
    spans.COMMUNICATION,
    spans.OPTIMIZER,
    spans.SAVING,
    spans.OTHER,
)


class Profile(Protocol):
    """What the training loop tells of its updates."""

    def before_update(self) -> float:
        """An update begins, and the one before it is over; returns the seconds that this call took."""

    def see(self, batches: Sequence[Batch]) -> None:
        """These are the micro-batches of the update."""


class NoProfile:
    """Nothing is measured."""

    def before_update(self) -> float:
        """Takes no time."""
        return 0.0

    def see(self, batches: Sequence[Batch]) -> None:
        """Nothing to note."""


@dataclass(frozen=True)
class Plan:
    """Which updates of an epoch are measured.

    Attributes:
        warm: updates before them.
        steps: how many they are.
    """

    warm: int
    steps: int


def plan(asked: int, left: int, whole: bool, last: bool) -> Plan | None:
    """The updates to measure in an epoch; None where a later one suits better.

    Args:
        asked: how many are wanted.
        left: updates of the epoch that are still to come.
        whole: it is at its beginning.
        last: no other comes.
    """
    if left < WARM_UP + asked and not (whole or last):
        return None
    warm = max(min(WARM_UP, left - 1), 0)
    steps = min(asked, left - warm)
    return Plan(warm, steps) if steps else None


@contextlib.contextmanager
def profiled_epoch(trainer: Trainer, phase: Phase, epoch: int, update: int) -> Iterator[Profile]:
    """Inside, the updates of an epoch are those that are measured, or they are not.

    Args:
        trainer: the run, its engine made for this phase.
        phase: what is trained.
        epoch: of it, from 1.
        update: of the epoch, from which it goes on.
    """
    asked = trainer.config.run.profile
    if asked is None or not distributed.is_main() or phase.name in trainer.profiled:
        yield NoProfile()
        return
    left = trainer.loader.updates_per_epoch - update
    chosen = plan(asked, left, whole=update == 0, last=epoch == phase.epochs)
    if chosen is None:
        yield NoProfile()
        return
    with ExitStack() as stack:
        yield StepProfile(trainer, phase, epoch, update, chosen, stack)


class StepProfile:
    """The measurement of an epoch's updates.

    Args:
        trainer: the run.
        phase: what is trained.
        epoch: of it, from 1.
        update: of the epoch, from which it goes on.
        chosen: the updates to measure.
        stack: undoes everything, also where the epoch ends early.
    """

    def __init__(self, trainer: Trainer, phase: Phase, epoch: int, update: int, chosen: Plan, stack: ExitStack) -> None:
        self._trainer, self._phase, self._epoch, self._first = trainer, phase, epoch, update + chosen.warm + 1
        self._plan, self._stack = chosen, stack
        self._begun = 0
        self._views: list[tuple[str, Tensor]] = []

    def before_update(self) -> float:
        """As `Profile.before_update`."""
        start, number = time.perf_counter(), self._begun
        self._begun += 1
        first, end = self._plan.warm, self._plan.warm + self._plan.steps
        attached = max(first - 1, 0)
        if not attached <= number <= end:
            return 0.0
        if number > first:
            self._timeline.end_step()
        if number == attached:
            self._attach()
        else:
            # The first of these ends the profiler's warm-up, the last its recording.
            self._profiler.step()
        if number == end:
            self._finish()
        elif number >= first:
            self._timeline.begin_step()
        return time.perf_counter() - start

    def see(self, batches: Sequence[Batch]) -> None:
        """As `Profile.see`."""
        self._views = [view for batch in batches for view in batch.views.items()]

    def _attach(self) -> None:
        """Begin to listen; what comes before the first measured update belongs to none."""
        device = self._trainer.device
        clock: Clock = DeviceClock(device) if device.type == "cuda" else HostClock()
        self._timeline = Timeline(clock)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with warnings.catch_warnings():
            # It advises to warm up; an epoch of one update cannot.
            warnings.simplefilter("ignore", UserWarning)
            schedule = torch.profiler.schedule(
                wait=0, warmup=min(self._plan.warm, 1), active=self._plan.steps, repeat=1
            )
            self._profiler = self._stack.enter_context(torch.profiler.profile(activities=activities, schedule=schedule))
        self._stack.enter_context(spans.recorded(self._timeline))
        self._stack.enter_context(self._trainer.engine.collectives_within(lambda: spans.span(spans.COMMUNICATION)))
        self._stack.enter_context(self._forwards())

    @contextlib.contextmanager
    def _forwards(self) -> Iterator[None]:
        """Inside, a forward of the classifier is a span, named for the view that it is of."""
        under_way: list[AbstractContextManager[None]] = []

        def before(module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            images = args[0] if args else options["images"]
            # ZeRO stage 3 hands over another tensor of the same memory.
            start = images.data_ptr()
            view = next((f"{name} view" for name, given in self._views if given.data_ptr() == start), DERIVED)
            under_way.append(spans.span(f"{spans.FORWARD}: {view}"))
            under_way[-1].__enter__()

        def after(*_: Any) -> None:
            under_way.pop().__exit__(None, None, None)

        classifier = self._trainer.classifier
        handles = [
            classifier.register_forward_pre_hook(before, with_kwargs=True),
            classifier.register_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _finish(self) -> None:
        """Stop to listen, write what was found, and say it."""
        trainer, steps = self._trainer, self._plan.steps
        self._stack.close()
        trainer.profiled.add(self._phase.name)
        whole, parts = self._timeline.totals()
        asked = trainer.config.run.profile
        figures: dict[str, Any] = {
            "version": __version__,
            "phase": self._phase.name,
            "epoch": self._epoch,
            "first_update": self._first,
            "updates": steps,
            "asked": asked,
            "ranks": trainer.world,
            "device": device_name(trainer.device),
            "update_ms": 1000 * whole / steps,
            "rows": rows(whole, parts, steps),
        }
        place = console.epoch_name(self._phase, self._epoch)
        last = self._first + steps - 1
        title = f"where the time of an update goes: {place}, updates {self._first} to {last}, rank 0"
        for line in [title, *table(figures)]:
            say(line, whole=True)
        if asked != steps:
            say(f"profile: {steps} of the {asked} updates asked for: the epoch has no more, but for those that warm up")
        trace, summary = trainer.layout.free_profile()
        try:
            trace.parent.mkdir(exist_ok=True)
            with atomic_write(trace) as partial:
                self._profiler.export_chrome_trace(os.fspath(partial))
            write_json(summary, figures | {"trace": trace.name})
        except OSError as error:
            # The run is worth more than its profile.
            say(f"profile: {trace} cannot be written: {error.strerror or error}")
            return
        say(f"profile: {summary}, and {trace} for https://ui.perfetto.dev or chrome://tracing", whole=True)


def rows(whole: float, parts: Mapping[str, float], steps: int) -> list[dict[str, Any]]:
    """What each part takes: `name`, `ms` of an update, and `percent` of it; they add up to the update.

    Args:
        whole: seconds of all updates.
        parts: seconds by span.
        steps: updates.
    """

    def place(name: str) -> int:
        return ORDER.index(name if name in ORDER else name.partition(":")[0])

    return [
        {"name": name, "ms": 1000 * parts[name] / steps, "percent": 100 * parts[name] / whole}
        for name in sorted(parts, key=place)
    ]


def table(figures: Mapping[str, Any]) -> list[str]:
    """The lines of the table."""
    found = [(row["name"], row["ms"], row["percent"]) for row in figures["rows"]]
    found.append(("sum", figures["update_ms"], sum(percent for *_, percent in found)))
    width = max(len(name) for name, *_ in found)
    return [f"  {name:<{width}}  {ms:10.2f} ms  {percent:5.1f}%" for name, ms, percent in found]

"""The trackers of one run: started together, each with a thread of its own, none of which can end the run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import read_text, write_json
from spml_fast.core.text import parse_json
from spml_fast.runs.layout import RunLayout
from spml_fast.training.trackers import get_tracker
from spml_fast.training.trackers.base import Ended, Started, Summary, TrackedRun, Tracker, check_package

Say = Callable[[str], None]

# Seconds that a run waits for its trackers at its end, and when it was stopped, which launchers allow little time for.
PATIENCE, PATIENCE_STOPPED = 60.0, 5.0
# Calls that wait for a tracker that does not take them; then they are left out.
_WAITING = 10_000


def chosen_trackers(config: Config) -> list[str]:
    """Names of the run's trackers: `run.trackers`, without TensorBoard where `deepspeed.tensorboard` is false."""
    return [name for name in config.run.trackers if name != "tensorboard" or config.deepspeed.tensorboard]


def make_trackers(config: Config) -> dict[str, Tracker]:
    """The run's trackers by name, not started yet.

    Raises:
        UserError: there is no such tracker, its package is missing, or its options are none.
    """
    options = config.run.tracker_options
    names = chosen_trackers(config)
    unused = sorted(set(options) - set(config.run.trackers))
    if unused:
        raise UserError(f"run.tracker_options has {', '.join(unused)}, which run.trackers does not have; add it there")
    for name in names:
        if not isinstance(options.get(name) or {}, Mapping):
            raise UserError(f"run.tracker_options.{name} is {options[name]!r}; it must be options by name")
        check_package(name)
    return {name: get_tracker(name)(options.get(name) or {}) for name in names}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Worker:
    """A tracker that has started, and the thread that calls it.

    Attributes:
        problem: what ended the tracker, or that it falls behind; None while all is well.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self._tracker = name, tracker
        self.problem: str | None = None
        # Without a limit of its own: whoever puts something in must never wait.
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        # A thread that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                # Whatever a tracker's library and its network meet must not end a run.
                self.problem = _first_line(error)
                return

    def put(self, method: str, *arguments: Any) -> None:
        """Have a method called; nothing where the tracker has failed."""
        if self.problem is None and self._calls.qsize() >= _WAITING:
            self.problem = f"it has not taken {_WAITING} figures"
        if self.problem is None:
            self._calls.put(lambda: getattr(self._tracker, method)(*arguments))

    def close(self, ended: Ended) -> None:
        """Have the tracker end, and its thread after it."""
        self.put("close", ended)
        self._calls.put(None)

    def wait(self, left: float, seconds: float) -> None:
        """Wait for the thread's end, for what is `left` of the `seconds` that all trackers have."""
        if self.problem is None:
            self._thread.join(max(0.0, left))
        if self._thread.is_alive() and self.problem is None:
            self.problem = f"it has not taken everything within {seconds:g} seconds"


class Trackers:
    """What a run tells its trackers; nothing on ranks other than 0. A context, at whose end they are closed.

    Args:
        config: the run's.

    Attributes:
        names: of the run's trackers.
        images: samples seen when figures were last given; 0 before.

    Raises:
        UserError: as `make_trackers`; all ranks raise it.
    """

    def __init__(self, config: Config) -> None:
        self.names, self.images = chosen_trackers(config), 0
        made: dict[str, Tracker] = {}

        def make() -> None:
            made.update(make_trackers(config))

        # Packages must be there where rank 0 is.
        distributed.from_main(make)
        self._made = made
        self._workers: list[_Worker] = []
        self._say: Say = print
        self._said: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is any (the same on all ranks)."""
        return bool(self.names)

    def start(self, layout: RunLayout, options: Mapping[str, Any], text: str, resumed: bool, say: Say) -> None:
        """Start them all, once (collective).

        Args:
            layout: the run's.
            options: resolved configuration, section -> option -> value.
            text: the same as YAML.
            resumed: from a checkpoint; then a tracker that does not start is left out, as if it had failed later.
            say: writes a line.

        Raises:
            UserError: one does not start; all ranks raise it.
        """
        self._say = say
        distributed.from_main(lambda: self._start(layout, options, text, resumed))

    def _start(self, layout: RunLayout, options: Mapping[str, Any], text: str, resumed: bool) -> None:
        made, self._made = self._made, {}
        for name, tracker in made.items():
            known = None
            try:
                known = _known(layout, name)
                run = TrackedRun(layout.folder, layout.folder.resolve().name, options, text, known)
                layout.trackers.mkdir(exist_ok=True)
                started = tracker.start(run)
                _remember(layout, name, started)
            except Exception as error:
                # The classes of their errors are their own.
                problem = f"tracker {name} does not start ({_first_line(error)})"
                if resumed:
                    self._say(f"warning: {problem}; the run goes on without it")
                    continue
                again = "" if known is None else f", delete {layout.tracker(name)} for a new run of it"
                raise UserError(f"{problem}; mend that{again}, or leave {name} out of run.trackers") from error
            if started.place is not None:
                self._say(f"tracker {name}: {started.place}")
            self._workers.append(_Worker(name, tracker))

    def log(self, figures: Mapping[str, float], images: int) -> None:
        """Give figures to all trackers.

        Args:
            figures: name, such as `train/loss`, -> value.
            images: samples seen.
        """
        self.images = images
        self._tell("log", dict(figures), images)

    def finish(self, summary: Summary) -> None:
        """Give the final figures to all trackers."""
        self._tell("finish", summary)

    def _tell(self, method: str, *arguments: Any) -> None:
        for worker in self._workers:
            worker.put(method, *arguments)
        self._report(self._workers)

    def _report(self, workers: Sequence[_Worker]) -> None:
        """Say once of each what has gone wrong."""
        for worker in workers:
            if worker.problem is not None and worker.name not in self._said:
                self._said.add(worker.name)
                self._say(f"warning: tracker {worker.name} is left out from now on: {worker.problem}")

    def close(self, ended: Ended) -> None:
        """End all trackers, and wait for what they still send."""
        for worker in self._workers:
            worker.close(ended)
        seconds = PATIENCE if ended == "finished" else PATIENCE_STOPPED
        end = time.monotonic() + seconds
        for worker in self._workers:
            worker.wait(end - time.monotonic(), seconds)
        self._report(self._workers)
        self._workers = []

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("finished" if kind is None else "stopped" if stopped else "failed")


def _known(layout: RunLayout, name: str) -> str | None:
    """A tracker's own name of this run; None where it has none yet."""
    path = layout.tracker(name)
    if not path.is_file():
        return None
    try:
        return str(parse_json(read_text(path, "utf-8"))["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it, and {name} begins a new run") from error


def _remember(layout: RunLayout, name: str, started: Started) -> None:
    """Keep a tracker's name of this run."""
    if started.id is not None:
        write_json(layout.tracker(name), {"id": started.id})

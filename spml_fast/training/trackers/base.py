"""What every tracker is: the interface, what it is told, and the registry."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from spml_fast.core.errors import UserError
from spml_fast.core.registry import Registry

# What one is called that nobody named.
PROJECT = "spml_fast"

Ended = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run at its start.

    Attributes:
        folder: the run directory.
        name: for people; the folder's.
        options: resolved configuration, section -> option -> value.
        text: the same as YAML.
        known: the tracker's own name of this run, where an earlier start has given it one; else None.
    """

    folder: Path
    name: str
    options: Mapping[str, Any]
    text: str
    known: str | None


@dataclass(frozen=True)
class Started:
    """What a tracker says when it has started.

    Attributes:
        id: its own name of the run, by which a resumed run continues it; None where it has none.
        place: where people find the run, or None.
    """

    id: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Example:
    """A picture with its predictions.

    Attributes:
        image: uint8 [S, S, 3], as the model sees it.
        predicted: (class, probability) pairs, the most probable first.
        known: its known positive classes.
    """

    image: npt.NDArray[np.uint8]
    predicted: list[tuple[str, float]]
    known: list[str]

    @property
    def caption(self) -> str:
        """Predictions and known classes on one line."""
        predicted = ", ".join(f"{name} {probability:.2f}" for name, probability in self.predicted) or "nothing"
        return f"predicted: {predicted}; known: {', '.join(self.known) or 'nothing'}"


@dataclass(frozen=True)
class Summary:
    """What a finished run gives a tracker beside the figures of its updates.

    Attributes:
        figures: final figures by name.
        images: samples seen, the axis of all figures.
        columns: of the table of classes.
        rows: a row for each class; numbers, texts, or None where a figure is not defined.
        examples: pictures with predictions.
    """

    figures: dict[str, float]
    images: int
    columns: tuple[str, ...] = ()
    rows: list[tuple[str | float | None, ...]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


class Tracker:
    """Takes a run's figures on rank 0. Subclass, implement the methods, and decorate with `@register(NAME)`.

    `start` is called by the training loop, the other methods by a thread of the tracker's own, one after the other.
    What they raise ends the tracker and never the run.

    Attributes:
        package: that must be installed, as it is imported; empty where nothing more is needed.
        extra: of setup.py, which installs it.
        options: of `run.tracker_options`, for this tracker.
    """

    package: ClassVar[str] = ""
    extra: ClassVar[str] = ""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)

    def start(self, run: TrackedRun) -> Started:
        """Begin a run, or continue the one that `run.known` names."""
        raise NotImplementedError

    def log(self, figures: Mapping[str, float], images: int) -> None:
        """Take figures by name, such as `train/loss`, after so many samples."""

    def finish(self, summary: Summary) -> None:
        """Take final figures, the table of classes and examples."""

    def close(self, ended: Ended) -> None:
        """The run has ended; nothing comes after it."""


T = TypeVar("T", bound=type[Tracker])
TRACKERS: Registry[Tracker] = Registry("tracker", "run.trackers")


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a tracker known by `name`."""
    return TRACKERS.register(name)


def tracker_names() -> list[str]:
    """Names of all trackers."""
    return TRACKERS.names()


def get_tracker(name: str) -> type[Tracker]:
    """The tracker class called `name`; `UserError` lists the names that exist."""
    return TRACKERS.get(name)


def check_package(name: str) -> None:
    """Raise `UserError` unless a tracker's package is installed, with the line that installs it."""
    tracker = get_tracker(name)
    if not tracker.package:
        return
    spec = importlib.util.find_spec(tracker.package)
    # Without an origin it is only a folder of that name, such as wandb leaves behind.
    if spec is None or spec.origin is None:
        line = f"pip install 'spml_fast[{tracker.extra}]'" if tracker.extra else f"pip install {tracker.package}"
        raise UserError(
            f"run.trackers has {name}, whose package {tracker.package} is not installed; run {line} first, or leave "
            f"{name} out"
        )

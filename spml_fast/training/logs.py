"""Where a run's figures and lines go: metrics.jsonl, standard output, and its progress (core/progress.py)."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spml_fast.core import distributed, progress
from spml_fast.core.io import finite
from spml_fast.evaluation.metrics import selection_quality
from spml_fast.runs.layout import RunLayout


class Meter:
    """Throughput and waiting of one epoch, on the host's clock.

    The clock stops only between updates; on a GPU an epoch's time includes the work in flight because reading the
    epoch's loss waits for it.

    Args:
        samples: trained on before, when the epoch was resumed within.
        waited: seconds of waiting until then.
        seconds: that it took.
    """

    def __init__(self, samples: int = 0, waited: float = 0.0, seconds: float = 0.0) -> None:
        self.samples = samples
        self.waited = waited
        self.start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.perf_counter() - self.start

    @property
    def rate(self) -> float:
        """Samples a second over all ranks."""
        return self.samples / max(self.seconds, 1e-9)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the time counts as waiting for data."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - before

    def leave_out(self, seconds: float) -> None:
        """Have time that just passed count for nothing."""
        self.start += seconds

    @property
    def wait_fraction(self) -> float:
        """Fraction of the time spent waiting for data on this rank, 0..1."""
        return self.waited / max(self.seconds, 1e-9)


def device_name(device: torch.device) -> str:
    """What the GPU is called; `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux counts ru_maxrss in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def selection_figures(values: dict[str, float]) -> dict[str, float]:
    """How right a method's selection of labels was, from an epoch's counts; nothing where the truth is not known."""
    if "selected_true_count" not in values:
        return {}
    names = ("selected_true_count", "selected_count", "hidden_positive_count")
    quality = selection_quality(*(int(values[name]) for name in names))
    return {"selection_precision": quality["precision"], "selection_recall": quality["recall"]}


def drop_half_line(path: Path) -> None:
    """Cut off a last line that a machine's sudden end left without its end, or the next one would be joined to it."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


class RunLog:
    """Writes the run's figures; does nothing on ranks other than 0.

    Args:
        folder: run directory; figures go to metrics.jsonl in it.
        total_updates: updates of the whole run, for its progress.
    """

    def __init__(self, folder: Path, total_updates: int) -> None:
        self.active = distributed.is_main()
        self.path = RunLayout(folder).metrics
        if self.active:
            drop_half_line(self.path)
        self.task = progress.Task("starting", total_updates, unit="", notes=())
        self._shown = progress.under_way(self.task, self.active)

    def __enter__(self) -> RunLog:
        self._shown.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._shown.__exit__(*error)

    def say(self, text: str) -> None:
        """One plain line."""
        if self.active:
            progress.say(text)

    def say_fields(self, fields: Sequence[str]) -> None:
        """One line of fields, the most important first; a narrow terminal gets the first ones."""
        if self.active:
            progress.say_fields(fields)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Append one JSON line; numbers that are not finite become null."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **finite(values)}) + "\n")

    @property
    def due(self) -> bool:
        """Whether it is time to show where the run stands; cheap, for it is asked in every update."""
        return self.active and self.task.due

    def progress(self, done: int, name: str, notes: Sequence[str], left: float | None) -> None:
        """Show where the run stands.

        Args:
            done: updates of the whole run.
            name: of the epoch.
            notes: its figures, the most important first.
            left: seconds to the end of training; None where nothing tells yet.
        """
        self.task.change(name, done, notes, left)

"""Where a run's figures and lines go: metrics.jsonl, a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from spml_fast.core import distributed
from spml_fast.core.io import finite
from spml_fast.core.text import without_controls
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

    @property
    def wait_fraction(self) -> float:
        """Fraction of the time spent waiting for data on this rank, 0..1."""
        return self.waited / max(self.seconds, 1e-9)


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
        total_updates: updates of the whole run, for the bar.
    """

    def __init__(self, folder: Path, total_updates: int) -> None:
        self.active = distributed.is_main()
        self.path = RunLayout(folder).metrics
        if self.active:
            drop_half_line(self.path)
        self.console = Console(highlight=False, soft_wrap=True)
        self.live: Progress | None = None
        if self.active and self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                console=self.console,
                transient=True,
            )
            self.task = self.live.add_task("starting", total=total_updates)

    def __enter__(self) -> RunLog:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """One plain line."""
        if self.active:
            self.console.print(without_controls(text), markup=False)

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Append one JSON line; numbers that are not finite become null."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **finite(values)}) + "\n")

    def progress(self, done: int, text: str) -> None:
        """Move the live line; nothing where there is no terminal."""
        if self.live:
            self.live.update(self.task, completed=done, description=text)

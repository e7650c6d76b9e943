"""Training steps that are timed before a run begins, so that it can choose; and what they took, kept for later runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional as F

from spml_fast.core import distributed, env
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.io import write_json
from spml_fast.core.precision import autocast
from spml_fast.models.classifier import Classifier
from spml_fast.training.engine_config import micro_batch_size


class Times(Protocol):
    """What a trial found, as a dataclass."""

    def sentence(self) -> str:
        """What was measured."""


T = TypeVar("T", bound=Times)
# Images of a timed step are as many as take about STEP seconds, and these at least: BatchNorm has nothing to normalise
# in one image whose map is one cell.
STEP, FEWEST_IMAGES = 0.25, 2
# Rounds in which each way takes a step: these at least, and at most, and none is begun after so many seconds.
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 12, 1.5
# What may go wrong in a trial without ending a run: no memory, a network or a compiler that fails.
FAILURES = (RuntimeError, MemoryError, ValueError, OSError)


@dataclass(frozen=True)
class Trial:
    """A run's network, whose steps are timed.

    Attributes:
        classifier: on the CPU; copies of it make the steps.
        batch: images of a rank's step in the run.
        size: their side in pixels.
        device: where steps are made.
    """

    classifier: Classifier
    batch: int
    size: int
    device: torch.device

    @property
    def fewest(self) -> int:
        """Images of the smallest step that is timed."""
        return min(FEWEST_IMAGES, self.batch)

    @contextmanager
    def network(self) -> Iterator[Classifier]:
        """A copy to try steps with, in training mode; random numbers go on afterwards as if nothing had been.

        The copy and its gradients take less memory than the optimizer of the run will.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield copy.deepcopy(self.classifier).to(self.device).to(memory_format=torch.channels_last).train()


def trial_of(config: Config, classifier: Classifier, device: torch.device) -> Trial:
    """The trial of a run's network on this rank."""
    batch = micro_batch_size(config.train, distributed.world_size())
    return Trial(classifier, batch, config.data.image_size, device)


def step_seconds(network: Classifier, images: int, size: int, dtype: torch.dtype | None) -> float:
    """Seconds of one forward and backward on noise.

    Args:
        network: from `Trial.network`.
        images: of the step.
        size: their side in pixels.
        dtype: autocast's, or None.
    """
    device = next(network.parameters()).device
    noise = torch.randn(images, 3, size, size, device=device).to(memory_format=torch.channels_last)
    network.zero_grad()
    start = _now(device)
    with autocast(device, dtype):
        logits = network(noise, alpha=network.alpha_train).logits
    F.softplus(logits).mean().backward()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def images_of_a_step(trial: Trial, network: Classifier, dtype: torch.dtype | None) -> int:
    """How many images a timed step should have, at most those of a step in the run.

    Args:
        trial: which network.
        network: from `Trial.network`; it has made a step of `Trial.fewest` images before.
        dtype: autocast's, or None.
    """
    seconds = step_seconds(network, trial.fewest, trial.size, dtype)
    return min(max(int(trial.fewest * STEP / seconds), trial.fewest), trial.batch)


def in_turn(first: Callable[[], float], second: Callable[[], float]) -> list[tuple[float, float]]:
    """Seconds of two ways, round by round, so that a slow moment of the machine meets both."""
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(times) < FEWEST_ROUNDS or (len(times) < MOST_ROUNDS and time.perf_counter() - start < SECONDS):
        if len(times) % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        times.append((a, b))
    return times


def seconds_text(seconds: float) -> str:
    """A short time as people say it."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def what_failed(error: BaseException) -> str:
    """An error of a trial on one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:200]}"


def trial_key(config: Config, trial: Trial) -> str:
    """What the times of a trial depend on, as text."""
    model, device = config.model, trial.device
    facts: dict[str, Any] = {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backbone": model.backbone,
        "image_size": config.data.image_size,
        "head": model.head,
        "head_options": repr(model.head_options),
        "parameters": sum(p.numel() for p in trial.classifier.parameters()),
        "output_stride": model.output_stride,
        "frozen": [model.freeze_bn, *model.freeze],
        "grad_checkpointing": model.grad_checkpointing,
        "batch": trial.batch,
    }
    return json.dumps(facts, sort_keys=True)


def processor_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


class TimesCache:
    """Times of earlier runs, in a JSON file of the user's cache.

    Args:
        section: of the file: what kind of times.

    Attributes:
        path: the file; it need not be there.
        problem: why it could not be used, where it could not.
    """

    def __init__(self, section: str) -> None:
        self.path = env.cache_home() / "spml_fast" / "step_times.json"
        self.section = section
        self.problem: str | None = None
        self._values: dict[str, dict[str, Any]] = {}

    def times(self, key: str, make: Callable[..., T], measure: Callable[[], T | None]) -> tuple[T | None, str]:
        """Times of an earlier run, or new ones, which are kept.

        Args:
            key: what they depend on.
            make: makes them of what is kept of them; raises `ValueError` or `TypeError` for anything else.
            measure: makes new ones, or None where that is not worth it.

        Returns:
            The times, and half a sentence about them; None and nothing where there are none.

        Raises:
            What `measure` raises.
        """
        times = self._read(key, make)
        if times is not None:
            return times, f"{times.sentence()}, measured by an earlier run ({self.path})"
        times = measure()
        return (None, "") if times is None else (times, times.sentence() + self._write(key, times))

    def _read(self, key: str, make: Callable[..., T]) -> T | None:
        """Times under a key; None where there are none, or the file is damaged."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            self._values = {name: dict(entries) for name, entries in values.items()}
            entry = self._values.get(self.section, {}).get(key)
            return None if entry is None else make(**entry)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self._values = {}
            self.problem = f"{self.path} is damaged and was not used ({what_failed(error)})"
            return None

    def _write(self, key: str, times: Any) -> str:
        """Keep times under a key. What there is to say of the file, to follow a sentence."""
        section = self._values.get(self.section, {}) | {key: dataclasses.asdict(times)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._values | {self.section: section})
        except (OSError, UserError) as error:
            return f"; it could not be kept for other runs ({error})"
        return f"; {self.problem}" if self.problem else ""

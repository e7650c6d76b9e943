"""Whether a run computes in fp32 or bf16 where `train.precision` is auto: measured on its own network.

What a processor can do does not tell which is faster. With AVX512-BF16 the dense convolutions of a ResNet-50 gain more
than the conversions around them cost, the depthwise ones of an EfficientNet do not, and elsewhere a ResNet-50 was
slower, too. So a CPU is asked: rank 0 times training steps of the run's network in both, in turn, for two or three
seconds, and bf16 is taken where it is `GAIN` times as fast. What was found is kept in the user's cache for the next run
of the same kind, and the decision in the run's config.yaml for good.

GPUs are not timed. From sm_80 on their tensor units give bf16 at least twice the rate of TF32 and half the traffic, in
every network that fills them; a few steps there measure cuDNN's search for algorithms, which each shape and type needs
once. Older ones have no bf16 units.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.precision import has_bf16, prefers_bf16
from spml_fast.core.text import counted
from spml_fast.models.classifier import Classifier
from spml_fast.training import trials
from spml_fast.training.trials import Trial, step_seconds

if TYPE_CHECKING:
    from spml_fast.training.earlier_choices import EarlierChoices

Precision = Literal["fp32", "bf16"]
# bf16 must be so many times as fast as fp32. Less is not worth its rounding, nor beyond the noise of a short timing.
GAIN = 1.15


@dataclass(frozen=True)
class PrecisionTimes:
    """Seconds of a forward and backward of the run's network.

    Attributes:
        images: of a timed step.
        batch: images of a rank's step in the run.
        fp32: median of the rounds.
        bf16: the same.
        casts: of one step's bf16 copies of the weights and their gradients' way back, whatever the batch.
        rounds: gain of each round, fp32 over bf16.

    Raises:
        ValueError: times that cannot be.
    """

    images: int
    batch: int
    fp32: float
    bf16: float
    casts: float
    rounds: list[float]

    def __post_init__(self) -> None:
        if not (self.rounds and min(self.images, self.batch, self.fp32, self.bf16, *self.rounds) > 0 <= self.casts):
            raise ValueError("times must be positive")

    @property
    def gain(self) -> float:
        """How many times as fast bf16 is in a step of `batch` images: what does not grow with them counts once."""
        shared = self.casts * (1 - self.images / self.batch)
        return statistics.median(self.rounds) * self.bf16 / max(self.bf16 - shared, 0.5 * self.bf16)

    @property
    def precision(self) -> Precision:
        """The faster one; fp32 unless bf16 gains enough."""
        return "bf16" if self.gain >= GAIN else "fp32"

    def sentence(self) -> str:
        """What was measured."""
        fp32, bf16 = map(trials.seconds_text, (self.fp32, self.bf16))
        return (
            f"a step of {counted(self.images, 'image')} takes {fp32} in fp32 and {bf16} in bf16, "
            f"{self.gain:.2f} times as fast in steps of {self.batch} (taken from {GAIN:g} on)"
        )


def settle_precision(
    config: Config, classifier: Classifier, earlier: EarlierChoices | None, device: torch.device
) -> tuple[Config, list[str]]:
    """The configuration with fp32 or bf16 in the place of `train.precision auto`, and notes (collective).

    Args:
        config: the run's.
        classifier: the network on the CPU, with what the run asks of it in training; not changed.
        earlier: of a run that has begun, which keeps them; None for another.
        device: what the ranks compute on.
    """
    if config.train.precision != "auto":
        return config, []
    notes: list[str] = []
    if earlier is not None and earlier.precision is not None:
        chosen, notes = earlier.precision, earlier.notes("train.precision", earlier.precision)
    elif earlier is not None or device.type == "cuda":
        # Of versions that did not write down what auto meant: what it meant then. Ranks may have different hardware.
        chosen = "bf16" if all(distributed.gather_objects(prefers_bf16(device))) else "fp32"
    else:
        able = all(distributed.gather_objects(has_bf16(device)))
        chosen, note = distributed.from_main(lambda: _measured_choice(config, classifier, device, able))
        notes = [f"train.precision auto: {chosen}; {note}; --train.precision decides without measuring"]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, precision=chosen)), notes


def _measured_choice(config: Config, classifier: Classifier, device: torch.device, able: bool) -> tuple[Precision, str]:
    """fp32 or bf16 on a CPU, and why: half a sentence. Nothing that goes wrong here ends a run."""
    if not able:
        whose = "this processor has" if distributed.world_size() == 1 else "a rank's processor has"
        return "fp32", f"{whose} no instructions for bf16"
    trial = trials.trial_of(config, classifier, device)
    cache, key = trials.TimesCache("precision"), trials.trial_key(config, trial)
    try:
        times, text = cache.times(key, PrecisionTimes, lambda: precision_times(trial))
    except trials.FAILURES as error:
        return "fp32", f"bf16 could not be measured ({trials.what_failed(error)})"
    assert times is not None
    return times.precision, text


def precision_times(trial: Trial) -> PrecisionTimes:
    """Time forward and backward of a copy of a network in fp32 and bf16, in turn.

    Raises:
        RuntimeError, MemoryError: memory ran out, or the network fails.
    """
    with trial.network() as network:
        # The first step of a shape chooses algorithms.
        for dtype in (None, torch.bfloat16):
            step_seconds(network, trial.fewest, trial.size, dtype)
        images = trials.images_of_a_step(trial, network, None)
        for dtype in (None, torch.bfloat16) if images > trial.fewest else ():
            step_seconds(network, images, trial.size, dtype)
        times = trials.in_turn(
            lambda: step_seconds(network, images, trial.size, None),
            lambda: step_seconds(network, images, trial.size, torch.bfloat16),
        )
        casts = _cast_seconds(network) if images < trial.batch else 0.0
    fp32, bf16 = (statistics.median(values) for values in zip(*times, strict=True))
    return PrecisionTimes(images, trial.batch, fp32, bf16, casts, [a / b for a, b in times])


@torch.no_grad()
def _cast_seconds(network: Classifier) -> float:
    """Seconds of copying all weights that autocast copies to bf16, and as many gradients back; the best of three."""
    weights = [p for p in network.parameters() if p.ndim > 1 and p.requires_grad]
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for weight in weights:
            weight.to(torch.bfloat16).float()
        best = min(best, time.perf_counter() - start)
    return best

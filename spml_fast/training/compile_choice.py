"""Whether a run compiles its backbone where `model.compile` is auto: only where that pays within the run.

Compiling takes a minute, again at every start of the run. It is not even tried unless that minute is a small part of
what is left to train. Then rank 0 compiles a copy of the backbone and times steps of it and of the plain one in turn;
what was found is kept in the user's cache, the decision in the run's config.yaml.

Compiled code rounds differently, so that a run keeps what it began with when it is resumed. Its bits are the same as
far as the compiler makes the same code again, from the same versions on the same machine.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

import torch

from spml_fast.core import distributed
from spml_fast.core.config import Config
from spml_fast.core.errors import UserError
from spml_fast.core.precision import autocast_dtype
from spml_fast.core.progress import duration
from spml_fast.core.text import counted
from spml_fast.models.classifier import Classifier
from spml_fast.training import trials
from spml_fast.training.earlier_choices import EarlierChoices
from spml_fast.training.engine_config import micro_batch_size
from spml_fast.training.trials import Trial, step_seconds

# What compiling was seen to take (ResNet-50 and tf_efficientnet_lite0 on two cores: 26 to 70 s), and the part of the
# training that may be risked on finding out whether it pays.
USUAL_SECONDS, PART = 70.0, 0.05
# What is saved must be worth so many times what compiling takes, and a step so many times as fast.
WORTH, GAIN = 2.0, 1.05


@dataclass(frozen=True)
class CompileTimes:
    """Seconds of a forward and backward of the run's network.

    Attributes:
        images: of a timed step.
        batch: images of a rank's step in the run.
        plain: median of the rounds.
        compiled: the same.
        compiling: the first step, in which everything is compiled.
        rounds: gain of each round, plain over compiled.

    Raises:
        ValueError: times that cannot be.
    """

    images: int
    batch: int
    plain: float
    compiled: float
    compiling: float
    rounds: list[float]

    def __post_init__(self) -> None:
        times = (self.images, self.batch, self.plain, self.compiled, self.compiling, *self.rounds)
        if not (self.rounds and min(times) > 0):
            raise ValueError("times must be positive")

    @property
    def gain(self) -> float:
        """How many times as fast compiled steps are."""
        return statistics.median(self.rounds)

    def pays(self, training: float) -> bool:
        """Whether compiling is worth it in a training of so many seconds without it."""
        return self.gain >= GAIN and training * (1 - 1 / self.gain) >= WORTH * self.compiling

    def sentence(self) -> str:
        """What was measured."""
        return (
            f"a step of {counted(self.images, 'image')} takes {trials.seconds_text(self.plain)}, and compiled "
            f"{trials.seconds_text(self.compiled)} ({self.gain:.2f} times as fast); compiling takes "
            f"{trials.seconds_text(self.compiling)}"
        )


def settle_compile(
    config: Config, classifier: Classifier, earlier: EarlierChoices | None, device: torch.device, updates: int
) -> tuple[Config, list[str]]:
    """The configuration with true or false in the place of `model.compile auto`, and notes (collective).

    Args:
        config: the run's; its precision is settled.
        classifier: the network on the CPU, with what the run asks of it in training; not changed.
        earlier: of a run that has begun, which keeps them; None for another.
        device: what the ranks compute on.
        updates: of the run that train the backbone.

    Raises:
        UserError: `model.compile true` where that is not possible.
    """
    if config.model.compile is False:
        return config, []
    obstacles = distributed.gather_objects(obstacle_to_compiling(config, device))
    obstacle = next((found for found in obstacles if found is not None), None)
    if config.model.compile is True:
        if obstacle is not None:
            raise UserError(f"model.compile true cannot be used here: {obstacle}; set model.compile to false")
        return config, []
    if earlier is not None:
        chosen = earlier.compiled and obstacle is None
        notes = earlier.notes("model.compile", str(chosen).lower())
        if chosen is not earlier.compiled:
            # Another machine than it began on: it rounds differently from here on, and goes on.
            notes = [f"model.compile auto: false from here on; the run was compiled until now, but {obstacle}"]
    elif (obstacle := obstacle or obstacle_to_timing(config)) is not None:
        chosen, notes = False, [f"model.compile auto: false; {obstacle}"]
    else:
        chosen, note = distributed.from_main(lambda: _measured_choice(config, classifier, device, updates))
        notes = [f"model.compile auto: {str(chosen).lower()}; {note}"]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compile=chosen)), notes


def obstacle_to_timing(config: Config) -> str | None:
    """Why rank 0 cannot time steps by itself; None where it can."""
    if config.model.sync_bn and distributed.world_size() > 1:
        return "model.sync_bn has ranks wait for each other, so that none can time steps; model.compile true compiles"
    return None


def obstacle_to_compiling(config: Config, device: torch.device) -> str | None:
    """Why this rank cannot compile the backbone; None where it can."""
    if config.deepspeed.zero_stage == 3:
        return "deepspeed.zero_stage 3 gathers weights within the network"
    if config.model.grad_checkpointing:
        return "model.grad_checkpointing computes parts of the network again"
    return None if device.type == "cuda" or has_compiler() else "there is no C++ compiler (g++ or clang++)"


def has_compiler() -> bool:
    """Whether PyTorch finds a C++ compiler."""
    # Importing them takes seconds.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def _measured_choice(config: Config, classifier: Classifier, device: torch.device, updates: int) -> tuple[bool, str]:
    """Whether to compile, and why: half a sentence. Nothing that goes wrong here ends a run."""
    trial, dtype = trials.trial_of(config, classifier, device), autocast_dtype(config.train.precision, device)
    cache, key = trials.TimesCache("compile"), trials.trial_key(config, trial) + config.train.precision
    steps, training = config.train.accumulation * updates, 0.0

    def measure() -> CompileTimes | None:
        nonlocal training
        training = steps * plain_seconds(trial, dtype)
        return None if PART * training < USUAL_SECONDS else compile_times(trial, dtype)

    try:
        times, text = cache.times(key, CompileTimes, measure)
    except trials.FAILURES as error:
        return False, f"compiling could not be tried ({trials.what_failed(error)})"
    if times is None:
        return False, f"compiling takes about {duration(USUAL_SECONDS)}, training {duration(training)}"
    training = steps * times.plain * trial.batch / times.images
    return times.pays(training), f"{text}; training takes {duration(training)}"


def plain_seconds(trial: Trial, dtype: torch.dtype | None) -> float:
    """Seconds of a step of the run as it is, estimated from one of a few images.

    Args:
        trial: which network.
        dtype: autocast's, or None.
    """
    with trial.network() as network:
        seconds = [step_seconds(network, trial.fewest, trial.size, dtype) for _ in range(3)]
    return min(seconds) * trial.batch / trial.fewest


def compile_times(trial: Trial, dtype: torch.dtype | None) -> CompileTimes:
    """Compile a copy of a network, and time forward and backward of it and of the plain one in turn.

    Args:
        trial: which network.
        dtype: autocast's, or None.

    Raises:
        RuntimeError, MemoryError, OSError: memory ran out, or the network or the compiler fails.
    """
    try:
        with trial.network() as network:
            step_seconds(network, trial.fewest, trial.size, dtype)
            images = trials.images_of_a_step(trial, network, dtype)

            def step(*sizes: int) -> float:
                network.compiled_sizes = sizes
                return step_seconds(network, images, trial.size, dtype)

            network.compile_backbone()
            step()
            compiling = step(images)
            step(images)
            times = trials.in_turn(step, lambda: step(images))
    finally:
        # What the run compiles begins anew.
        torch._dynamo.reset()
    plain, compiled = (statistics.median(values) for values in zip(*times, strict=True))
    gains = [a / b for a, b in times]
    return CompileTimes(images, trial.batch, plain, compiled, max(compiling - compiled, 1e-3), gains)


def compiled_sizes(config: Config) -> tuple[int, ...]:
    """Images of the forwards that are compiled: of a rank's full step.

    An epoch's smaller last batch is not among them, so that nothing is compiled for it.
    """
    world = distributed.world_size()
    whole = {config.train.batch_size // (world * config.train.accumulation), micro_batch_size(config.train, world)}
    return tuple(sorted(n for n in whole if n))

"""What a run will cost: measured on its first updates, then followed."""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized

import torch

from spml_fast.core.config import TrainConfig
from spml_fast.core.progress import duration
from spml_fast.training.setup import Phase

# The first update of a phase is left out: it chooses algorithms, and the input starts with it.
WARM_UP = 1
# The measurement ends with the first update after so many seconds, or after so many updates.
ENOUGH_SECONDS, ENOUGH_UPDATES = 10.0, 200
# An image in training costs about three times its forward: the backward pass is two more products of the same size.
FORWARDS_OF_TRAINING = 3.0


class Pace:
    """Time left of a run.

    The clock is the host's. On a GPU it is read twice in a phase after waiting for the device, never in every update.

    Args:
        phases: the run's.
        updates_per_epoch: of the training split.
        train: has the size of an update.
        val: what is validated; None where nothing is.
        device: waited for when the clock is read.
        every: epochs from one validation to the next.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        updates_per_epoch: int,
        train: TrainConfig,
        val: Sized | None,
        device: torch.device,
        every: int = 1,
    ) -> None:
        self.phases, self.updates_per_epoch = list(phases), updates_per_epoch
        self.update_size, self.device = train.batch_size, device
        self.eval_images = 0.0 if val is None else len(val) / every
        self.rate: float | None = None
        self._phase: Phase | None = None
        self._updates, self._since = 0, 0.0

    def begin(self, phase: Phase) -> None:
        """A phase starts, or is resumed: measure anew."""
        self._phase, self._updates, self.rate = phase, 0, None

    def update(self, epoch: int, done: int) -> str | None:
        """An update was made; returns the line about the cost, once in a phase.

        Args:
            epoch: the present one, from 1.
            done: updates of it that are done.
        """
        if self.rate is not None:
            return None
        self._updates += 1
        if self._updates <= WARM_UP:
            self._since = self._now()
            return None
        measured = self._updates - WARM_UP
        if measured < ENOUGH_UPDATES and time.perf_counter() - self._since < ENOUGH_SECONDS:
            return None
        self.rate = measured * self.update_size / max(self._now() - self._since, 1e-9)
        return self.line(epoch, done)

    def leave_out(self, seconds: float) -> None:
        """Have time that just passed count for nothing."""
        self._since += seconds

    def measured(self, rate: float, images: int) -> str:
        """Take a rate of the present phase that was measured elsewhere; returns the line about the cost.

        Args:
            rate: in images/s.
            images: of the phase's first epoch that are done.
        """
        self.rate = rate
        return self.line(1, min(images // self.update_size, self.updates_per_epoch))

    def end_epoch(self, epoch: int, rate: float) -> str | None:
        """An epoch's own rate takes the place of what its first updates told; returns the line if it was too short.

        Args:
            epoch: the one that ended, from 1.
            rate: of its updates alone, in images/s.
        """
        first, self.rate = self.rate is None, rate
        return self.line(epoch + 1, 0) if first and self.seconds_left(epoch + 1, 0) else None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def epoch_seconds(self) -> float:
        """Seconds of an epoch of the present phase, validation included; only once there is a rate."""
        assert self.rate is not None and self._phase is not None
        return self._epoch_seconds(self._phase, self.rate)

    def _epoch_seconds(self, phase: Phase, rate: float) -> float:
        forward = rate if phase.name == "linear" else rate * FORWARDS_OF_TRAINING
        # A phase that is solved takes the features of the validation split as well, before that is scored.
        passes = 2 if phase.solved else 1
        return self.updates_per_epoch * self.update_size / rate + passes * self.eval_images / forward

    def seconds_left(self, epoch: int, done: int) -> float | None:
        """Estimated seconds to the end of training; None before there is a rate.

        Args:
            epoch: as in `update`.
            done: as in `update`.
        """
        if self.rate is None or self._phase is None:
            return None
        epochs = self._phase.epochs - epoch + 1 - done / self.updates_per_epoch
        left = epochs * self.epoch_seconds
        for phase in self.phases[self.phases.index(self._phase) + 1 :]:
            # Only the linear phase has another after it.
            left += phase.epochs * self._epoch_seconds(phase, self.rate / FORWARDS_OF_TRAINING)
        return left

    def line(self, epoch: int, done: int) -> str:
        """The line about the cost. As `update`."""
        left = self.seconds_left(epoch, done)
        assert left is not None and self.rate is not None and self._phase is not None
        kind = "an epoch of the head alone" if self._phase.name == "linear" else "an epoch"
        line = f"{self.rate:.3g} images/s: about {duration(self.epoch_seconds)} "
        line += "for the features and the validation" if self._phase.solved else kind
        line += f"; training ends in about {duration(left)}, at {clock(left)}"
        return line + (", plus the time to solve for the head" if self._phase.solved else "")


def clock(seconds: float) -> str:
    """The time of day in so many seconds: `14:05`, with its date where that is not today's."""
    now, then = time.localtime(), time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if then[:3] == now[:3] else "%H:%M on %d %B", then)

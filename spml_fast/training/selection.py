"""Which weights a run keeps: those of the highest validation mAP; and when it stops early."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spml_fast.core.text import counted


class BestScore:
    """The validation mAP so far, in percent.

    Attributes:
        best: the highest of the epochs that compete; -inf before the first.
        latest: the last one.
        of_phase: the highest of the phase.
        waited: validations of the phase since then.
    """

    def __init__(self) -> None:
        self.best = self.latest = self.of_phase = -math.inf
        self.waited = 0

    def offer(self, score: float) -> bool:
        """Take an epoch's validation mAP; returns whether its weights are to be kept.

        One that is not defined (nan) changes nothing, and its weights are kept: nothing can tell that they are worse.
        """
        if not math.isfinite(score):
            return True
        improved = score > self.best
        self.waited = 0 if score > self.of_phase else self.waited + 1
        self.of_phase = max(self.of_phase, score)
        self.best, self.latest = max(self.best, score), score
        return improved

    def has_dropped(self, points: float) -> bool:
        """Whether the last validation fell more than so many points below the best of the phase; never for 0."""
        return bool(points) and self.of_phase - self.latest > points

    def has_stalled(self, patience: int) -> bool:
        """Whether so many validations in a row were not the best of the phase; never for 0."""
        return 0 < patience <= self.waited

    def stops(self, points: float, patience: int) -> str | None:
        """Why the phase ends here, as `has_dropped` and `has_stalled` tell; None where it goes on."""
        if self.has_dropped(points):
            return f"validation mAP is {points:g} points below the best"
        if self.has_stalled(patience):
            return f"none of {counted(patience, 'validation')} in a row was the best of the phase"
        return None

    def next_phase(self, keep_best: bool) -> None:
        """Start a phase, whose epochs compete with those before (`keep_best`) or among themselves alone."""
        if not keep_best:
            self.best = -math.inf
        # When to stop is told from the phase alone: fine-tuning may need epochs to reach what the linear phase had.
        self.latest, self.of_phase, self.waited = -math.inf, -math.inf, 0

    def state(self) -> tuple[float, float, float, int]:
        """What a checkpoint keeps."""
        return self.best, self.latest, self.of_phase, self.waited

    def load_state(self, state: Sequence[float]) -> None:
        """Put `state` back. Versions before 0.2.0 kept the first two alone."""
        self.best, self.latest = state[0], state[1]
        self.of_phase, self.waited = (state[2], int(state[3])) if len(state) > 2 else (state[0], 0)

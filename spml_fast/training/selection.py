"""Which weights a run keeps: those of the highest validation mAP; and when it stops early."""

from __future__ import annotations

import math


class BestScore:
    """The validation mAP so far, in percent.

    Attributes:
        best: the highest of the phase; -inf before the first.
        latest: the last one.
    """

    def __init__(self) -> None:
        self.best = self.latest = -math.inf

    def offer(self, score: float) -> bool:
        """Take an epoch's validation mAP; returns whether its weights are to be kept.

        One that is not defined (nan) changes nothing, and its weights are kept: nothing can tell that they are worse.
        """
        if not math.isfinite(score):
            return True
        improved = score > self.best
        self.best, self.latest = max(self.best, score), score
        return improved

    def has_dropped(self, points: float) -> bool:
        """Whether the last validation fell more than so many points below the best; never for 0."""
        return bool(points) and self.best - self.latest > points

    def reset(self) -> None:
        """Forget everything, as at the start of a phase."""
        self.best = self.latest = -math.inf

    def state(self) -> tuple[float, float]:
        """What a checkpoint keeps."""
        return self.best, self.latest

    def load_state(self, state: tuple[float, float]) -> None:
        """Put `state` back."""
        self.best, self.latest = state

"""Where a run's time goes beside its updates: validation, saving, scoring of the training split, the test."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# Validation; saves between epochs and those within, which the time of the updates includes; `on_train_scores` passes;
# the choice of thresholds; the test.
PARTS = ("validation", "saving", "saving_within", "scoring", "thresholds", "test")


class Spent:
    """Seconds of each part since they were last taken, on the host's clock."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Inside, the time counts as this one of `PARTS`."""
        assert part in PARTS
        before = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - before

    def take(self) -> dict[str, float]:
        """Seconds by part, as the log names them (`validation_seconds`); counting starts anew."""
        taken, self._seconds = self._seconds, {}
        return {f"{part}_seconds": taken[part] for part in PARTS if part in taken}

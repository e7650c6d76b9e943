"""When a run saves within an epoch, and when it ends because it was asked to."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from spml_fast.core import distributed
from spml_fast.core.config import RunConfig
from spml_fast.core.errors import UserError
from spml_fast.training.agreement import Agreement
from spml_fast.training.saving import RunCheckpoints
from spml_fast.training.signals import Interrupted, StopSignals, signal_name


class SaveTimes:
    """Decides after each update whether to save: every `run.save_updates`, every `run.save_minutes`, or on a signal.

    A context manager: within it signals are noted instead of ending the process.

    Args:
        run: the run's options.
        run_dir: the run directory, for the last line.
        checkpoints: the run's, one of which may still be being written.
        program: as in `StopSignals`.

    Attributes:
        stopping: number of the signal that all ranks end for at this update; 0 while there is none.
    """

    def __init__(self, run: RunConfig, run_dir: Path, checkpoints: RunCheckpoints, program: bool) -> None:
        self._checkpoints = checkpoints
        self._updates, self._seconds = run.save_updates, run.save_minutes * 60
        self._run_dir, self._signals = run_dir, StopSignals(run.stop_seconds, program)
        self.stopping = 0

    def __enter__(self) -> SaveTimes:
        self._agreement = Agreement(3)
        # What is being written, in words, and for how many updates.
        self._writing, self._updates_written = "", 0
        self._saved = time.monotonic()
        self._signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and distributed.world_size() == 1:
                # What was under way is from before the error. Of several ranks not all may come here.
                with contextlib.suppress(UserError):
                    self._checkpoints.finish()
        finally:
            # Whatever else goes wrong, a notebook gets its signals back.
            self._signals.__exit__(kind, error, trace)
        if error is None or isinstance(error, Interrupted):
            # All ranks come here together.
            self._agreement.close()

    def _wishes(self) -> list[int]:
        """This rank's: number of the signal to end for, whether it is time to save by rank 0's clock, and whether it is
        still writing."""
        due = distributed.is_main() and 0 < self._seconds <= time.monotonic() - self._saved
        return [self._signals.number, int(due), int(self._checkpoints.busy)]

    def due(self, update: int, updates_per_epoch: int) -> bool:
        """Whether all ranks save now (collective, after every update).

        Args:
            update: updates done in this epoch.
            updates_per_epoch: of this epoch; its end has a save of its own.
        """
        stop, time_is_up, busy = self._agreement.exchange(self._wishes())
        self.stopping = self.stopping or stop
        if self._checkpoints.writing is not None:
            self._updates_written += 1
            # The first outcome is of the update at which writing began.
            if not busy and self._updates_written > 1:
                self._checkpoints.finish()
                self._written()
        regular = self._updates > 0 and update % self._updates == 0
        # Never two at once: by the clock there is time to wait until one is written.
        time_is_up = time_is_up and self._checkpoints.writing is None
        return update < updates_per_epoch and bool(self.stopping or time_is_up or regular)

    def agree(self) -> None:
        """Whether all ranks end now, told at an epoch's end, where they have time to agree (collective)."""
        self.stopping = self.stopping or self._agreement.agree(self._wishes())[0]

    def stop_between(self) -> None:
        """End if that was asked for, where there is nothing to save (collective).

        Raises:
            Interrupted: a signal came.
        """
        self.stopping = self.stopping or self._agreement.exchange(self._wishes())[0]
        self._stop()

    def _stop(self) -> None:
        if self.stopping:
            raise Interrupted(self.stopping, f"stopped by {signal_name(self.stopping)}: {self._signals.kept}")

    def begun(self, place: str) -> None:
        """Note that a checkpoint is being written.

        Args:
            place: where in training, for the last line once it is whole.
        """
        self._written()
        self._saved = time.monotonic()
        self._writing, self._updates_written = place, 0

    def _written(self) -> None:
        """Note that what was being written, if anything, is on the disk."""
        if self._writing:
            self._keep(self._writing)
        self._writing = ""

    def _keep(self, place: str) -> None:
        self._signals.kept = f"{place} is saved, and the same command with --run.dir {self._run_dir} resumes there"

    def saved(self, place: str, epoch_ends: bool) -> None:
        """Note that a checkpoint is on the disk, and end if that was asked for (collective).

        Args:
            place: where in training, for the last line.
            epoch_ends: it is the one at an epoch's end, where ranks have time to agree.

        Raises:
            Interrupted: a signal came.
        """
        self._saved = time.monotonic()
        self._keep(place)
        self._writing = ""
        if epoch_ends:
            self.agree()
        self._stop()

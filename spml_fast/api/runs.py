"""A run directory as Python objects."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from spml_fast.core.config import Config
from spml_fast.runs.open import load_run_config
from spml_fast.runs.read import read_run

if TYPE_CHECKING:
    from spml_fast.api.predictor import Predictor


class Run:
    """A run, finished or not; every file is read when it is first asked for.

    Args:
        folder: the run directory.

    Attributes:
        folder: the same as a path.

    Raises:
        UserError: the folder is no run directory, or its configuration cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files = read_run(self.folder)

    def __repr__(self) -> str:
        state = "finished" if self.results is not None else f"{len(self._files.epochs)} epochs done"
        return f"Run({str(self.folder)!r}, {state})"

    @functools.cached_property
    def config(self) -> Config:
        """The resolved configuration."""
        return load_run_config(self.folder)

    @functools.cached_property
    def metrics(self) -> pa.Table:
        """A row an epoch: `phase`, `epoch`, `loss`, `val_map` and whatever else the method reports as a number.

        Of an epoch that was repeated after an interruption the last one counts. What an epoch lacks is null.
        `to_pylist` gives dictionaries, and `to_pandas` a data frame where pandas is installed.
        """
        rows = [
            {k: v for k, v in epoch.items() if isinstance(v, int | float | str) or v is None}
            for epoch in self._files.epochs
        ]
        columns = list(dict.fromkeys(name for row in rows for name in row if name != "kind"))
        # A figure may be whole in one epoch and not in another.
        values = {name: [row.get(name) for row in rows] for name in columns}
        return pa.table({name: _column(column) for name, column in values.items()})

    @property
    def results(self) -> dict[str, Any] | None:
        """The final figures: test metrics by alpha, speed, time; None before the run is finished."""
        return self._files.results

    @property
    def classes(self) -> list[str] | None:
        """Class names in class-id order; None before training began."""
        return self._files.classes

    def load(self, device: str | None = None) -> Predictor:
        """The classifier with the best weights; see `spml_fast.load`."""
        from spml_fast.api.predictor import load_predictor

        return load_predictor(self.folder, device)


def _column(values: list[Any]) -> pa.Array:
    """A column of whole numbers, of numbers, or of text."""
    known = [v for v in values if v is not None]
    if any(isinstance(v, str) for v in known):
        return pa.array([None if v is None else str(v) for v in values], pa.string())
    if any(isinstance(v, float) for v in known):
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array(values, pa.int64())

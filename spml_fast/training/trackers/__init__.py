"""Where a run's figures are shown: one file per tracker, each of which registers itself (`run.trackers`)."""

from __future__ import annotations

import importlib
import pkgutil

from spml_fast.training.trackers.base import Tracker, get_tracker, tracker_names

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Tracker", "get_tracker", "tracker_names"]

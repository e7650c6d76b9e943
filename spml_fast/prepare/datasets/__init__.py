"""Data sets that `launch/prepare.py` can read: one file each, found by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from spml_fast.prepare.datasets.base import DATASETS, Dataset, register
from spml_fast.prepare.raw import RawDataset, RawSplit

__all__ = ["DATASETS", "Dataset", "RawDataset", "RawSplit", "load_all", "register"]


def load_all() -> dict[str, type[Dataset]]:
    """Import every file of this folder, so that each registers itself; name -> data set, in alphabetical order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(DATASETS.items())

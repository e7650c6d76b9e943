"""Data sets that `spml-fast prepare` can read: one file each in this folder, and those that others have registered."""

from __future__ import annotations

import importlib
import pkgutil

from spml_fast.prepare.datasets import base
from spml_fast.prepare.datasets.base import DATASETS, Dataset, register
from spml_fast.prepare.raw import RawDataset, RawSplit

__all__ = ["DATASETS", "Dataset", "RawDataset", "RawSplit", "load_all", "register"]


def load_all() -> dict[str, type[Dataset]]:
    """Name -> data set, in alphabetical order: those of this folder, and all that were registered from elsewhere."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(base.DATASETS.items())

"""Training methods, one file each; importing this package registers them all.

`loss(name, logits, codes, ...)` and `Loss(name, num_classes)` compute a method's loss in a notebook or another trainer,
from logits [B, C] and label codes [B, C] alone. One function for all methods, because their options have the names that
they have on the command line, and a criterion beside it, as PyTorch has them, because some keep a state; see `losses`.
"""

from __future__ import annotations

import importlib
import pkgutil

from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, get_method, method_names
from spml_fast.methods.losses import Loss, loss

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Loss",
    "LossOutput",
    "Method",
    "MethodOptions",
    "Progress",
    "get_method",
    "loss",
    "method_names",
]

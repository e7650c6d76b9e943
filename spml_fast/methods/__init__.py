"""Training methods, one file each. Importing this package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from spml_fast.methods.base import LossOutput, Method, MethodOptions, Progress, get_method, method_names

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LossOutput", "Method", "MethodOptions", "Progress", "get_method", "method_names"]

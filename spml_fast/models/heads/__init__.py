"""Heads: from the backbone's feature map to logits. One file each; importing this package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from spml_fast.models.heads.base import Head, HeadOutput, MaskOptions, get_head, head_names, make_head

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Head", "HeadOutput", "MaskOptions", "get_head", "head_names", "make_head"]

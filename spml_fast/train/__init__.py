"""The training loop: trainer, engine, optimizer, checkpoints, logs.

This folder and the function `spml_fast.train` share a name, and importing the folder puts it in the function's place.
So the folder can be called too, and does what the function does.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallableFolder(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See the function `train` in spml_fast/__init__.py."""
        from spml_fast import _train

        return _train(*args, **options)


sys.modules[__name__].__class__ = _CallableFolder

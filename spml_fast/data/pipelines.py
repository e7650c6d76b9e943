"""DALI pipelines in processes that are forked: a copy there must never be taken apart.

The end of a pipeline waits for its threads, and a forked process has none of them: it would crash or wait for ever when
the garbage collector meets a pipeline of its parent, say in a worker of PyTorch's DataLoader.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

_built: weakref.WeakSet[Any] = weakref.WeakSet()


def built(pipe: Any) -> Any:
    """Build a pipeline, and return it."""
    pipe.build()
    _built.add(pipe)
    return pipe


def _keep_for_ever() -> None:
    """In a forked process: a reference that nobody gives back."""
    for pipe in list(_built):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipe))
    _built.clear()


os.register_at_fork(after_in_child=_keep_for_ever)

"""The ways that heuristics know for an op, and how to take one of them whatever shape, card and environment say."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from spml_kernels.common import heuristics

# Op -> the variable that takes a way of it, and the name of the table of its ways in the heuristics.
WAYS = {
    "cam_pool": ("SPML_CAM_POOL", "CAM_POOL_WAYS"),
    "cam_pool_backward": ("SPML_CAM_POOL_BACKWARD", "CAM_POOL_BACKWARD_WAYS"),
    "large_loss": ("SPML_LARGE_LOSS", "LARGE_LOSS_SELECTS"),
}


def ways_of(op: str) -> list[str]:
    """Names of an op's ways; none where it has but one."""
    return sorted(getattr(heuristics, WAYS[op][1])) if op in WAYS else []


@contextlib.contextmanager
def adapted(name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, a function of the heuristics gives `change` of what it would have given, to everybody who asks it.

    Raises:
        LookupError: nobody does.
    """
    shipped = getattr(heuristics, name)
    users = [m for n, m in sys.modules.items() if n.startswith("spml_kernels.") and getattr(m, name, None) is shipped]
    if len(users) < 2:
        raise LookupError(f"no op of spml_kernels asks heuristics.{name}, so nothing would change")
    with contextlib.ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, name, lambda *a, **k: change(shipped(*a, **k))))
        yield


def chosen(op: str, way: str) -> AbstractContextManager[Any]:
    """Inside, the op takes this way whatever the shape, the card and the environment say."""
    return mock.patch.dict(os.environ, {WAYS[op][0]: way})

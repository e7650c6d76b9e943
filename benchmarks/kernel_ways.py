"""The ways that heuristics know for an op, and how to take one of them whatever shape and card say.

They are read from `spml_kernels.common.heuristics`, so that a way that is added there is swept and checked here: the
function `<op>_way` answers with a way's name, and a table `<OP>_...` may have further names as its keys.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from spml_kernels.common import heuristics

# What a heuristic may ask, and answers enough to hear all of its own.
ASKED = {
    "capability": (75, 80, 86, 89, 90, 100, 103, 120, 121),
    "version": ((3, 6, 0), (3, 7, 1), (3, 8, 0), (3, 9, 0)),
    "elements": (1 << 10, 1 << 18, 1 << 23),
    "alone": (True, False),
    "half": (True, False),
    "wide": (True, False),
    "batch": (1, 128),
    "cells": (49, 196),
    "rows": (49, 128 * 196),
    "classes": (20, 80, 5000),
    "channels": (96, 2048),
}


def ways_of(op: str) -> list[str]:
    """Names of an op's ways; none where it has but one.

    Raises:
        LookupError: its heuristic asks for what is not in `ASKED`.
    """
    choose = getattr(heuristics, f"{op}_way", None)
    if choose is None:
        return []
    names = list(inspect.signature(choose).parameters)
    unknown = [name for name in names if name not in ASKED]
    if unknown:
        raise LookupError(f"heuristics.{op}_way asks for {', '.join(unknown)}; add values of it to ASKED in {__file__}")
    found = {choose(*values) for values in itertools.product(*(ASKED[name] for name in names))}
    for name, table in vars(heuristics).items():
        if name.startswith(f"{op.upper()}_") and isinstance(table, (dict, tuple, list)):
            found |= set(table) if all(isinstance(key, str) for key in table) else set()
    return sorted(found)


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


def chosen(op: str, way: str) -> AbstractContextManager[None]:
    """Inside, the op takes this way whatever the shape and the card."""
    return adapted(f"{op}_way", lambda _: way)

"""Collectives of PyTorch and DeepSpeed, wrapped while a run is measured."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

# Of PyTorch and DeepSpeed, whichever of them there are.
COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "allgather_fn",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_fn",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


@contextlib.contextmanager
def wrapped(owner: Any, names: Sequence[str], span: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, every call of an object's functions runs within a span; afterwards they are what they were.

    Args:
        owner: a module, or an instance.
        names: of the functions; those that it does not have are passed over.
        span: makes the context of one call.
    """
    own = {name: vars(owner)[name] for name in names if name in vars(owner)}
    for name in names:
        if (function := getattr(owner, name, None)) is not None:
            setattr(owner, name, _within(function, span))
    try:
        yield
    finally:
        for name in names:
            if name in own:
                setattr(owner, name, own[name])
            elif name in vars(owner):
                delattr(owner, name)


@contextlib.contextmanager
def all_within(modules: Sequence[Any], span: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, every collective of some modules runs within a span."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(wrapped(module, COLLECTIVES, span))
        yield


def _within(function: Callable[..., Any], span: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with span():
            return function(*args, **options)

    return call

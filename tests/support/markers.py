"""Marks tests by what they do, so that a new test that trains a run is `slow` without anybody's thinking of it.

slow: starts a process (a run, several ranks, an interpreter). multirank: several processes train together.
gpu: needs a GPU. aot: compiles or interprets Triton kernels. Measured times come on top by hand: `@pytest.mark.slow`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Fixtures and helpers that start processes, and what of the standard library and PyTorch does.
STARTERS = {"run_script", "subprocess", "spawn", "start_processes", "Popen", "mp_spawn"}
RANK_WORDS = {"ranks", "nprocs", "torchrun", "rank_main", "start_processes"}
KERNELS = ("tests/kernels/aot/", "tests/kernels/test_interpreter.py")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _helpers(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """Functions and methods of the tests that a function names."""
    for code in _codes(function.__code__):
        for name in code.co_names:
            found = function.__globals__.get(name)
            if isinstance(found, types.FunctionType):
                yield found


def functions_of(item: pytest.Function) -> list[types.FunctionType]:
    """The test's function, its fixtures' functions, and the helpers that these name, directly or not."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    waiting: list[Any] = [item.function, *(f.func for fixture in fixtures for f in fixture)]
    found: dict[int, types.FunctionType] = {}
    while waiting:
        function = getattr(waiting[-1], "__func__", waiting[-1])
        waiting.pop()
        own = isinstance(function, types.FunctionType) and "/tests/" in function.__code__.co_filename
        if own and id(function) not in found:
            found[id(function)] = function
            waiting += _helpers(function)
    return list(found.values())


def words_of(function: types.FunctionType) -> set[str]:
    """Names and keywords in a function's code."""
    words = set[str]()
    for code in _codes(function.__code__):
        words |= {*code.co_names, *code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
        # A call's keywords are among the constants, one by one or as a tuple.
        for constant in code.co_consts:
            words |= {w for w in (constant if isinstance(constant, tuple) else (constant,)) if isinstance(w, str)}
    return words


def marks(item: pytest.Item, root: Path) -> set[str]:
    """Names of the markers that a test earns.

    Args:
        item: the test.
        root: the repository.
    """
    path = item.path.relative_to(root).as_posix()
    if path.startswith(KERNELS):
        return {"slow", "aot"}
    found = set[str]()
    if any(m.kwargs.get("reason") == "no GPU" for m in item.iter_markers("skipif")):
        found.add("gpu")
    if not isinstance(item, pytest.Function):
        return found
    functions = functions_of(item)
    words = set[str]().union(*map(words_of, functions))
    if STARTERS & ({*item.fixturenames} | words):
        found.add("slow")
        # The shared helpers offer several ranks to everybody; a test file asks for them or does not.
        asked = [words_of(f) for f in functions if Path(f.__code__.co_filename).name.startswith("test_")]
        call = getattr(item, "callspec", None)
        chosen = call.params if call else {}
        several = chosen["ranks"] > 1 if "ranks" in chosen else RANK_WORDS & set[str]().union(*asked)
        if several or "torchrun" in chosen.values():
            found.add("multirank")
    return found

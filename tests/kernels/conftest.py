"""Where Triton kernels run: on a GPU where there is one, else under Triton's interpreter in a process of its own.

TRITON_INTERPRET must be in the environment before triton is imported, which another test may have done already. So
`test_interpreter.py` starts the test_triton_*.py files again with the variable set, and here they are left out of
every process that could neither interpret nor compile.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETER or torch.cuda.is_available() else ["test_triton_*.py"]


@functools.cache
def _languages(function: types.FunctionType) -> tuple[str, ...]:
    """Modules of Triton's language that a jit function sees by a name of its own."""
    seen = {value.__name__ for value in function.__globals__.values() if isinstance(value, types.ModuleType)}
    return tuple(sorted(seen & {"triton.language", "triton.language.core"}))


class _LanguageScope:
    """Stands for Triton's own scope of a launch, in which names of its language mean what the interpreter does.

    Triton sets all of them again for each jit function that a kernel calls, which is half of the time of these tests;
    here that is done once in a launch.
    """

    done: ClassVar[set[tuple[str, ...]]] = set()

    def __init__(self, make: Callable[[Any], Any], function: types.FunctionType) -> None:
        seen = _languages(function)
        self.own = None if seen in self.done else make(function)
        self.done.add(seen)

    def restore(self) -> None:
        """The end of a launch."""
        self.done.clear()
        if self.own is not None:
            self.own.restore()


@pytest.fixture(scope="session", autouse=True)
def _one_language_scope_a_launch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETER:
            from triton.runtime import interpreter

            # Versions of Triton whose interpreter has no such scopes are left as they are.
            if hasattr(interpreter, "_LangPatchScope"):
                patch.setattr(interpreter, "_patch_lang", functools.partial(_LanguageScope, interpreter._patch_lang))
        yield


@pytest.fixture
def device() -> str:
    """Where tensors of kernel tests live."""
    return "cpu" if INTERPRETER else "cuda"


@pytest.fixture
def triton_on(monkeypatch):
    """Kernels on, and memory from torch.empty full of NaN (or the largest integer), so that nothing stays unwritten."""
    monkeypatch.setenv("SPML_KERNELS", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)

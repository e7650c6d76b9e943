"""Where Triton kernels run: on a GPU where there is one, else under Triton's interpreter in a process of its own.

TRITON_INTERPRET must be in the environment before triton is imported, which another test may have done already. So
`test_interpreter.py` starts the test_triton_*.py files again with the variable set, and here they are left out of
every process that could neither interpret nor compile.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETER or torch.cuda.is_available() else ["test_triton_*.py"]


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

"""How much memory a method's state may take."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
import torch

from spml_fast.core.errors import UserError
from spml_fast.methods.state import memory
from spml_fast.methods.state.memory import free_gib, require_memory

MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nBuffers:  4 kB\n"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def meminfo(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    """Let the kernel's file say this; None for a machine without one."""

    def read(path: str, **_: Any) -> io.StringIO:
        assert path == "/proc/meminfo"
        if text is None:
            raise FileNotFoundError(path)
        return io.StringIO(text)

    monkeypatch.setattr(memory, "open", read, raising=False)


def test_free_memory_is_what_the_kernel_calls_available(monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(monkeypatch, MEMINFO)
    assert free_gib() == 8.0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_gib() == 2.0


@pytest.mark.parametrize("text", [None, "MemTotal: 33554432 kB\n"])
def test_without_that_line_it_is_all_memory(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    meminfo(monkeypatch, text)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    assert free_gib() == pytest.approx(whole, rel=1e-12)


def test_state_may_take_half_of_it_or_what_the_option_says(monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo(monkeypatch, MEMINFO)
    require_memory("the table", 4 * 2**30, None, "method.memory_limit")
    with pytest.raises(UserError, match=r"^the table needs 4\.1 GiB .*half of the free memory allows 4\.0 GiB;"):
        require_memory("the table", 4.1 * 2**30, None, "method.memory_limit")
    require_memory("the table", 6 * 2**30, 6.0, "method.memory_limit")
    with pytest.raises(UserError, match=r"needs 6\.1 GiB on every rank, and method\.memory_limit allows 6\.0 GiB;"):
        require_memory("the table", 6.1 * 2**30, 6.0, "method.memory_limit")


def test_on_a_gpu_it_is_the_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 80 * 2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_gib() == 3.0, "a rank has its GPU to itself"

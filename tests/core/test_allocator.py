"""Memory that malloc keeps: pages of a freed tensor are there for the next one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from spml_fast.core import env
from spml_fast.core.allocator import keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")

BLOCK = 8 << 20
TURNS = 80
# Page faults of blocks that are made, written and freed one after the other; mallopt is for a whole process.
PROGRAM = f"""
import resource, sys
import torch
from spml_fast.core.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
torch.ones({BLOCK}, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TURNS}):
    torch.ones({BLOCK}, dtype=torch.uint8)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str, **variables: str) -> tuple[str, int]:
    """What the function answered in a new process, and how many pages were touched for the first time."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env=clean | variables, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


def test_pages_are_kept_for_the_next_tensor() -> None:
    # glibc raises its own limit up to 32 MB, so that it is held where a program begins.
    usual = page_faults("leave", MALLOC_MMAP_THRESHOLD_="131072")[1]
    pages = TURNS * BLOCK // os.sysconf("SC_PAGE_SIZE")
    assert usual > 0.9 * pages
    kept, faults = page_faults("keep")
    assert kept == "True"
    # A few more than those of one block: what else is allocated meanwhile lies between.
    assert faults < 0.2 * pages


def test_the_users_own_setting_stays() -> None:
    kept, faults = page_faults("keep", MALLOC_MMAP_THRESHOLD_="131072")
    assert kept == "False"
    assert faults > 0.9 * TURNS * BLOCK // os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=1", True),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0", False),
        ("MALLOC_MMAP_MAX_", "0", True),
        ("MALLOC_MMAP_THRESHOLD_", "131072", True),
        ("MALLOC_TRIM_THRESHOLD_", "131072", True),
        ("MALLOC_TOP_PAD_", "0", True),
        ("MALLOC_ARENA_MAX", "1", False),
    ],
)
def test_what_counts_as_a_choice(monkeypatch: pytest.MonkeyPatch, name: str, value: str, given: bool) -> None:
    for variable in [v for v in os.environ if v.startswith("MALLOC_") or v == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv(name, value)
    assert env.malloc_given() is given


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False

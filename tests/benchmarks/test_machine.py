"""What a machine is called in tables."""

from __future__ import annotations

import pytest

from benchmarks.machine import processor

CPUINFO = (
    "processor\t: 0\nmodel name\t: A {name}\nflags\t\t: fpu {flags} sse\n\nprocessor\t: 1\nmodel name\t: Another\n"
)


@pytest.mark.parametrize(
    "flags, called",
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "AMX"),
        ("avx2 avx512f avx512_bf16", "AVX512-BF16"),
        ("avx avx2 avx512f", "AVX-512"),
        ("avx avx2", "AVX2"),
    ],
)
def test_processors_of_one_name_differ(flags: str, called: str) -> None:
    assert processor(CPUINFO.format(name="CPU", flags=flags), "x86_64") == f"A CPU ({called})"


def test_processors_without_a_name_or_such_instructions() -> None:
    assert processor("processor : 0\nFeatures : fp asimd bf16\n", "aarch64") == "aarch64 (NEON with bf16)"
    assert processor(CPUINFO.format(name="CPU", flags="avx"), "x86_64") == "A CPU"
    assert processor("", "riscv64") == "riscv64"

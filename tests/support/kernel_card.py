"""A card that is none, for the machinery of the kernel benchmark: everything but the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.kernel_card import Card, KernelTime, tensor_bytes

CEILINGS = {"copy": 1000.0, "bf16": 100.0, "fp16": 100.0, "fp32": 50.0}


class Cpu(Card):
    """Runs what it is given on the CPU, and makes up how long it took."""

    device = "cpu"

    def __init__(self) -> None:
        self.broken = False

    def synchronize(self) -> None:
        """Raise what a broken card raises."""
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def spin(self) -> None:
        """Nothing to wait for."""

    def times(self, function: Callable[[], Any]) -> dict[str, float]:
        """One run."""
        function()
        return {"p20": 1.0, "p50": 2.0, "p80": 3.0}

    def graph_times(self, function: Callable[[], Any]) -> dict[str, float]:
        """There are none."""
        raise RuntimeError("no graphs here")

    def enqueue(self, function: Callable[[], Any]) -> float:
        """One run."""
        function()
        return 7.0

    def pair(self, one: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
        """One run of each."""
        one()
        other()
        return {"pair_p50": 3.0, "pair_other_p50": 2.0, "pair_ratio": 1.5}

    def kernels(self, function: Callable[[], Any], calls: int = 5) -> list[KernelTime]:
        """Two kernels."""
        function()
        return [KernelTime("long", 1.0, 20.0), KernelTime("short", 2.0, 3.0)]

    def peak(self, function: Callable[[], Any]) -> tuple[float, float]:
        """A megabyte."""
        return 1.0, 1.0 - tensor_bytes(function()) / 1e6

    def free(self) -> None:
        """Nothing to give back."""

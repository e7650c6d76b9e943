"""The GPU of a process as the benchmark sees it: its clock, its memory, its ceilings, its kernels."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUANTILES = [0.2, 0.5, 0.8]
# Bytes of the tensor that is copied to find the copy rate, and edge of the product that finds the product rate.
COPY_BYTES = 2**31
PRODUCT_EDGE = 8192
# Bytes that are written between timed calls, so that a call finds nothing of the last one in the level-2 cache.
FLUSH_BYTES = 2**28
# Milliseconds of products before a row is timed on a card that has waited this many seconds, for a compiler perhaps: it
# runs at a fraction of its clock then.
SPIN_MS = 300.0
IDLE_SECONDS = 0.1
# Calls whose enqueuing is timed at a time: few, for a full queue would make the host wait for the card.
ENQUEUED = 8
# Seconds of two functions that are timed in turn.
PAIR_SECONDS = 0.4


class KernelTime(NamedTuple):
    """One kernel of a call.

    Attributes:
        name: as the card's profiler has it.
        launches: of one call.
        us: microseconds of all of them.
    """

    name: str
    launches: float
    us: float


class Card:
    """The GPU of this process."""

    device = "cuda"

    def __init__(self) -> None:
        self.testing = importlib.import_module("triton.testing")
        self._operand: Tensor | None = None
        self._busy = 0.0

    def synchronize(self) -> None:
        """Wait for the card; raises what went wrong on it."""
        torch.cuda.synchronize()

    def spin(self) -> None:
        """Keep the card busy until its clock is up, if it has been waiting."""
        if time.perf_counter() < self._busy + IDLE_SECONDS:
            return
        if self._operand is None:
            self._operand = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        stop = time.perf_counter() + SPIN_MS / 1000
        while time.perf_counter() < stop:
            for _ in range(10):
                torch.mm(self._operand, self._operand)
            self.synchronize()

    def times(self, function: Callable[[], Any]) -> dict[str, float]:
        """p20, p50, p80 in ms, with launch gaps and a cold level-2 cache."""
        self.spin()
        times = self.testing.do_bench(function, quantiles=QUANTILES)
        self._busy = time.perf_counter()
        return dict(zip(("p20", "p50", "p80"), times, strict=True))

    def graph_times(self, function: Callable[[], Any]) -> dict[str, float]:
        """The same as a CUDA graph: no launch gaps, a warm cache."""
        self.spin()
        times = self.testing.do_bench_cudagraph(function, quantiles=QUANTILES)
        self._busy = time.perf_counter()
        return dict(zip(("graph_p20", "graph_p50", "graph_p80"), times, strict=True))

    def enqueue(self, function: Callable[[], Any]) -> float:
        """Microseconds of the host for one call: what it takes to put a call's kernels into the card's queue."""
        taken = []
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(ENQUEUED):
                function()
            taken.append((time.perf_counter() - start) / ENQUEUED)
        self.synchronize()
        return 1e6 * statistics.median(taken)

    def pair(self, one: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
        """Two functions in turn, A B A B, cold cache: the median of each in ms, and that of the turns' ratios.

        A clock that moves while they run moves both.
        """
        self.spin()
        flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=self.device)
        events: list[list[Any]] = []
        stop = time.perf_counter() + PAIR_SECONDS
        while time.perf_counter() < stop or len(events) < 5:
            turn = []
            for function in (one, other):
                flush.zero_()
                turn += [torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)]
                turn[-2].record()
                function()
                turn[-1].record()
            self.synchronize()
            events.append(turn)
        self._busy = time.perf_counter()
        times = [(a.elapsed_time(b), c.elapsed_time(d)) for a, b, c, d in events]
        return {
            "pair_p50": statistics.median(a for a, _ in times),
            "pair_other_p50": statistics.median(b for _, b in times),
            "pair_ratio": statistics.median(a / b for a, b in times),
        }

    def kernels(self, function: Callable[[], Any], calls: int = 5) -> list[KernelTime]:
        """Kernels of one call by the time they take, the mean of a few calls: one pass of PyTorch's profiler."""
        function()
        self.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                function()
            self.synchronize()
        found = [e for e in profile.key_averages() if e.self_device_time_total > 0]
        rows = [KernelTime(e.key, e.count / calls, e.self_device_time_total / calls) for e in found]
        return sorted(rows, key=lambda row: -row.us)

    def peak(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Megabytes allocated at most during a call, and those beyond what it returns."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return peak / 1e6, (peak - tensor_bytes(results)) / 1e6

    def workspace(self) -> float:
        """Megabytes that cuBLAS keeps on this device once it has multiplied; `peak` leaves them out."""
        operand = torch.randn(1024, 1024, device=self.device, dtype=torch.bfloat16)
        torch.mm(operand, operand)
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()
        return (before - torch.cuda.memory_allocated()) / 1e6

    def free(self) -> None:
        """Give cached memory back."""
        torch.cuda.empty_cache()

    def _copy_rate(self) -> float:
        source = torch.empty(COPY_BYTES // 4, device=self.device).normal_()
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / 1e6 / self.times(lambda: target.copy_(source))["p50"]

    def ceilings(self) -> dict[str, float]:
        """GB/s of a copy (bytes read and written) and TFLOP/s of large products, as this card does them now."""
        self.spin()
        rates = {"copy": self._copy_rate()}
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            a, b = (torch.randn(PRODUCT_EDGE, PRODUCT_EDGE, device=self.device, dtype=dtype) for _ in range(2))
            rates[name] = 2 * PRODUCT_EDGE**3 / 1e9 / self.times(functools.partial(torch.mm, a, b))["p50"]
        torch.set_float32_matmul_precision(precision)
        self.free()
        return rates


def tensor_bytes(results: Any) -> int:
    """Bytes of the tensors among nested results."""
    if isinstance(results, Tensor):
        return results.numel() * results.element_size()
    return sum(tensor_bytes(r) for r in results) if isinstance(results, (tuple, list)) else 0

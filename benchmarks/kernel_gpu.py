"""Timing the ops on a GPU: one process an op, so that a kernel that breaks the card's context costs one row.

The parent (`run`) measures nothing. A worker gates and times the works of one op in turn and appends a line of JSON for
every event; when it dies, the parent records the work it died at and starts another one behind it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_base import KernelWork, make_call, upstreams
from benchmarks.kernel_report import KEY, Row, merge_csv
from benchmarks.kernel_works import works

QUANTILES = [0.2, 0.5, 0.8]
# Bytes of the tensor that is copied to find the copy rate, and edge of the product that finds the product rate.
COPY_BYTES = 2**31
PRODUCT_EDGE = 8192
# Seconds that a worker may take beyond its time, to finish what it is at.
PATIENCE = 60.0


class Card:
    """The GPU of this process: its clock, its memory, its ceilings."""

    device = "cuda"

    def __init__(self) -> None:
        self.testing = importlib.import_module("triton.testing")

    def synchronize(self) -> None:
        """Wait for the card; raises what went wrong on it."""
        torch.cuda.synchronize()

    def times(self, function: Callable[[], Any]) -> dict[str, float]:
        """p20, p50, p80 in ms, with launch gaps and a cold level-2 cache."""
        return dict(zip(("p20", "p50", "p80"), self.testing.do_bench(function, quantiles=QUANTILES), strict=True))

    def graph_times(self, function: Callable[[], Any]) -> dict[str, float]:
        """The same as a CUDA graph: no launch gaps, a warm cache."""
        times = self.testing.do_bench_cudagraph(function, quantiles=QUANTILES)
        return dict(zip(("graph_p20", "graph_p50", "graph_p80"), times, strict=True))

    def peak(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Megabytes allocated at most during a call, and those beyond what it returns."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return peak / 1e6, (peak - _size(results)) / 1e6

    def free(self) -> None:
        """Give cached memory back."""
        torch.cuda.empty_cache()

    def _copy_rate(self) -> float:
        source = torch.empty(COPY_BYTES // 4, device=self.device).normal_()
        target = torch.empty_like(source)
        return 2 * COPY_BYTES / 1e6 / self.times(lambda: target.copy_(source))["p50"]

    def ceilings(self) -> dict[str, float]:
        """GB/s of a copy (bytes read and written) and TFLOP/s of large products, as this card does them now."""
        rates = {"copy": self._copy_rate()}
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
            a, b = (torch.randn(PRODUCT_EDGE, PRODUCT_EDGE, device=self.device, dtype=dtype) for _ in range(2))
            rates[name] = 2 * PRODUCT_EDGE**3 / 1e9 / self.times(functools.partial(torch.mm, a, b))["p50"]
        torch.set_float32_matmul_precision(precision)
        self.free()
        return rates


def _size(results: Any) -> int:
    """Bytes of the tensors among nested results."""
    if isinstance(results, Tensor):
        return results.numel() * results.element_size()
    return sum(_size(r) for r in results) if isinstance(results, (tuple, list)) else 0


def gate(work: KernelWork, inputs: list[Tensor]) -> float:
    """Largest relative error (root mean squares) of the fused op against fp64, values and gradients.

    Raises:
        AssertionError: it is larger than the work allows.
    """
    low = [t.detach().requires_grad_(i < work.leaves) for i, t in enumerate(inputs)]
    high = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    high = [t.requires_grad_(i < work.leaves) for i, t in enumerate(high)]
    values, exact = work.providers["fused"](*low), work.exact(*high)
    results, wanted = list(values), list(exact)
    if work.leaves:
        heads, exact_heads = work.differentiable(values), work.differentiable(exact)
        start = upstreams(heads)
        results += torch.autograd.grad(heads, low[: work.leaves], start)
        wanted += torch.autograd.grad(exact_heads, high[: work.leaves], [s.double() for s in start])
    worst = 0.0
    for place, (a, b) in enumerate(zip(results, wanted, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
        allowed = (work.value_tolerance or work.tolerance) if place < len(values) else work.tolerance
        if not error <= allowed:
            raise AssertionError(f"result {place} is off by {error:.3g} (rms, relative), allowed {allowed:.3g}")
        worst = max(worst, error)
    return worst


def measure(
    card: Card, work: KernelWork, provider: str, mode: str, inputs: list[Tensor], ceilings: dict[str, float]
) -> Row:
    """One row with its times; exceptions pass."""
    function = make_call(work, provider, mode, inputs)
    for _ in range(3):
        function()
    card.synchronize()
    row: Row = {"op": work.op, "shape": work.shape, "provider": provider, "mode": mode, "status": "ok"}
    row |= card.times(function)
    peak, extra = card.peak(function)
    if mode == "step" and provider != "matmul":
        # The values live until their gradients are made; they are outputs too. Made as by `fwd`, so that torch.compile
        # needs no third version of its function.
        with torch.no_grad():
            extra -= _size(work.providers[provider](*inputs)) / 1e6
    row |= {"peak_mb": peak, "extra_mb": max(extra, 0.0), "cam_mb": work.cam / 1e6, "has_backward": bool(work.leaves)}
    bytes_ = work.floor["step"] - work.floor["fwd"] if mode == "bwd" else work.floor[mode]
    flops = work.flops.get(mode, 0.0)
    row |= {"bytes": int(bytes_), "gb_s": bytes_ / 1e6 / row["p50"], "tflop_s": flops / 1e9 / row["p50"]}
    kind = "fp32" if work.products == 3 else work.shape.split()[0]
    row["copy"] = row["gb_s"] / ceilings["copy"]
    row["matmul"] = work.products * row["tflop_s"] / ceilings[kind] if flops else 0.0
    return row


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _failed(work: KernelWork, provider: str, mode: str, reason: str) -> Row:
    return {"op": work.op, "shape": work.shape, "provider": provider, "mode": mode, "status": f"FAILED {reason}"}


def bench_work(card: Card, work: KernelWork, ceilings: dict[str, float], late: Callable[[], bool]) -> Iterator[Row]:
    """Rows of one work, the gate's first; rows with graph times come a second time, to take the place of the first.

    What fails gives a row that says so; a broken card raises.
    """
    with contextlib.suppress(AttributeError):
        torch._dynamo.reset()
    inputs = work.inputs(card.device)
    passed = True
    try:
        error = gate(work, inputs)
        print(f"gate {work.name}: {error:.1e}", flush=True)
        yield {
            "op": work.op,
            "shape": work.shape,
            "provider": "fused",
            "mode": "gate",
            "status": "passed",
            "error": error,
        }
    except Exception as problem:
        passed = False
        yield _failed(work, "fused", "gate", _first_line(problem))
        card.synchronize()
    card.free()
    rows = []
    for provider, mode in itertools.product(work.providers, work.modes):
        if provider == "fused" and not passed:
            continue
        if late():
            yield _failed(work, provider, mode, "no time left")
            continue
        try:
            row = measure(card, work, provider, mode, inputs, ceilings)
            rows.append(row)
            yield row
        except Exception as problem:
            yield _failed(work, provider, mode, _first_line(problem))
            card.synchronize()
        card.free()
    # Captures come last, since one that fails may leave the allocator in disorder. The backward alone runs on a graph
    # that was recorded outside, which a capture cannot hold.
    for row in (r for r in rows if r["mode"] != "bwd"):
        try:
            row |= card.graph_times(make_call(work, row["provider"], row["mode"], inputs))
        except Exception as problem:
            row["note"] = f"no CUDA graph: {_first_line(problem)}"
            card.synchronize()
        yield row


def show(row: Row) -> None:
    """One line on the screen."""
    text = f"{row['op']:<18}{row['shape']:<44}{row['provider']:<9}{row['mode']:<7}"
    if row["status"] != "ok":
        print(text + row["status"], flush=True)
        return
    text += (
        f"{row['p50']:>9.4f} ms{row.get('graph_p50', float('nan')):>10.4f}{row['gb_s']:>7.0f} GB/s{row['copy']:>5.0%}"
    )
    print(text + f"{row['tflop_s']:>6.0f} TF/s{row['matmul']:>5.0%}{row['extra_mb']:>9.1f} MB", flush=True)


def work_through(
    card: Card,
    kernel_works: list[KernelWork],
    first: int,
    events: Path,
    table: Path,
    facts: dict[str, Any],
    seconds: float,
) -> None:
    """The worker: gate and time `kernel_works[first:]`, a line of JSON per event, the table after every work."""
    # A backward that is run again must keep what it reads.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    stop = time.monotonic() + seconds
    with events.open("a", encoding="utf-8") as file:

        def say(event: dict[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        for place in range(first, len(kernel_works)):
            say({"begun": place})
            rows = []
            for row in bench_work(card, kernel_works[place], facts["ceilings"], lambda: time.monotonic() > stop):
                row |= facts["machine"]
                say({"row": row})
                rows.append(row)
                # Once each, and the op itself again with its graph times.
                if row["status"] != "passed" and (row["provider"] == "fused" or "graph_p50" not in row):
                    show(row)
            merge_csv(table, rows)
            say({"done": place})
            card.free()


def _events(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a worker's file."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            events.append(json.loads(line))
    return events


def run(
    ops: list[str], small: bool, table: Path, facts: dict[str, Any], seconds: float, worker: list[str]
) -> list[Row]:
    """The parent: all rows of all ops, whatever their workers do.

    Args:
        ops, small: as for `works`.
        table: CSV file.
        facts: `ceilings` and `machine` of the card.
        seconds: time for everything.
        worker: command line of a worker; its op, first work, event file, facts and seconds are added.
    """
    stop = time.monotonic() + seconds
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for op in ops:
            try:
                kernel_works, first = works([op], small), 0
            except Exception as problem:
                rows.append(
                    {"op": op, "shape": "", "provider": "", "mode": "", "status": f"FAILED {_first_line(problem)}"}
                )
                continue
            while first < len(kernel_works):
                left = stop - time.monotonic()
                if left <= 0:
                    rows += [_failed(w, "fused", "worker", "no time left") for w in kernel_works[first:]]
                    break
                events = Path(folder) / f"{op}_{first}.jsonl"
                events.touch()
                given = json.dumps({"op": op, "first": first, "events": str(events), "seconds": left, **facts})
                reason = ""
                try:
                    done = subprocess.run([*worker, given], timeout=left + PATIENCE)
                    reason = f"worker ended with status {done.returncode}" if done.returncode else ""
                except subprocess.TimeoutExpired:
                    reason = "worker took too long"
                seen = _events(events)
                rows += [e["row"] for e in seen if "row" in e]
                finished = [e["done"] for e in seen if "done" in e]
                begun = [e["begun"] for e in seen if "begun" in e]
                if not reason and len(finished) == len(kernel_works) - first:
                    break
                place = begun[-1] if begun else first
                lost = (
                    _failed(kernel_works[place], "fused", "worker", reason or "worker stopped early") | facts["machine"]
                )
                # What the worker had measured of this work is in its events, and not yet in the table.
                merge_csv(table, [*(e["row"] for e in seen if "row" in e and e["row"]["shape"] == lost["shape"]), lost])
                rows.append(lost)
                show(lost)
                first = place + 1
    # The last of equal ones has the graph times.
    return list({tuple(row[k] for k in KEY): row for row in rows}.values())

"""Timing the ops on a GPU in processes of their own, so that a kernel that breaks the card's context costs one row.

The parent (`run`) measures nothing. A worker gates and times works in turn and appends a line of JSON for every event;
when it dies, the parent records the work it died at and starts another one behind it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from spml_kernels.common.jit import HAVE_TRITON, triton
from torch import Tensor

from benchmarks.kernel_base import KernelWork, forget_compiled, make_call
from benchmarks.kernel_card import Card, tensor_bytes
from benchmarks.kernel_gate import gate
from benchmarks.kernel_report import KERNEL_KEY, KEY, Row, kernel_table, merge_csv
from benchmarks.kernel_works import works

# Seconds that a worker may take beyond its time, to finish what it is at.
PATIENCE = 60.0


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
    row["enqueue_us"] = card.enqueue(function)
    peak, extra = card.peak(function)
    if mode == "step" and provider != "matmul":
        # The values live until their gradients are made; they are outputs too. Made as by `fwd`, so that torch.compile
        # needs no third version of its function.
        with torch.no_grad():
            extra -= tensor_bytes(work.providers[provider](*inputs)) / 1e6
    row |= {"peak_mb": peak, "extra_mb": max(extra, 0.0), "cam_mb": work.cam / 1e6, "has_backward": bool(work.leaves)}
    bytes_ = work.floor["step"] - work.floor["fwd"] if mode == "bwd" else work.floor[mode]
    flops = work.flops.get(mode, 0.0)
    row |= {"bytes": int(bytes_), "gb_s": bytes_ / 1e6 / row["p50"], "tflop_s": flops / 1e9 / row["p50"]}
    kind = "fp32" if work.products == 3 else work.shape.split()[0]
    row["copy"] = row["gb_s"] / ceilings["copy"]
    row["matmul"] = work.products * row["tflop_s"] / ceilings[kind] if flops else 0.0
    return row


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception, for a row."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _failed(work: KernelWork, provider: str, mode: str, reason: str) -> Row:
    row = {"op": work.op, "shape": work.shape, "provider": work.variant or provider, "mode": mode}
    return {**row, "status": f"FAILED {reason}"}


def bench_work(card: Card, work: KernelWork, ceilings: dict[str, float], late: Callable[[], bool]) -> Iterator[Row]:
    """Rows of one work, the gate's first; rows with more times come a second time, to take the place of the first.

    Rows that have `kernel` are the profiler's: one kernel of a provider's call. What fails gives a row that says so; a
    broken card raises.
    """
    with work.around():
        yield from _bench_work(card, work, ceilings, late)


def _bench_work(card: Card, work: KernelWork, ceilings: dict[str, float], late: Callable[[], bool]) -> Iterator[Row]:
    forget_compiled()
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
        yield _failed(work, "fused", "gate", first_line(problem))
        card.synchronize()
    card.free()
    rows = []
    for provider, mode in work.rows:
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
            yield _failed(work, provider, mode, first_line(problem))
            card.synchronize()
        card.free()
    yield from _closer_looks(card, work, rows, inputs, late)


def _closer_looks(
    card: Card, work: KernelWork, rows: list[Row], inputs: list[Tensor], late: Callable[[], bool]
) -> Iterator[Row]:
    """Turns against the bare product, kernels one by one, CUDA graphs: `rows` again with what was found."""
    for row in itertools.takewhile(lambda _: not late(), rows):
        try:
            if row["provider"] == "fused" and "matmul" in work.providers:
                calls = [make_call(work, name, row["mode"], inputs) for name in ("fused", "matmul")]
                row |= card.pair(*calls)
                yield row
            if row["mode"] in (work.main_mode, "fwd"):
                for place, kernel in enumerate(card.kernels(make_call(work, row["provider"], row["mode"], inputs))):
                    yield {k: row[k] for k in KEY} | {"kernel": place} | kernel._asdict()
        except Exception as problem:
            row["note"] = f"no closer look: {first_line(problem)}"
            yield row
            card.synchronize()
        card.free()
    # Captures come last, since one that fails may leave the allocator in disorder. The backward alone runs on a graph
    # that was recorded outside, which a capture cannot hold; a CUDA graph of a CUDA graph there is not.
    graphs = [r for r in rows if r["mode"] != "bwd" and not r["provider"].endswith("_graphs")]
    for row in itertools.takewhile(lambda _: not late(), graphs):
        try:
            row |= card.graph_times(make_call(work, row["provider"], row["mode"], inputs))
        except Exception as problem:
            row["note"] = f"no CUDA graph: {first_line(problem)}"
            card.synchronize()
        yield row


def show(row: Row) -> None:
    """One line on the screen."""
    text = f"{row['op']:<18}{row['shape']:<44}{row['provider']:<15}{row['mode']:<7}"
    if row["status"] != "ok":
        print(text + row["status"], flush=True)
        return
    text += f"{row['p50']:>9.4f} ms{row.get('graph_p50', float('nan')):>10.4f}{row['enqueue_us']:>7.0f} us"
    text += f"{row['gb_s']:>7.0f} GB/s{row['copy']:>5.0%}"
    print(text + f"{row['tflop_s']:>6.0f} TF/s{row['matmul']:>5.0%}{row['extra_mb']:>9.1f} MB", flush=True)


def prepare_process() -> None:
    """What processes that compile and processes that time must have in common, or one would not find what another made.

    The environment chooses neither the reference nor a way of an op; Triton's files are in one place, although inductor
    moves it once it is loaded; and compiled backwards keep what they read, since they are run again.
    """
    os.environ["SPML_KERNELS"] = "auto"
    for name in ("SPML_CAM_POOL", "SPML_CAM_POOL_BACKWARD", "SPML_LARGE_LOSS"):
        os.environ.pop(name, None)
    if HAVE_TRITON:
        os.environ.setdefault("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False


def work_through(
    card: Card,
    kernel_works: list[KernelWork],
    first: int,
    events: Path,
    table: Path,
    facts: dict[str, Any],
    seconds: float,
) -> None:
    """The worker: gate and time `kernel_works[first:]`; a line of JSON per event, and the tables after every row."""
    prepare_process()
    stop = time.monotonic() + seconds
    with events.open("a", encoding="utf-8") as file:

        def say(event: dict[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        for place in range(first, len(kernel_works)):
            say({"begun": place})
            shown: set[tuple[Any, ...]] = set()
            kernels: list[Row] = []
            for row in bench_work(card, kernel_works[place], facts["ceilings"], lambda: time.monotonic() > stop):
                row = {**row, **facts["machine"]}
                if kernel_works[place].variant:
                    row["provider"] = kernel_works[place].variant
                key = tuple(row[k] for k in KEY)
                # Kernels of a call together, for a table is replaced whole.
                if kernels and ("kernel" not in row or key != tuple(kernels[0][k] for k in KEY)):
                    merge_csv(kernel_table(table), kernels, key=KERNEL_KEY, whole=KEY)
                    kernels = []
                if "kernel" in row:
                    kernels.append(row)
                    continue
                say({"row": row})
                merge_csv(table, [row])
                # Once each, and the op itself again with its graph times.
                again = row["provider"] == "fused" and "graph_p50" in row
                if row["status"] != "passed" and (key not in shown or again):
                    show(row)
                shown.add(key)
            if kernels:
                merge_csv(kernel_table(table), kernels, key=KERNEL_KEY, whole=KEY)
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
    ops: list[str],
    small: bool,
    table: Path,
    facts: dict[str, Any],
    seconds: float,
    worker: list[str],
    shapes: list[str] | None = None,
) -> list[Row]:
    """The parent: all rows of all ops, whatever their workers do.

    Args:
        ops, small, shapes: as for `works`.
        table: CSV file.
        facts: `ceilings` and `machine` of the card.
        seconds: time for everything.
        worker: command line of a worker; its ops, first work, event file, facts and seconds are added.
    """
    stop = time.monotonic() + seconds
    rows: list[Row] = []
    kernel_works: list[KernelWork] = []
    known = []
    for op in ops:
        try:
            kernel_works += works([op], small, shapes)
            known.append(op)
        except Exception as problem:
            row = {"op": op, "shape": "", "provider": "", "mode": "", "status": f"FAILED {first_line(problem)}"}
            rows.append({**row, **facts["machine"]})
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        while first < len(kernel_works):
            left = stop - time.monotonic()
            if left <= 0:
                late = [_failed(w, "fused", "worker", "no time left") for w in kernel_works[first:]]
                rows += [{**row, **facts["machine"]} for row in late]
                break
            events = Path(folder) / f"{first}.jsonl"
            events.touch()
            given = json.dumps({"ops": known, "first": first, "events": str(events), "seconds": left, **facts})
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
            lost = _failed(kernel_works[place], "fused", "worker", reason or "worker stopped early") | facts["machine"]
            merge_csv(table, [lost])
            rows.append(lost)
            show(lost)
            first = place + 1
    # The last of equal ones has the graph times.
    return list({tuple(row[k] for k in KEY): row for row in rows}.values())

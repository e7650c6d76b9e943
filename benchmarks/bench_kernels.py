"""The fused ops against their PyTorch forms: correctness first, then time, bytes and memory.

    python benchmarks/bench_kernels.py [--quick] [--json OUT] [--ops cam_pool label_loss ...] [--sweep] [--aot]

Providers, each forward (fwd) and forward with backward (step):

    eager      the PyTorch reference
    compile    torch.compile of the reference
    chunked    cam_pool alone: the vendor's matrix products over chunks of classes that fit in cache
    matmul     cam_pool alone: bare matrix products of its size (one for fwd, three for step), the floor
    fused      the Triton kernels

On a GPU every shape first passes a gate: values and gradients of the fused op against fp64, or the script stops with
status 1 and reports nothing. All shapes of an op are warmed before any is timed. `bench` times include launch gaps and
start with a cold level-2 cache (triton's do_bench), `graph` times have neither (do_bench_cudagraph); p20, p50, p80 in
milliseconds. `bytes` is what an op must move at least (inputs and outputs once, saved tensors written and read), GB/s
is bytes over the p50, `copy` the share of this card's measured copy rate, `TFLOP/s` of the matrix products that an op
cannot do without. cam_pool runs with dense signs and with one positive cell in a hundred: half the cells of a fiftieth
of a picture's classes, scattered.

Rows go to benchmarks/results/<gpu>.csv with GPU, torch, triton and commit; rows of the same key are replaced.
Without a GPU only the references run, rows are marked cpu, nothing is written but --json, and no kernel is timed: times
under Triton's interpreter would say nothing. --sweep times other block sizes of cam_pool. --aot compiles every kernel
for sm_80, sm_90 and sm_100, which needs no GPU, and prints registers, spills and load widths.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from spml_kernels import label_loss, label_rows, large_loss_step  # noqa: E402
from spml_kernels.cam_pool import cam_pool  # noqa: E402
from spml_kernels.chunked import cam_pool_chunked  # noqa: E402
from spml_kernels.jit import HAVE_TRITON, triton  # noqa: E402
from spml_kernels.reference.cam_pool import cam_pool_reference  # noqa: E402
from spml_kernels.reference.label_loss import label_loss_reference  # noqa: E402
from spml_kernels.reference.label_rows import label_rows_reference  # noqa: E402
from spml_kernels.reference.large_loss import (  # noqa: E402
    large_loss_reference,
    list_selected_reference,
    select_large_reference,
)

KEY = ("op", "shape", "provider", "mode", "gpu")


@dataclass
class Work:
    """One op at one shape.

    Attributes:
        op, shape: names of the row.
        inputs: tensors of the call; the first `leaves` of them get gradients.
        leaves: 0 for an op without gradient.
        providers: name -> function of the inputs; returns the tensors that gradients flow from, or any tensors.
        exact: the reference, for the gate.
        bytes_fwd, bytes_step: what must be moved at least.
        flops_fwd, flops_step: of matrix products that must be done.
        tolerance: of the gate, largest relative error of root mean squares.
    """

    op: str
    shape: str
    inputs: list[Tensor]
    leaves: int
    providers: dict[str, Callable[..., tuple[Tensor, ...]]]
    exact: Callable[..., tuple[Tensor, ...]]
    bytes_fwd: float
    bytes_step: float
    flops_fwd: float = 0.0
    flops_step: float = 0.0
    tolerance: float = 1e-5


def size(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def cam_inputs(
    batch: int, side: int, channels: int, classes: int, dtype: torch.dtype, sparse: bool, device: str
) -> list[Tensor]:
    """Features (positive, as after a ReLU), weights and bias.

    Sparse: all but a few classes of a picture are negative everywhere, and those are positive in half of their cells,
    so that one cell in a hundred is positive. Dense: about half of them, in no order.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    draw = {"generator": generator, "device": device}
    features = torch.randn(batch, side, side, channels, **draw)
    weight = torch.randn(classes, channels, **draw) / channels**0.5
    bias = torch.zeros(classes, device=device)
    if sparse:
        # One channel per group of classes switches them on in a fiftieth of the pictures.
        bias -= 8.0
        groups = min(50, channels, classes)
        for group in range(groups):
            weight[group::groups, group] = 4.0
            features[..., group] = 0.0
            chosen = torch.arange(group % batch, batch, 50, device=device)
            features[chosen, : max(side // 2, 1), :, group] = 4.0
    return [features.to(dtype), weight.to(dtype), bias]


def cam_works(shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, device: str) -> Iterator[Work]:
    """cam_pool with dense and with sparse signs."""
    for (batch, side, channels, classes), sparse in itertools.product(shapes, (False, True)):
        inputs = cam_inputs(batch, side, channels, classes, dtype, sparse, device)
        features, weight, _ = inputs
        rows = batch * side * side
        flops = 2.0 * rows * classes * channels
        outputs = 2 * batch * classes * 4
        signs = rows * classes / 8
        cells, operand = features.reshape(rows, channels), weight
        out = torch.empty(rows, classes, dtype=dtype, device=device) if device != "cpu" else None

        def matmul(x: Tensor, w: Tensor, b: Tensor, cells=cells, operand=operand, out=out) -> tuple[Tensor, ...]:
            return (torch.mm(cells, operand.T, out=out),)

        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        density = "sparse" if sparse else "dense"
        yield Work(
            "cam_pool",
            f"{name} B {batch} HW {side}x{side} K {channels} C {classes} {density}",
            inputs,
            3,
            {
                "eager": lambda *t: cam_pool_reference(*t, True),
                "compile": torch.compile(lambda *t: cam_pool_reference(*t, True), dynamic=False),
                "chunked": cam_pool_chunked,
                "matmul": matmul,
                "fused": lambda *t: cam_pool(*t),
            },
            lambda *t: cam_pool_reference(*t, True),
            size(*inputs) + outputs,
            3 * size(*inputs) + 2 * outputs + 2 * signs,
            flops,
            3 * flops,
            1e-2 if dtype != torch.float32 else 1e-4,
        )


def loss_inputs(rows: int, classes: int, device: str) -> list[Tensor]:
    """Logits and codes: one observed positive a row, everything else unknown."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, device=device) * 2 - 3
    codes = torch.full((rows, classes), -1, dtype=torch.int8, device=device)
    codes[torch.arange(rows, device=device), torch.arange(rows, device=device) % classes] = 1
    return [logits, codes]


def label_loss_works(shapes: list[tuple[int, int]], device: str) -> Iterator[Work]:
    """Assume-negative and asymmetric loss."""
    from spml_fast.methods.asl import AsymmetricLoss
    from spml_fast.methods.assume_negative import AN_POINT

    for (rows, classes), (point, params) in itertools.product(
        shapes, ((AN_POINT, ()), (AsymmetricLoss.point, (0.0, 4.0, 0.05, 1e-8, 0.0)))
    ):
        inputs = loss_inputs(rows, classes, device)

        def reference(z: Tensor, codes: Tensor, point=point, params=params) -> tuple[Tensor, ...]:
            return (label_loss_reference(z, codes, point.reference, params),)

        def fused(z: Tensor, codes: Tensor, point=point, params=params) -> tuple[Tensor, ...]:
            return (label_loss(z, codes, point, params),)

        least = size(*inputs)
        yield Work(
            "label_loss",
            f"{point.name} {rows} x {classes}",
            inputs,
            1,
            {"eager": reference, "compile": torch.compile(reference, dynamic=False), "fused": fused},
            reference,
            least,
            least + 3 * size(inputs[0]),
        )


def large_loss_works(shapes: list[tuple[int, int]], device: str) -> Iterator[Work]:
    """Selection of one per cent, loss, gradient and list."""
    for rows, classes in shapes:
        inputs = loss_inputs(rows, classes, device)
        k_max = max(rows * classes // 100, 1)
        k = torch.tensor(k_max, device=device)

        def reference(z: Tensor, codes: Tensor, k=k, k_max=k_max) -> tuple[Tensor, ...]:
            selected, _ = select_large_reference(z, codes, k, k_max, "exact", lambda t: t[None], 0)
            list_selected_reference(selected, k_max)
            return (large_loss_reference(z, codes, selected, "reject"),)

        def fused(z: Tensor, codes: Tensor, k=k, k_max=k_max) -> tuple[Tensor, ...]:
            return (large_loss_step(z, codes, k, k_max, "reject").loss,)

        # Three histograms, the counts and the last pass read everything once each; what must be: once.
        least = size(*inputs) + rows * classes + 8 * k_max
        yield Work(
            "large_loss",
            f"{rows} x {classes} k {k_max}",
            inputs,
            1,
            {"eager": reference, "compile": torch.compile(reference, dynamic=False), "fused": fused},
            reference,
            least,
            least + 3 * size(inputs[0]),
        )


def label_rows_works(shapes: list[tuple[int, int]], device: str) -> Iterator[Work]:
    """Six listed labels a sample, of 100,000 samples."""
    for rows, classes in shapes:
        samples, listed = 100_000, 6
        generator = torch.Generator(device=device).manual_seed(0)
        indptr = torch.arange(0, samples * listed + 1, listed, device=device)
        ids = torch.randint(0, classes, (samples * listed,), generator=generator, device=device).to(torch.int16)
        # Equal classes within a row would make the result depend on the order of writes.
        ids = ((ids.view(-1, listed)[:, :1].int() + torch.arange(listed, device=device)) % classes).to(torch.int16)
        codes = torch.randint(0, 2, (samples * listed,), generator=generator, device=device, dtype=torch.int8)
        index = torch.randint(0, samples, (rows,), generator=generator, device=device)
        inputs = [indptr, ids.flatten(), codes, index]

        def reference(*t: Tensor, classes=classes, listed=listed) -> tuple[Tensor, ...]:
            return (label_rows_reference(*t, classes, -1, listed),)

        def fused(*t: Tensor, classes=classes, listed=listed) -> tuple[Tensor, ...]:
            return (label_rows(*t, classes, -1, listed),)

        yield Work(
            "label_rows",
            f"{rows} x {classes}",
            inputs,
            0,
            {"eager": reference, "compile": torch.compile(reference, dynamic=False), "fused": fused},
            reference,
            rows * (classes + 8 + 16 + 3 * listed),
            0,
        )


def all_works(ops: list[str], quick: bool, device: str) -> Iterator[Work]:
    """The shapes that matter; a few small ones without a GPU or with --quick."""
    small = quick or device == "cpu"
    if "cam_pool" in ops:
        if device == "cpu":
            yield from cam_works([(4, 7, 96, 80)], torch.float32, device)
        else:
            shapes = [(128, 14, 2048, 80), (128, 14, 2048, 5000)]
            if not small:
                shapes += [(16, 14, 2048, 20), (64, 16, 768, 81), (128, 7, 1280, 312), (512, 7, 2048, 80)]
                shapes += [(32, 32, 512, 5000), (64, 14, 2048, 9605), (1, 14, 2048, 5000), (128, 8, 96, 10)]
            yield from cam_works(shapes, torch.bfloat16, device)
            yield from cam_works(shapes[:1], torch.float32, device)
            if not small:
                yield from cam_works(shapes[:2], torch.float16, device)
    tables = [(16, 80), (128, 80)] if small else [(16, 20), (16, 80), (128, 81), (512, 312), (128, 5000), (512, 9605)]
    if small and device != "cpu":
        tables.append((128, 5000))
    if "label_loss" in ops:
        yield from label_loss_works(tables, device)
    if "large_loss" in ops:
        yield from large_loss_works(tables, device)
    if "label_rows" in ops:
        yield from label_rows_works(tables, device)


def upstreams(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients to start from, of the outputs' shapes, neither 0 nor 1."""
    generator = torch.Generator(device=outputs[0].device).manual_seed(1)
    return [
        torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float32).to(t.dtype) for t in outputs
    ]


def make_step(work: Work, provider: str) -> Callable[[], Any]:
    """Forward and backward of one provider on leaves of its own."""
    function = work.providers[provider]
    if provider == "matmul":
        features, weight = work.inputs[0].flatten(0, 2), work.inputs[1]
        cam = torch.zeros(len(features), len(weight), dtype=features.dtype, device=features.device)

        def products() -> tuple[Tensor, Tensor, Tensor]:
            return torch.mm(features, weight.T, out=cam), cam @ weight, cam.T @ features

        cam.normal_()
        return products
    inputs = [t.detach().requires_grad_(i < work.leaves) for i, t in enumerate(work.inputs)]
    start = upstreams(function(*inputs))

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs[: work.leaves], start)

    return step


def make_forward(work: Work, provider: str) -> Callable[[], Any]:
    """Forward alone, nothing kept for a backward."""
    function, inputs = work.providers[provider], [t.detach() for t in work.inputs]

    def forward() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return forward


def gate(work: Work) -> str:
    """Largest relative error of the fused op against fp64, values and gradients; raises when it is too large."""
    function = work.providers["fused"]
    low = [t.detach().requires_grad_(i < work.leaves) for i, t in enumerate(work.inputs)]
    values = function(*low)
    start = upstreams(values)
    found = [*values, *(torch.autograd.grad(values, low[: work.leaves], start) if work.leaves else ())]
    high = [t.detach().double() if t.is_floating_point() else t for t in work.inputs]
    high = [t.requires_grad_(i < work.leaves) for i, t in enumerate(high)]
    exact = work.exact(*high)
    wanted = [
        *exact,
        *(torch.autograd.grad(exact, high[: work.leaves], [s.double() for s in start]) if work.leaves else ()),
    ]
    worst = 0.0
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        a, b = a.detach().double(), b.detach().double()
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))
        if not error <= work.tolerance:
            raise AssertionError(f"{work.op} {work.shape}: result {place} is off by {error:.3g} (rms, relative)")
        worst = max(worst, error)
    return f"{worst:.1e}"


def times_gpu(function: Callable[[], Any]) -> dict[str, float]:
    """p20, p50, p80 in ms, plain and as a CUDA graph (NaN where it cannot be captured), and peak memory in MB."""
    testing = importlib.import_module("triton.testing")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    quantiles = [0.2, 0.5, 0.8]
    row = dict(zip(("p20", "p50", "p80"), testing.do_bench(function, quantiles=quantiles), strict=True))
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph = testing.do_bench_cudagraph(function, quantiles=quantiles)
    except RuntimeError:
        graph = [float("nan")] * 3
    return row | dict(zip(("graph_p20", "graph_p50", "graph_p80"), graph, strict=True)) | {"peak_mb": peak}


def times_cpu(function: Callable[[], Any], budget: float = 0.3) -> dict[str, float]:
    """p20, p50, p80 in ms of wall time."""
    function()
    spent: list[float] = []
    while len(spent) < 5 or (sum(spent) < budget and len(spent) < 200):
        start = time.perf_counter()
        function()
        spent.append(time.perf_counter() - start)
    cuts = statistics.quantiles(spent, n=10)
    return {"p20": cuts[1] * 1e3, "p50": statistics.median(spent) * 1e3, "p80": cuts[7] * 1e3}


def copy_rate() -> float:
    """GB/s of a device-to-device copy of 2 GB, bytes read and written."""
    testing = importlib.import_module("triton.testing")
    source = torch.empty(2**29, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * size(source) / 1e6 / testing.do_bench(lambda: target.copy_(source), return_mode="median")


def commit() -> str:
    """Short hash of the checked-out commit, with + when files differ from it."""
    try:
        run = lambda *words: subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: E731
        return run("git", "rev-parse", "--short", "HEAD") + ("+" if run("git", "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def show(row: dict[str, Any]) -> None:
    """One line on the screen."""
    text = f"{row['op']:<11}{row['shape']:<46}{row['provider']:<9}{row['mode']:<5}{row['p50']:>9.4f} ms"
    if "graph_p50" in row:
        text += f"{row['graph_p50']:>10.4f}{row['gb_s']:>9.0f} GB/s{row['copy']:>6.0%}{row['tflop_s']:>8.0f} TF/s"
        text += f"{row['peak_mb']:>9.1f} MB"
    print(text, flush=True)


def ratios(rows: list[dict[str, Any]]) -> None:
    """Fused against every rival, per shape."""
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["mode"]), {})[row["provider"]] = row["p50"]
    print("\nfused against each rival: how many times faster (below 1: slower); matmul: fused over its floor")
    for (op, shape, mode), found in groups.items():
        if "fused" not in found:
            continue
        words = [
            f"{name} {time / found['fused']:.2f}x" for name, time in found.items() if name not in ("fused", "matmul")
        ]
        if "matmul" in found:
            words.append(f"matmul {found['fused'] / found['matmul']:.2f}x")
            goal = 1.15 if mode == "fwd" else 1.30
            if "C 5000" in shape and "B 128" in shape and "dense" in shape and found["fused"] > goal * found["matmul"]:
                words.append(f"MISSES {goal}x")
        if found["fused"] > found.get("compile", float("inf")):
            words.append("SLOWER THAN COMPILE")
        print(f"{op:<11}{shape:<46}{mode:<5}{', '.join(words)}")


def write_csv(rows: list[dict[str, Any]], gpu: str) -> Path:
    """Rows merged into the card's table by key."""
    path = ROOT / "benchmarks" / "results" / (re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + "_kernels.csv")
    path.parent.mkdir(exist_ok=True)
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(r[k] for k in KEY): r for r in csv.DictReader(file)}
    table |= {tuple(str(r[k]) for k in KEY): r for r in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table.values())
    return path


def bench(ops: list[str], quick: bool) -> list[dict[str, Any]]:
    """All rows."""
    gpu = torch.cuda.is_available() and HAVE_TRITON
    device = "cuda" if gpu else "cpu"
    name = torch.cuda.get_device_name() if gpu else "cpu"
    machine = {
        "gpu": name,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAVE_TRITON else "none",
        "commit": commit(),
    }
    print(", ".join(f"{k} {v}" for k, v in machine.items()), f"python {platform.python_version()}")
    if not gpu:
        print("no GPU: only the PyTorch references run, on the CPU; no kernel is timed (rows marked cpu)")
    top = copy_rate() if gpu else float("nan")
    if gpu:
        print(f"copy {top:.0f} GB/s\n{'':<71}{'bench p50':>12}{'graph':>10}")
    rows = []
    for op in ops:
        works = list(all_works([op], quick, device))
        if gpu:
            for work in works:
                print(f"gate {work.op} {work.shape}: {gate(work)}", flush=True)
                torch.cuda.empty_cache()
        for work in works:
            providers = list(work.providers) if gpu else ["eager"]
            for provider, mode in itertools.product(providers, ("fwd", "step") if work.leaves else ("fwd",)):
                try:
                    function = (make_forward if mode == "fwd" else make_step)(work, provider)
                    for _ in range(3):
                        function()
                    found = times_gpu(function) if gpu else times_cpu(function)
                except torch.OutOfMemoryError:
                    print(f"{work.op:<11}{work.shape:<46}{provider:<9}{mode:<5} out of memory")
                    continue
                least = work.bytes_fwd if mode == "fwd" else work.bytes_step
                flops = work.flops_fwd if mode == "fwd" else work.flops_step
                row = {"op": work.op, "shape": work.shape, "provider": provider, "mode": mode, **found}
                row |= {"bytes": int(least), "gb_s": least / 1e6 / found["p50"]}
                row |= {"copy": row["gb_s"] / top, "tflop_s": flops / 1e9 / found["p50"], **machine}
                rows.append(row)
                show(row)
            if gpu:
                torch.cuda.empty_cache()
    return rows


def sweep() -> None:
    """Other block sizes of cam_pool's kernels at the largest shape, dense signs."""
    from spml_kernels.heuristics import Tiles

    module = importlib.import_module("spml_kernels.cam_pool")
    ours = module._launch
    testing = importlib.import_module("triton.testing")
    for batch, side, channels, classes in ((128, 14, 2048, 5000), (128, 14, 2048, 80)):
        work = next(cam_works([(batch, side, channels, classes)], torch.bfloat16, "cuda"))
        shipped = ours(batch, side * side, classes, channels, work.inputs[0])
        tries = [("shipped", shipped)]
        for rows, wide, depth, warps, stages in itertools.product((128, 256), (64, 128), (32, 64), (4, 8), (3, 4)):
            for slices in (2, 4):
                tiles = Tiles(rows, wide, depth, warps, stages)
                tries.append((f"forward {tiles} slices {slices}", shipped._replace(forward=tiles, slices=slices)))
        for which, across, warps, stages in itertools.product(
            ("d_features", "d_weight"), (128, 256), (4, 8), (2, 3, 4)
        ):
            tiles = getattr(shipped, which)._replace(channels=across, warps=warps, stages=stages)
            tries.append((f"{which} {tiles}", shipped._replace(**{which: tiles})))
        for name, launch in tries:
            module._launch = lambda *a, launch=launch: launch
            try:
                found = [
                    testing.do_bench(make(work, "fused"), return_mode="median") for make in (make_forward, make_step)
                ]
                print(f"C {classes}: fwd {found[0]:.4f} step {found[1]:.4f} ms  {name}", flush=True)
            except Exception as error:
                print(f"C {classes}: {type(error).__name__} {name}", flush=True)
        module._launch = ours


def ahead_of_time(ops: list[str], quick: bool) -> list[dict[str, Any]]:
    """Compile every kernel at its main shapes for GPUs that are not there."""
    from spml_kernels.aot import ARCHITECTURES, cases, compile_case

    rows = []
    for arch in (90,) if quick else ARCHITECTURES:
        for case in cases(arch):
            if not any(case.op.startswith(op) for op in (*ops, "large", "list")):
                continue
            report = compile_case(case, arch)
            row = {
                "op": case.op,
                "shape": case.shape,
                "arch": arch,
                **vars(report),
                "occupancy": report.occupancy(arch),
            }
            rows.append(row)
            loads = " ".join(f"{width}b:{count}" for width, count in report.loads.items())
            print(
                f"sm_{arch} {case.op:<17}{case.shape:<40} registers {report.registers:>3} stack {report.stack} "
                f"shared {report.shared:>6} loads {loads} {' '.join(report.matrix)} threads {row['occupancy']:.0%}",
                flush=True,
            )
    print(f"{len(rows)} compiled, {sum(r['stack'] > 0 for r in rows)} with spills")
    return rows


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ops = ["cam_pool", "label_loss", "large_loss", "label_rows"]
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops)
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--sweep", action="store_true", help="time other block sizes of cam_pool (needs a GPU)")
    parser.add_argument("--aot", action="store_true", help="compile for sm_80, sm_90, sm_100 (needs no GPU)")
    options = parser.parse_args()
    if options.aot:
        if not HAVE_TRITON:
            print("triton is not installed", file=sys.stderr)
            return 2
        rows = ahead_of_time(options.ops, options.quick)
    elif options.sweep:
        if not torch.cuda.is_available():
            print("--sweep needs a GPU", file=sys.stderr)
            return 2
        sweep()
        return 0
    else:
        try:
            rows = bench(options.ops, options.quick)
        except AssertionError as error:
            print(f"gate failed, nothing is reported: {error}", file=sys.stderr)
            return 1
        ratios(rows)
        if torch.cuda.is_available() and rows:
            print(f"written to {write_csv(rows, torch.cuda.get_device_name())}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

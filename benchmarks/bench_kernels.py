"""The fused ops against their PyTorch forms: bytes without a GPU, times with one.

    python benchmarks/bench_kernels.py [--ops cam_pool label_loss ...] [--quick] [--json OUT] [--results DIR]
                                       [--bytes] [--seconds N] [--commit C] [--sweep] [--aot]

Without a GPU (or with --bytes): for every op and shape, forward (fwd) and forward with backward (step), what the fused
op and PyTorch move and launch. Bytes are distinct bytes read and bytes written by every launch, PyTorch operations
within an op included; `floor` is the least that any kernels must move, `eager` the same count for what one would write
in PyTorch. Nothing runs: kernels' bytes come from formulas of their arguments, which the tests compare with what
Triton's interpreter really reads and writes. Registers, spills and occupancy are of the machine code for sm_90 (the
most registers, the least occupancy of the op's kernels). The last columns are the time that bytes and matrix products
allow on a card by its public peak numbers: a bound, no measurement. Nothing here is a speed.
Rows and a plot go to benchmarks/results/no_gpu_kernels.csv and .png.

With a GPU: providers

    eager      PyTorch, products in the features' type
    compile    torch.compile of it
    chunked    cam_pool alone: the vendor's matrix products over chunks of classes that fit in cache
    matmul     cam_pool alone: bare matrix products of its size (one fwd, two bwd, three step), the goal's measure
    fused      the Triton kernels

each forward (fwd), backward (bwd) and both (step). Every shape first passes a gate: values and gradients of the fused
op against fp64; where it fails the fused op is not timed and its row says why. `p50` (p20, p80) are of triton's
do_bench: launch gaps included, level-2 cache cold; `graph_p50` of do_bench_cudagraph: no gaps, cache warm. GB/s is the
floor's bytes over p50, `copy` and `matmul` the shares of the copy and product rates measured on this card. `extra_mb`
is peak memory beyond outputs and gradients. cam_pool runs with dense signs and with one positive cell in a hundred:
half the cells of a fiftieth of an image's classes, scattered. Every op runs in a process of its own, so that one that
breaks the card's context costs its own rows. Rows go to benchmarks/results/<gpu>_kernels.csv after every shape, with
GPU, torch, triton and commit, rows of the same key replaced; a plot lies beside it. Goals met and missed are in the
rows (`goal`) and at the end. --seconds stops in time and says what is missing; a shape may take a minute
longer.

Exit status 0; 1 when something failed, did not pass its gate or was not reached; 2 when the request cannot be served.

--sweep times other block sizes of cam_pool (needs a GPU). --aot compiles every kernel for sm_80, sm_90 and sm_100 and
prints registers, spills and load widths (needs no GPU).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from spml_kernels.cam_pool.tiles import launch_of  # noqa: E402
from spml_kernels.common import heuristics  # noqa: E402
from spml_kernels.common.heuristics import CamPoolLaunch, CamPoolTiles  # noqa: E402
from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED, triton  # noqa: E402
from spml_kernels.devtools.aot import ARCHITECTURES, Case, Report, compile_case  # noqa: E402
from spml_kernels.devtools.cases import cases  # noqa: E402
from spml_kernels.devtools.counting import Launch, Moved, count, total  # noqa: E402
from spml_kernels.devtools.traffic import moved  # noqa: E402

from benchmarks.kernel_gpu import Card, run, work_through  # noqa: E402
from benchmarks.kernel_report import RESULTS, Row, commit, judge, merge_csv, plot_bytes, plot_times  # noqa: E402
from benchmarks.kernel_works import OPS, KernelWork, cam_work, make_call, method_cases, works  # noqa: E402


class Peak(NamedTuple):
    """Public peak numbers of a card: GB/s of memory, TFLOP/s of dense products in half precision and in tf32."""

    memory: float
    half: float
    tf32: float


# NVIDIA's data sheets, without sparsity: A100 SXM 80 GB, H100 SXM, H200 SXM, B200 (HGX, one of eight).
CARDS = {
    "A100": Peak(2039, 312, 156),
    "H100": Peak(3350, 989, 494),
    "H200": Peak(4800, 989, 494),
    "B200": Peak(8000, 2250, 1120),
}


def machine(gpu: str, known: str | None = None) -> Row:
    """What a row was made with; `known` is the commit where git is not at hand."""
    version = triton.__version__ if HAVE_TRITON else "none"
    return {"gpu": gpu, "torch": torch.__version__, "triton": version, "commit": known or commit()}


# ---- without a GPU


def launches_of(work: KernelWork, provider: str, mode: str) -> list[Launch]:
    """What one call of a provider launches, on meta tensors."""
    with mock.patch.dict(os.environ, SPML_KERNELS="triton" if provider == "fused" else "reference"):
        return count(make_call(work, provider, mode, work.inputs("meta")))


def case_of(launch: Launch) -> Case:
    """The launch as an ahead-of-time compile, specialised as Triton would: multiples of 16, and ones, are constants."""
    types: dict[str, str | tuple[str, ...]] = {}
    constants: dict[str, Any] = {}
    aligned = []
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1"}
    names |= {torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
    constexpr = {p.name for p in launch.kernel.params if p.is_constexpr}
    for name in launch.kernel.arg_names:
        value = launch.arguments[name]
        if name in constexpr or value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{names[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, tuple):
            types[name] = ("fp32",) * len(value)
        elif isinstance(value, int):
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            types[name] = "fp32"
    options = launch.arguments
    warps, stages = options.get("num_warps", 4), options.get("num_stages", 3)
    return Case(launch.name, "", launch.kernel, types, constants, tuple(aligned), warps, stages)


class Compiler:
    """Machine code of launches; equal ones are compiled once."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.reports: dict[str, Report] = {}

    def report(self, launch: Launch) -> Report:
        """Registers and the like of one launch."""
        case = case_of(launch)
        key = repr(
            (case.op, sorted(case.types.items()), sorted(case.constants.items(), key=repr), case.aligned, case.warps)
        )
        if key not in self.reports:
            self.reports[key] = compile_case(case, self.arch)
        return self.reports[key]


def bound_us(work: KernelWork, bytes_: float, mode: str, card: Peak) -> float:
    """Microseconds that bytes and products take at a card's peak; whichever is longer."""
    rate = card.tf32 if work.products == 3 else card.half
    return max(bytes_ / card.memory / 1e3, work.products * work.flops.get(mode, 0.0) / rate / 1e6)


def traffic_row(work: KernelWork, mode: str, compiler: Compiler | None) -> Row:
    """Bytes, launches and machine code of one op at one shape."""
    fused, eager = launches_of(work, "fused", mode), launches_of(work, "eager", mode)
    kernels = [launch for launch in fused if launch.kernel is not None]
    ours, theirs = total(fused, moved), total(eager)
    row: Row = {"op": work.op, "shape": work.shape, "mode": mode, "provider": "fused" if kernels else "no kernel yet"}
    row |= {"floor_bytes": int(work.floor[mode]), "fused_bytes": ours.least, "eager_bytes": theirs.least}
    row |= {"fused_reads": ours.read, "kernel_launches": len(kernels)}
    row |= {"fused_launches": len(fused), "eager_launches": len(eager)}
    row |= {"kernel_bytes": total(kernels, moved).least if kernels else Moved().least}
    if compiler is not None and kernels:
        reports = [compiler.report(launch) for launch in kernels]
        row |= {"registers": max(r.registers for r in reports), "spills": sum(r.spills for r in reports)}
        row |= {"occupancy": min(r.occupancy(compiler.arch) for r in reports), "arch": compiler.arch}
    return row | {f"{name}_us": bound_us(work, ours.least, mode, card) for name, card in CARDS.items()}


def bytes_table(ops: list[str], small: bool, compiler: Compiler | None) -> list[Row]:
    """All rows, printed as they come."""
    print("no times here: bytes and launches by formula, machine code for sm_90, and bounds by public peak numbers")
    cards = "".join(f"{name:>9}" for name in CARDS)
    titles = f"{'':<70}{'floor':>9}{'fused':>9}{'eager MB':>9}{'launches':>12}{'regs':>6}{'spills':>7}{'occ.':>6}"
    print(f"{titles}   bound us{cards}")
    rows = []
    # Bytes do not depend on the signs.
    for work in (w for w in works(ops, small) if not w.shape.endswith(" sparse")):
        for mode in ("fwd", "step") if work.leaves else ("fwd",):
            row = traffic_row(work, mode, compiler)
            rows.append(row)
            text = f"{row['op']:<18}{row['shape']:<47}{mode:<5}"
            text += "".join(f"{row[k] / 1e6:>9.3f}" for k in ("floor_bytes", "fused_bytes", "eager_bytes"))
            text += f"{row['fused_launches']:>6}{row['eager_launches']:>6}"
            text += f"{row.get('registers', ''):>6}{row.get('spills', ''):>7}"
            text += f"{row['occupancy']:>6.0%}" if "occupancy" in row else " " * 6
            print(text + " " * 11 + "".join(f"{row[f'{name}_us']:>9.2f}" for name in CARDS), flush=True)
    return rows


# ---- machine code


def ahead_of_time(ops: list[str], quick: bool) -> list[Row]:
    """Compile every kernel at its main shapes for GPUs that are not there."""
    rows = []
    for arch in (90,) if quick else ARCHITECTURES:
        for case in (*cases(arch), *method_cases(arch)):
            if not any(case.op.startswith(op.split("_")[0]) for op in ops):
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
            loads = " ".join(f"{width}b:{number}" for width, number in report.loads.items())
            print(
                f"sm_{arch} {case.op:<22}{case.shape:<44} registers {report.registers:>3} stack {report.stack} "
                f"shared {report.shared:>6} loads {loads} {' '.join(report.matrix)} threads {row['occupancy']:.0%}",
                flush=True,
            )
    print(f"{len(rows)} compiled, {sum(r['stack'] > 0 for r in rows)} with spills")
    return rows


# ---- other block sizes


@contextlib.contextmanager
def launched(launch: CamPoolLaunch) -> Iterator[None]:
    """cam_pool with these block sizes, whatever the shape."""
    with contextlib.ExitStack() as stack:
        for name in ("cam_pool.forward", "cam_pool.backward"):
            # By module name: the package's attribute of that name is the function.
            module = importlib.import_module(f"spml_kernels.{name}")
            stack.enter_context(mock.patch.object(module, "launch_of", lambda *_: launch))
        # The forward asks for this alone, to know what the backward wants.
        stack.enter_context(mock.patch.object(heuristics, "SKIP_FROM", 0 if launch.skip_empty_tiles else 2**40))
        yield


def sweep(card: Card, results: Path, seconds: float, small: bool, known: str | None) -> int:
    """Other block sizes of cam_pool's kernels at two shapes, dense signs; the best are printed last.

    Nothing is compared with fp64 here: sizes that are taken over into `heuristics.py` meet the gate and the tests.
    """
    os.environ["SPML_KERNELS"] = "auto"
    stop, facts = time.monotonic() + seconds, machine(torch.cuda.get_device_name(), known)
    table = results / f"{file_name(facts['gpu'])}_sweep.csv"
    rows: list[Row] = []
    for classes in (5000,) if small else (5000, 80):
        work = cam_work(128, 14, 2048, classes, torch.bfloat16)
        inputs = work.inputs(card.device)
        shipped = launch_of(inputs[0], classes)
        tries = [("shipped", "fwd", shipped), ("shipped", "bwd", shipped)]
        other = shipped._replace(skip_empty_tiles=not shipped.skip_empty_tiles)
        tries.append(
            (f"mean part {'with skipped squares' if other.skip_empty_tiles else 'in one product'}", "bwd", other)
        )
        for rows_, wide, warps, stages in itertools.product((128, 256), (64, 128, 256), (4, 8), (3, 4)):
            if rows_ * wide > 128 * 256 or (rows_ * wide == 128 * 256 and warps == 4):
                continue
            tiles = CamPoolTiles(rows_, wide, shipped.forward.channels, warps, stages)
            tries.append((f"forward {tuple(tiles)}", "fwd", shipped._replace(forward=tiles, slices=rows_ // 64)))
        for which in ("d_features", "d_weight"):
            for across, warps, stages in itertools.product((64, 128, 256), (4, 8), (2, 3)):
                tiles = getattr(shipped, which)._replace(channels=across, warps=warps, stages=stages)
                tries.append((f"{which} {tuple(tiles)}", "bwd", shipped._replace(**{which: tiles})))
        for name, mode, launch in tries:
            row: Row = {"op": "cam_pool", "shape": work.shape, "provider": name, "mode": mode, **facts}
            if time.monotonic() > stop:
                row["status"] = "no time left"
            else:
                with launched(launch):
                    try:
                        row |= {**card.times(make_call(work, "fused", mode, inputs)), "status": "ok"}
                    except Exception as error:
                        row["status"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
                        # Too much shared memory is a refusal; a broken card raises here, and ends the sweep.
                        card.synchronize()
            rows.append(row)
            merge_csv(table, [row])
            print(f"C {classes} {mode} {row.get('p50', float('nan')):8.4f} ms  {name}  {row['status']}", flush=True)
    for key in dict.fromkeys((r["shape"], r["mode"]) for r in rows):
        timed = sorted(
            (r for r in rows if (r["shape"], r["mode"]) == key and r["status"] == "ok"), key=lambda r: r["p50"]
        )
        print(
            f"best of {len(timed)} at {key[0]} {key[1]}: "
            + ", ".join(f"{r['provider']} {r['p50']:.4f} ms" for r in timed[:3])
        )
    print(f"written to {table}")
    return int(any(r["status"] == "no time left" for r in rows))


# ---- with a GPU


def file_name(gpu: str) -> str:
    """A card's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def worker(given: str) -> int:
    """One worker process of `run`: one op, or the card's ceilings."""
    task = json.loads(given)
    # What the environment says must not turn the fused op into the reference.
    os.environ["SPML_KERNELS"] = "auto"
    card = Card()
    if task["op"] == "ceilings":
        facts = {"ceilings": card.ceilings(), "machine": machine(torch.cuda.get_device_name(), task["commit"])}
        Path(task["events"]).write_text(json.dumps(facts), encoding="utf-8")
        return 0
    found = works([task["op"]], task["small"])
    facts = {"ceilings": task["ceilings"], "machine": task["machine"]}
    events, table = Path(task["events"]), Path(task["table"])
    work_through(card, found, task["first"], events, table, facts, task["seconds"])
    return 0


def bench(ops: list[str], small: bool, results: Path, seconds: float, known: str | None) -> tuple[list[Row], int]:
    """Time everything on this machine's GPU; rows and exit status."""
    words = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "facts.json"
        task = json.dumps({"op": "ceilings", "events": str(answer), "commit": known})
        done = subprocess.run([*words, task])
        if done.returncode or not answer.exists():
            print("the card's copy and product rates could not be measured; nothing was timed", file=sys.stderr)
            return [], 1
        facts = json.loads(answer.read_text(encoding="utf-8"))
    print(", ".join(f"{k} {v}" for k, v in facts["machine"].items()), f"python {platform.python_version()}")
    print(", ".join(f"{k} {v:.0f} {'GB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in facts["ceilings"].items()))
    table = results / f"{file_name(facts['machine']['gpu'])}_kernels.csv"
    given = {**facts, "small": small, "table": str(table)}
    rows = run(ops, small, table, given, seconds, words)
    sentences = judge(rows)
    if rows:
        merge_csv(table, rows)
        if any(r["status"] == "ok" and r["provider"] == "fused" for r in rows):
            plot_times(rows, table.with_suffix(".png"), f"{facts['machine']['gpu']}, {facts['machine']['commit']}")
        print(f"written to {table}")
    print(*sentences, sep="\n")
    failed = [r for r in rows if r["status"].startswith("FAILED")]
    for row in failed:
        print(f"{row['op']} {row['shape']} {row['provider']} {row['mode']}: {row['status']}", file=sys.stderr)
    return rows, int(bool(failed))


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tables and plots")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop timing after this long")
    parser.add_argument("--bytes", action="store_true", help="bytes and launches, as without a GPU")
    parser.add_argument("--no-code", action="store_true", help="without registers and occupancy, which take minutes")
    parser.add_argument("--sweep", action="store_true", help="time other block sizes of cam_pool (needs a GPU)")
    parser.add_argument("--aot", action="store_true", help="compile for sm_80, sm_90, sm_100 (needs no GPU)")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not HAVE_TRITON:
        print("triton is not installed, so there are no kernels to look at", file=sys.stderr)
        return 2
    if INTERPRETED:
        print("TRITON_INTERPRET is set, so kernels are not compiled; run without it", file=sys.stderr)
        return 2
    if options.worker:
        return worker(options.worker)
    if options.sweep and not torch.cuda.is_available():
        print("--sweep needs a GPU", file=sys.stderr)
        return 2
    if options.sweep:
        return sweep(Card(), options.results, options.seconds, options.quick, options.commit)
    status = 0
    if options.aot:
        rows = ahead_of_time(options.ops, options.quick)
    elif options.bytes or not torch.cuda.is_available():
        rows = bytes_table(options.ops, options.quick, None if options.no_code else Compiler(90))
        table = options.results / "no_gpu_kernels.csv"
        everything = not options.quick and set(options.ops) == set(OPS)
        merge_csv(table, [row | machine("none", options.commit) for row in rows], keep=not everything)
        plot_bytes(
            rows, table.with_suffix(".png"), "Bytes and launches of the fused ops (by formula, nothing is timed)"
        )
        print(f"written to {table}")
    else:
        rows, status = bench(options.ops, options.quick, options.results, options.seconds, options.commit)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1, default=str), encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main())

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
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED  # noqa: E402

from benchmarks.kernel_bytes import Compiler, ahead_of_time, bytes_table  # noqa: E402
from benchmarks.kernel_gpu import Card, run, work_through  # noqa: E402
from benchmarks.kernel_report import (  # noqa: E402
    RESULTS,
    Row,
    file_name,
    judge,
    machine,
    merge_csv,
    plot_bytes,
    plot_times,
)
from benchmarks.kernel_sweep import sweep  # noqa: E402
from benchmarks.kernel_works import OPS, works  # noqa: E402
from spml_fast.core.outputs import add_json_option, json_output  # noqa: E402


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
    kernel_works = works([task["op"]], task["small"])
    facts = {"ceilings": task["ceilings"], "machine": task["machine"]}
    events, table = Path(task["events"]), Path(task["table"])
    work_through(card, kernel_works, task["first"], events, table, facts, task["seconds"])
    return 0


def bench(ops: list[str], small: bool, results: Path, seconds: float, known: str | None) -> tuple[list[Row], int]:
    """Time everything on this machine's GPU; rows and exit status."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "facts.json"
        task = json.dumps({"op": "ceilings", "events": str(answer), "commit": known})
        done = subprocess.run([*command, task])
        if done.returncode or not answer.exists():
            print("the card's copy and product rates could not be measured; nothing was timed", file=sys.stderr)
            return [], 1
        facts = json.loads(answer.read_text(encoding="utf-8"))
    print(", ".join(f"{k} {v}" for k, v in facts["machine"].items()), f"python {platform.python_version()}")
    print(", ".join(f"{k} {v:.0f} {'GB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in facts["ceilings"].items()))
    table = results / f"{file_name(facts['machine']['gpu'])}_kernels.csv"
    given = {**facts, "small": small, "table": str(table)}
    rows = run(ops, small, table, given, seconds, command)
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
    add_json_option(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tables and plots")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop timing after this long")
    parser.add_argument("--bytes", action="store_true", help="bytes and launches, as without a GPU")
    parser.add_argument("--no-code", action="store_true", help="without registers and occupancy, which take minutes")
    parser.add_argument("--sweep", action="store_true", help="time other block sizes of cam_pool (needs a GPU)")
    parser.add_argument("--aot", action="store_true", help="compile for sm_80, sm_90, sm_100 (needs no GPU)")
    parser.add_argument("--commit", help="commit to record where git is not at hand")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    out_file = json_output(options, "bench_kernels")
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
    if out_file is not None:
        out_file.write_json({"rows": json.loads(json.dumps(rows, default=str))})
    return status


if __name__ == "__main__":
    raise SystemExit(main())

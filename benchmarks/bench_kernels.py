"""The fused ops against their PyTorch forms: bytes without a GPU, times with one.

    python benchmarks/bench_kernels.py [--ops cam_pool label_loss ...] [--quick] [--shapes TEXT ...] [--json OUT]
                                       [--results DIR] [--bytes] [--seconds N] [--commit C] [--sweep] [--aot]

Without a GPU (or with --bytes): for every op and shape, forward (fwd) and forward with backward (step), what the fused
op and PyTorch move and launch. Bytes are distinct bytes read and bytes written by every launch, PyTorch operations
within an op included; `floor` is the least that any kernels must move, `eager` the same count for that way of writing
it in PyTorch which moves least. Nothing runs: kernels' bytes come from formulas of their arguments, which the tests
compare with what Triton's interpreter really reads and writes. Registers, spills and occupancy are of the machine code
for sm_90 (the most registers, the least occupancy of the op's kernels). The last columns are the time that bytes and
matrix products allow on a card by its public peak numbers: a bound, no measurement. Nothing here is a speed.
Rows and a plot go to benchmarks/results/no_gpu_kernels.csv and .png.

With a GPU: providers

    eager...    PyTorch, products in the features' type: of cam_pool with both means from one map (eager), with one of
                them from pooled features (eager_pooled), over chunks of images whose map fits in cache (eager_chunks);
                of large_loss the reference, and the least that one card needs (eager_lean)
    compile...  torch.compile of these; of cam_pool with tuned products too (compile_tuned), of the other ops as a CUDA
                graph (compile_graphs)
    chunked     cam_pool alone: the vendor's matrix products over chunks of classes, which narrow maps take
    matmul      cam_pool alone: bare matrix products of its size (one fwd, two bwd, three step), the goal's measure
    fused       the Triton kernels

each forward (fwd), backward (bwd) and both (step). Every shape first passes a gate: values and gradients of the fused
op against fp64; where it fails the fused op is not timed and its row says why. `p50` (p20, p80) are of triton's
do_bench: launch gaps included, level-2 cache cold; `graph_p50` of do_bench_cudagraph: no gaps, cache warm; both are
judged. `enqueue_us` is the host's time for one call. `pair_ratio` is the op over the bare product timed in turn, A B A
B. A card that has waited is kept busy until its clock is up. GB/s is the floor's bytes over p50, `copy` and `matmul`
the shares of the copy and product rates measured on this card. `extra_mb` is peak memory beyond outputs and gradients,
without cuBLAS's workspace, which is printed.
cam_pool runs with dense signs and with one positive cell in a hundred: half the cells of a fiftieth of an image's
classes, scattered (sparse, the worst case) or neighbours with Zipf's frequencies (zipf). A process that a kernel breaks
costs the shape it was at, and is followed by another. Rows go to benchmarks/results/<gpu>_kernels.csv
one by one, with GPU, torch, triton and commit, rows of the same key replaced; a plot lies beside it, and in
<gpu>_kernels_profile.csv the kernels of every provider's call with their times. Goals met and missed are in the rows
(`goal`) and at the end. --seconds stops in time and says what is missing; a shape may take a minute longer.

Exit status 0; 1 when something failed, did not pass its gate or was not reached; 2 when the request cannot be served.

--sweep times other launches of the ops instead (needs a GPU): every way that heuristics know, block sizes, chunks; rows
go to <gpu>_sweep.csv. --aot compiles every kernel for sm_80, sm_90 and sm_100 and prints registers, spills and load
widths (needs no GPU). `benchmarks/gpu_session.py` is all of it in an order that suits a few minutes of a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED  # noqa: E402

from benchmarks.kernel_bytes import Compiler, ahead_of_time, bytes_table  # noqa: E402
from benchmarks.kernel_card import Card  # noqa: E402
from benchmarks.kernel_gpu import run, work_through  # noqa: E402
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
from benchmarks.kernel_sweep import SWEEPS, best_tries  # noqa: E402
from benchmarks.kernel_works import OPS, works  # noqa: E402
from spml_fast.core.io import write_json  # noqa: E402
from spml_fast.core.outputs import add_json_option, json_output  # noqa: E402


def worker(given: str) -> int:
    """One worker process of `run`: some works, or the card's ceilings."""
    task = json.loads(given)
    card = Card()
    if task["ops"] == "ceilings":
        facts = {"ceilings": card.ceilings(), "workspace_mb": card.workspace()}
        facts["machine"] = machine(torch.cuda.get_device_name(), task["commit"])
        # Whole or not at all: a session may end this process at any time.
        write_json(Path(task["events"]), facts)
        return 0
    kernel_works = works(task["ops"], task["small"], task["shapes"])
    facts = {"ceilings": task["ceilings"], "machine": task["machine"]}
    events, table = Path(task["events"]), Path(task["table"])
    work_through(card, kernel_works, task["first"], events, table, facts, task["seconds"])
    return 0


def facts_of_card(command: list[str], known: str | None, file: Path | None) -> dict[str, Any] | None:
    """Copy and product rates and versions of this machine; None where they could not be measured.

    Args:
        command: starts a worker.
        known: commit to record.
        file: where they are kept: read if it is there and of this machine and commit, else written.
    """
    if file is not None and file.exists():
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        # Another card's rates, or another commit's, would be written to every row.
        if kept["machine"] == machine(torch.cuda.get_device_name(), known):
            return kept
    with tempfile.TemporaryDirectory() as folder:
        answer = file or Path(folder) / "facts.json"
        done = subprocess.run([*command, json.dumps({"ops": "ceilings", "events": str(answer), "commit": known})])
        if done.returncode or not answer.exists():
            return None
        facts: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return facts


def bench(options: argparse.Namespace) -> tuple[list[Row], int]:
    """Time everything on this machine's GPU; rows and exit status."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    facts = facts_of_card(command, options.commit, options.ceilings)
    if facts is None:
        print("the card's copy and product rates could not be measured; nothing was timed", file=sys.stderr)
        return [], 1
    print(", ".join(f"{k} {v}" for k, v in facts["machine"].items()), f"python {platform.python_version()}")
    print(", ".join(f"{k} {v:.0f} {'GB/s' if k == 'copy' else 'TFLOP/s'}" for k, v in facts["ceilings"].items()))
    print(f"cuBLAS keeps {facts['workspace_mb']:.1f} MB of workspace, which extra_mb leaves out")
    card = file_name(facts["machine"]["gpu"])
    table = options.results / f"{card}_{'sweep' if options.sweep else 'kernels'}.csv"
    given = {**facts, "small": options.quick, "shapes": options.shapes, "table": str(table)}
    # A sweep has its own names for the ops that have one.
    ops = [op for op in SWEEPS if op.removeprefix("sweep_") in options.ops] if options.sweep else options.ops
    rows = run(ops, options.quick, table, given, options.seconds, command, options.shapes)
    sentences = best_tries(rows) if options.sweep else judge(rows)
    if rows:
        merge_csv(table, rows)
        timed = any(r["status"] == "ok" and r["provider"] == "fused" for r in rows)
        if timed and not options.no_plot:
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
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="only shapes that contain one of these texts")
    add_json_option(parser)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of tables and plots")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop timing after this long")
    parser.add_argument("--bytes", action="store_true", help="bytes and launches, as without a GPU")
    parser.add_argument("--no-code", action="store_true", help="without registers and occupancy, which take minutes")
    parser.add_argument("--sweep", action="store_true", help="time other launches of the ops (needs a GPU)")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="the card's rates: read if there, else written")
    parser.add_argument("--no-plot", action="store_true", help="no plot of the times")
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
    if options.shapes and not works(options.ops, options.quick, options.shapes):
        print(f"no shape of {', '.join(options.ops)} contains {' or '.join(options.shapes)}", file=sys.stderr)
        return 2
    if options.sweep and not torch.cuda.is_available():
        print("--sweep needs a GPU", file=sys.stderr)
        return 2
    status = 0
    if options.aot:
        rows = ahead_of_time(options.ops, options.quick)
    elif options.bytes or not torch.cuda.is_available():
        rows = bytes_table(options.ops, options.quick, None if options.no_code else Compiler(90), options.shapes)
        table = options.results / "no_gpu_kernels.csv"
        everything = not options.quick and not options.shapes and set(options.ops) == set(OPS)
        merge_csv(table, [row | machine("none", options.commit) for row in rows], keep=not everything)
        plot_bytes(
            rows, table.with_suffix(".png"), "Bytes and launches of the fused ops (by formula, nothing is timed)"
        )
        print(f"written to {table}")
    else:
        rows, status = bench(options)
    if out_file is not None:
        out_file.write_json({"rows": json.loads(json.dumps(rows, default=str))})
    return status


if __name__ == "__main__":
    raise SystemExit(main())

"""What bytes, launches and machine code let one expect of every op on an H200: a forecast, no measurement.

    python benchmarks/kernel_forecast.py              prints the table
    python benchmarks/kernel_forecast.py --write      puts it into docs/performance.md, between its marks

Every launch takes the longest of three times: its bytes at `BYTES` of the card's rate, its matrix products at
`PRODUCTS` of their peak, and its instructions at one a clock and scheduler (the longest way through the machine code
for sm_90, loops as often as they turn; one program alone uses one multiprocessor). What cam_pool's forward does after
its products, which nothing overlaps, is added to them. Launches follow each other with
`GAP` microseconds in between, as in a CUDA graph. PyTorch's operations are taken to be bound by bytes and products.
What no forecast here knows: waiting (latency, barriers, one program a multiprocessor), and what torch.compile makes;
its best would be the floor, in one launch each way. Needs no GPU; takes a minute or two.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from spml_kernels.common.jit import cdiv  # noqa: E402
from spml_kernels.devtools.aot import Report  # noqa: E402
from spml_kernels.devtools.counting import Launch, total  # noqa: E402
from spml_kernels.devtools.traffic import moved  # noqa: E402

from benchmarks.kernel_base import KernelWork  # noqa: E402
from benchmarks.kernel_bytes import CARDS, Compiler, launches_of  # noqa: E402
from benchmarks.kernel_losses import (  # noqa: E402
    ignore_loss_work,
    ignore_statistics_work,
    label_loss_work,
    label_rows_work,
    large_loss_work,
)
from benchmarks.kernel_maps import IN_CACHE, cam_mask_work, cam_work  # noqa: E402
from benchmarks.page_tables import Marks  # noqa: E402

MARKS = Marks("<!-- forecast: begin; python benchmarks/kernel_forecast.py --write -->", "<!-- forecast: end -->")
HEADS = (
    "op",
    "floor, MB",
    "moved, MB",
    "launches, ours / PyTorch",
    "instructions: an element; a turn of the inner loops",
    "forecast, us: bytes, products, instructions, all",
    "goal",
    "forecast against it",
    "measured",
)
# Assumed: shares of the public peaks that kernels reach, microseconds between launches of a graph.
BYTES, PRODUCTS, GAP = 0.85, 0.8, 1.5
CARD = CARDS["H200"]
# Multiprocessors by schedulers, and clocks a microsecond.
SCHEDULERS, CLOCK = 132 * 4, 1755.0

FORWARD = "_cam_pool_fwd_kernel"
# How often the innermost loops of a kernel turn, in the order of the code; others turn once.
TURNS: dict[str, Callable[[dict[str, Any]], list[float]]] = {
    # Channels; then images of a slice of a tile, which an image's end falls into more or less often.
    FORWARD: lambda a: [
        cdiv(a["channels"], a["BLOCK_K"]),
        *[1 + (a["BLOCK_R"] // a["SLICES"] - 1) / a["cells"]] * a["SLICES"],
    ],
    "_cam_pool_expand_kernel": lambda a: [a["LINES"]],
    "_class_map_kernel": lambda a: [cdiv(a["channels"], a["BLOCK_K"])],
    "_large_histogram_kernel": lambda a: [a["rounds"]],
    "_large_single_kernel": lambda a: [32, cdiv(a["elements"], a["PART"])],
    "_ignore_statistics_kernel": lambda a: [a["turns"]],
    "_label_rows_kernel": lambda a: [cdiv(a["num_classes"], a["BLOCK"])],
}


class Forecast(NamedTuple):
    """Microseconds of one call.

    Attributes:
        bytes_, products, instructions: what each alone would take.
        all_: the longest of the three for every launch, and the gaps.
        issued: instructions of all threads.
    """

    bytes_: float
    products: float
    instructions: float
    all_: float
    issued: float


def instructions_of(report: Report, arguments: dict[str, Any], name: str) -> float:
    """Instructions of a warp of one launch."""
    turns = TURNS[name](arguments) if name in TURNS else []
    return report.longest + sum((n - 1) * loop for n, loop in zip(turns, report.loops, strict=False))


def forecast(launches: list[Launch], compiler: Compiler | None, flops: float, cached: float) -> Forecast:
    """Of one call.

    Args:
        launches: of the call.
        compiler: of kernels; None for PyTorch's operations alone.
        flops: of all matrix products, which are shared among the launches that multiply.
        cached: bytes of all launches that the level-2 cache is to hold.
    """
    multiply = [".mm." in s.name or "addmm" in s.name or ".bmm" in s.name or s.name == FORWARD for s in launches]
    # The forward's kernel makes one of the three products of a step; the others are much alike.
    own = flops / (3 if sum(multiply) > 1 else 1) if any(s.name == FORWARD for s in launches) else 0.0
    share = (flops - own) / max(sum(multiply) - (own > 0), 1)
    amounts = [total([launch], moved).least for launch in launches]
    # The cache holds the same part of every launch's bytes.
    kept = 1 - cached / max(sum(amounts), 1)
    found = Forecast(0, 0, 0, 0, 0)
    for launch, product, amount in zip(launches, multiply, amounts, strict=True):
        bytes_ = amount * kept / (BYTES * CARD.memory * 1e3)
        products = (own if launch.name == FORWARD else share * product) / (PRODUCTS * CARD.half * 1e6)
        instructions = issued = after = 0.0
        if launch.kernel is not None and compiler is not None:
            report = compiler.report(launch)
            warp = instructions_of(report, launch.arguments, launch.name)
            issued = 32 * math.prod(launch.grid) * report.warps * warp
            instructions = max(issued / 32 / SCHEDULERS, warp * report.warps / 4) / CLOCK
            if launch.name == FORWARD:
                channels = TURNS[FORWARD](launch.arguments)[0] * report.loops[0]
                after = instructions * (1 - channels / warp)
        one = Forecast(bytes_, products, instructions, max(bytes_, products + after, instructions) + GAP, issued)
        found = Forecast(*(a + b for a, b in zip(found, one, strict=True)))
    return found


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        work: op and shape; mode: of it.
        elements: that instructions are counted for.
    """

    work: KernelWork
    mode: str
    elements: int


def lines() -> Iterator[Line]:
    """Every op at its largest usual shape, and at a small one where launches are what counts."""
    from spml_fast.methods.assume_negative import AssumeNegative

    for classes in (5000, 80):
        work = cam_work(128, 14, 2048, classes, torch.bfloat16)
        for mode in ("fwd", "step"):
            yield Line(work, mode, 128 * 196 * classes)
    yield Line(cam_mask_work(128, 14, 2048, 80, 448, 1, torch.bfloat16, torch.bfloat16), "fwd", 128 * 3 * 448 * 448)
    for rows, classes in ((512, 9605), (128, 80)):
        for work in (
            label_loss_work(rows, classes, AssumeNegative.point, ()),
            large_loss_work(rows, classes, rows * classes // 100, listed=False),
            ignore_statistics_work(rows, classes),
            ignore_loss_work(rows, classes),
            label_rows_work(rows, classes),
        ):
            yield Line(work, work.main_mode, rows * classes)


def row(line: Line, compiler: Compiler) -> list[str]:
    """Cells of one line."""
    work, mode = line.work, line.mode
    launches = launches_of(work, "fused", mode)
    rivals = {p: launches_of(work, p, mode) for p in work.providers if p.startswith("eager")}
    eager = min(rivals.values(), key=lambda found: total(found).least)
    flops, cached = work.flops.get(mode, 0.0), work.residuals.get(mode, {}).get(IN_CACHE, 0.0)
    ours, theirs = forecast(launches, compiler, flops, cached), forecast(eager, None, flops, 0)
    least = work.floor[mode] / (BYTES * CARD.memory * 1e3)
    bare = flops / (PRODUCTS * CARD.half * 1e6)
    amount = total(launches, moved).least - cached
    loops: dict[str, str] = {}
    for launch in launches:
        if launch.kernel is not None and launch.name in TURNS:
            turns = len(TURNS[launch.name](launch.arguments))
            names = [str(n) for n in dict.fromkeys(compiler.report(launch).loops[:turns])]
            loops[launch.name.strip("_").removesuffix("_kernel")] = ", ".join(names)
    inner = "; ".join(f"{name} {numbers}" for name, numbers in loops.items() if numbers) or "no loop"
    if work.op == "cam_pool" and bare > least:
        goal = f"{1.15 if mode == 'fwd' else 1.3:.2f} x bare products"
        against = f"{ours.all_ / bare:.2f} x"
    elif work.op == "cam_mask":
        goal, against = "85% of a copy", f"{least * BYTES / ours.all_:.0%}"
    else:
        goal = "2 x eager, 1.2 x compile"
        # The best that a compiler can do reads and writes the floor, in one launch each way.
        best = max(least, bare) + GAP * (2 if mode == "step" else 1)
        against = f"{theirs.all_ / ours.all_:.1f} x eager; {best / ours.all_:.2f} x compile at its best"
    times = [f"{t:.3g}" for t in (ours.bytes_, ours.products, ours.instructions)]
    return [
        f"{work.op} {work.shape}, {mode}",
        f"{work.floor[mode] / 1e6:.3g}",
        f"{amount / 1e6:.3g}" + (f" and {cached / 1e6:.3g} in cache" if cached else ""),
        f"{len(launches)} / {len(eager)}",
        f"{ours.issued / line.elements:.3g}; {inner}",
        f"{times[0]}, {times[1] if flops else '-'}, {times[2]}, **{ours.all_:.3g}**",
        goal,
        against,
        "not measured",
    ]


def table() -> str:
    """The table in Markdown."""
    compiler = Compiler(90)
    rows = [row(line, compiler) for line in lines()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (HEADS, ["---"] * len(HEADS), *rows))


def main() -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    text = table()
    MARKS.show(text, options.write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Rows of the kernel benchmark without a GPU: bytes and launches, machine code, bounds by public peak numbers."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from unittest import mock

import torch
from spml_kernels.devtools.aot import ARCHITECTURES, Case, Report, compile_case
from spml_kernels.devtools.cases import cases
from spml_kernels.devtools.counting import Launch, Moved, count, total
from spml_kernels.devtools.traffic import moved

from benchmarks.kernel_base import KernelWork, make_call
from benchmarks.kernel_losses import method_cases
from benchmarks.kernel_report import Row
from benchmarks.kernel_works import works


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
    fused = launches_of(work, "fused", mode)
    # The fair one of several ways to write it: that which moves least.
    rivals = {p: launches_of(work, p, mode) for p in work.providers if p.startswith("eager")}
    name = min(rivals, key=lambda rival: total(rivals[rival]).least)
    kernels = [launch for launch in fused if launch.kernel is not None]
    ours, theirs, eager = total(fused, moved), total(rivals[name]), rivals[name]
    row: Row = {"op": work.op, "shape": work.shape, "mode": mode, "provider": "fused" if kernels else "no kernel yet"}
    row |= {"floor_bytes": int(work.floor[mode]), "fused_bytes": ours.least, "eager_bytes": theirs.least, "eager": name}
    row |= {"fused_reads": ours.read, "kernel_launches": len(kernels)}
    row |= {"fused_launches": len(fused), "eager_launches": len(eager)}
    row |= {"kernel_bytes": total(kernels, moved).least if kernels else Moved().least}
    if compiler is not None and kernels:
        reports = [compiler.report(launch) for launch in kernels]
        row |= {"registers": max(r.registers for r in reports), "spills": sum(r.spills for r in reports)}
        row |= {"occupancy": min(r.occupancy(compiler.arch) for r in reports), "arch": compiler.arch}
    return row | {f"{name}_us": bound_us(work, ours.least, mode, card) for name, card in CARDS.items()}


def bytes_table(ops: list[str], small: bool, compiler: Compiler | None, shapes: list[str] | None = None) -> list[Row]:
    """All rows, printed as they come.

    Args:
        ops, small, shapes: as for `works`.
        compiler: of machine code; None leaves it out.
    """
    print("no times here: bytes and launches by formula, machine code for sm_90, and bounds by public peak numbers")
    cards = "".join(f"{name:>9}" for name in CARDS)
    titles = f"{'':<70}{'floor':>9}{'fused':>9}{'eager MB':>9}{'launches':>12}{'regs':>6}{'spills':>7}{'occ.':>6}"
    print(f"{titles}   bound us{cards}")
    rows = []
    # Bytes do not depend on the signs, and what one would write in PyTorch is there once.
    for work in (w for w in works(ops, small, shapes) if "eager" in w.providers):
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

"""Every kernel, compiled for GPUs that are not there: no spills, wide loads, matrix instructions.

A choice of cases, so that it stays short; `python benchmarks/bench_kernels.py --aot` compiles all of them.
"""

from __future__ import annotations

import importlib
import os

import pytest
from spml_kernels.common.jit import HAVE_TRITON

if not HAVE_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, not interpreting", allow_module_level=True)

from spml_kernels.devtools.aot import ARCHITECTURES, OPS, Case, cases, compile_case

# (op, words of the shape, architectures). Registers are what a thread may have at most.
CHOSEN = [
    ("label_loss", "an fp32 1229440", (80, 90, 100), 80),
    ("label_loss", "an bf16 2673", (90,), 96),
    ("large_histogram", "fp32 128 x 5000 pass 2", (80, 90, 100), 64),
    ("large_threshold", "fp32 128 x 5000", (90,), 64),
    ("large_select", "fp32 128 x 5000 with loss and list", (80, 90), 128),
    ("large_select", "fp32 128 x 5000 with loss and list", (100,), 136),
    ("large_once", "fp32 128 x 81 with list", (80, 90, 100), 112),
    ("large_once", "bf16 16 x 20 without list", (90,), 104),
    ("label_rows", "9605 classes", (90,), 48),
    ("cam_pool forward", "bf16 C 5000 K 2048 HW 196 B 128", (80, 90, 100), 255),
    ("cam_pool forward", "bf16 C 20 K 2048", (90,), 168),
    ("cam_pool forward", "bf16 C 312 K 1280 HW 49", (90,), 200),
    ("cam_pool forward", "fp32 C 80 K 2048", (90,), 200),
    ("cam_pool dX", "bf16 C 5000 K 2048 HW 196 B 128", (80, 90, 100), 208),
    ("cam_pool dX", "bf16 C 312 K 1280 HW 49", (90,), 208),
    ("cam_pool dW", "bf16 C 5000 K 2048 HW 196 B 128", (80,), 248),
    ("cam_pool dW", "bf16 C 5000 K 2048 HW 196 B 128", (90, 100), 208),
    ("cam_pool dW", "fp16 C 80 K 2048", (90,), 208),
    ("cam_mask maps", "bf16 K 2048 HW 14x14 N 1", (90,), 104),
    ("cam_mask maps", "fp32 K 2048 HW 14x14 N 6", (80,), 112),
    ("cam_mask per_image", "14x14", (90,), 48),
    ("cam_mask batch", "14x14", (90,), 64),
    ("cam_mask image", "i16 448x448 map 14x14 N 1 channels_last", (80, 90, 100), 112),
    ("cam_mask image", "i32 448x448 map 14x14 N 6 contiguous", (90,), 96),
    ("ignore_statistics", "bf16 128 x 5000", (90,), 64),
    ("ignore_statistics end", "fp32 128 x 81", (90,), 48),
    ("ignore_loss", "fp32 128 x 5000 logits", (80, 90, 100), 128),
    ("ignore_loss backward", "fp32 128 x 5000 epsilon", (90,), 112),
]
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def find(op: str, words: str, arch: int) -> Case:
    found = [c for c in cases(arch) if c.op == op and words in c.shape]
    assert found, f"no case of {op} with {words!r}"
    return found[0]


@pytest.mark.parametrize(
    ("op", "words", "arch", "registers"),
    [(op, words, arch, registers) for op, words, archs, registers in CHOSEN for arch in archs],
    ids=lambda v: str(v).replace(" ", "_"),
)
def test_machine_code(op, words, arch, registers):
    case = find(op, words, arch)
    report = compile_case(case, arch)
    print(report)
    assert report.stack == 0 and report.spills == 0
    assert report.registers <= registers
    assert 0 < report.occupancy(arch) <= 1
    if case.streamed:
        assert report.loads.get(128, 0) + report.loads.get(1024, 0) > 0
    if case.tensor_cores:
        assert MATRIX[arch] in report.matrix


def test_every_op_has_cases_and_every_case_is_complete():
    seen = set()
    for arch in ARCHITECTURES:
        for case in cases(arch):
            seen.add(case.op)
            names = list(case.kernel.arg_names)
            assert set(names) == set(case.types) | set(case.constants), (case.op, case.shape)
            assert not set(case.types) & set(case.constants)
            assert set(case.aligned) <= set(case.types)
    assert {op for op, *_ in CHOSEN} == seen


@pytest.mark.parametrize("op", OPS)
def test_a_launch_takes_every_kernels_arguments(op):
    """Triton binds arguments by code that it makes from their names; nothing else here runs it."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    functions = vars(importlib.import_module(f"spml_kernels.{op}")).values()
    kernels = [f for f in functions if isinstance(f, JITFunction) and f.fn.__name__.endswith("_kernel")]
    assert kernels
    for kernel in kernels:
        given = {}
        for parameter in kernel.params:
            if parameter.is_constexpr:
                given[parameter.name] = 1
            elif parameter.name.endswith("_ptr"):
                given[parameter.name] = torch.empty(1)
            else:
                given[parameter.name] = (0.5,) if parameter.name == "numbers" else 160
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        bound, kinds, options = bind(**given, num_warps=4)
        assert all(bound[name] is value for name, value in given.items())
        assert len(kinds) == len(given) and options == {"num_warps": 4}


@pytest.mark.parametrize(
    "op",
    ["cam_pool forward", "cam_pool dX", "cam_pool dW", "label_loss", "large_select", "cam_mask image"],
)
def test_offsets_are_64_bits_wide(op):
    """B * H * W * K and B * C pass 2^31: what is multiplied by a row length is int64 in the intermediate code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = next(c for c in cases(90) if c.op == op)
    names = list(case.kernel.arg_names)
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants))
    options = {"num_warps": case.warps, "num_stages": case.stages}
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttir"]
    wide = [line for line in text.splitlines() if "arith.muli" in line and "i64" in line]
    assert wide, "no 64-bit multiplication"
    if op.startswith("cam_pool"):
        # Row numbers are widened before they are multiplied by channels.
        assert any("arith.extsi" in line and "i64" in line for line in text.splitlines())


def test_every_method_has_a_point_function_that_compiles():
    from spml_kernels.label_loss.op import aot_cases

    from spml_fast.methods.base import get_method, method_names

    points = {}
    for name in method_names():
        point = getattr(get_method(name), "point", None)
        if point is not None and point.name not in points:
            assert point.kernel is not None, f"{name} has no kernel"
            points[point.name] = (point.kernel, len(point.kernel.arg_names) - 2)
    assert len(points) >= 9
    for name, point in points.items():
        case = next(c for c in aot_cases(90, {name: point}) if "fp32 1229440" in c.shape)
        report = compile_case(case, 90)
        assert report.stack == 0 and report.spills == 0 and report.loads.get(128, 0) > 0, (name, report)

"""Every kernel, compiled for absent GPUs: registers and spills as on record, wide loads, matrix instructions.

A choice of cases (record.py), so that it stays short; `python benchmarks/bench_kernels.py --aot` compiles all of them.
"""

from __future__ import annotations

import importlib
import os

import pytest
from spml_kernels.common.jit import HAVE_TRITON, triton

if not HAVE_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton, not interpreting", allow_module_level=True)

from spml_kernels.common.heuristics import cam_pool_way
from spml_kernels.common.jit import VERSION
from spml_kernels.devtools.aot import (
    ARCHITECTURES,
    LIMITS,
    MORE_ARCHITECTURES,
    Report,
    compile_case,
    compiled_code,
    unfenced_products,
)
from spml_kernels.devtools.cases import cases

from spml_fast.methods.pointwise import point_examples
from tests.kernels.aot.record import CHOSEN, METHODS_ARCH, Chosen, check, fact, find, read_record

# Modules with kernels.
MODULES = (
    "label_loss.kernels",
    "large_loss.kernels",
    "label_rows.kernels",
    "cam_pool.kernels",
    "cam_pool.sparse_kernels",
    "cam_mask.kernels",
    "ignore_loss.kernels",
)
MATRIX = {90: "HGMMA", 100: "UTCHMMA", 103: "UTCHMMA"}


def compile_and_check(chosen: Chosen) -> Report:
    """The machine code, compared with the record; registers and spills only bind versions that are on it."""
    try:
        report = compile_case(chosen.case, chosen.arch)
    except Exception as error:
        if triton.__version__ in read_record() or chosen.arch in ARCHITECTURES:
            raise
        # A version that is not on record may have dropped one of the other cards, or know a new one only in part.
        pytest.skip(f"triton {triton.__version__} does not compile {chosen.name}: {type(error).__name__}: {error}")
    print(chosen.name, report)
    difference = check(chosen.name, fact(report), read_record(), triton.__version__)
    if difference:
        print(f"{chosen.name}, triton {triton.__version__}: {difference}")
    return report


@pytest.mark.parametrize(
    ("op", "words", "arch"),
    [(op, words, arch) for op, words, archs in CHOSEN for arch in archs],
    ids=lambda v: str(v).replace(" ", "_"),
)
def test_machine_code(op, words, arch):
    chosen = find(op, words, arch)
    report = compile_and_check(chosen)
    assert 0 < report.occupancy(arch) <= 1 and report.shared <= LIMITS[arch][2]
    assert report.read or arch in MORE_ARCHITECTURES
    if chosen.case.streamed and report.read:
        assert report.loads.get(128, 0) + report.loads.get(1024, 0) > 0
    if chosen.case.tensor_cores and report.read:
        assert MATRIX.get(arch, "HMMA") in report.matrix


def test_all_cards_are_compiled_for():
    """Every card that a way of cam_pool is chosen for has a case, and takes what it can hold."""
    seen = {arch for op, _, archs in CHOSEN for arch in archs if op == "cam_pool forward"}
    assert seen == {*ARCHITECTURES, *MORE_ARCHITECTURES} and set(LIMITS) == {75, *seen}
    assert all(cam_pool_way(arch, (3, 8, 0)) == ("tile" if arch in seen else "vendor") for arch in LIMITS)


# Groups of matrix instructions of Hopper that lack a fence, in the kernel whose operands are copied element by element.
UNFENCED = {"3.6.0": 1, "3.8.0": 0, "3.9.0": 0}


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("cam_pool forward", "bf16 C 5000 K 2048 HW 196 B 128"),
        ("cam_pool forward", "bf16 C 80 K 2048"),
        # Few classes have no wide tiles.
        ("cam_pool persistent", "bf16 C 5000 K 2048 HW 196 B 128"),
    ],
)
def test_matrix_instructions_wait_for_what_copies_wrote(op, words):
    """By version; where a fence is missing, PyTorch multiplies. Copies of tiles need none."""
    text = compiled_code(find(op, words, 90).case, 90).asm["ptx"]
    assert text.count("wgmma.mma_async") > 0
    assert ("cp.async.wait" in text) == (op == "cam_pool forward")
    missing, vendor = unfenced_products(text), cam_pool_way(90, VERSION, 128, 196, 5000, True) == "vendor"
    # Whatever the version: what lacks a fence may not be chosen.
    assert missing == 0 or (op == "cam_pool forward" and vendor)
    if triton.__version__ not in UNFENCED:
        print(f"triton {triton.__version__}: {op} {words}: {missing} without a fence")
        return
    assert missing == (UNFENCED[triton.__version__] if op == "cam_pool forward" else 0)
    assert vendor == (UNFENCED[triton.__version__] > 0)


def test_the_persistent_kernel_is_one_loop():
    """Or the next tile's operands would not be copied during a tile's sums; products wait for each other by one."""
    text = compiled_code(find("cam_pool persistent", "bf16 C 5000 K 2048", 90).case, 90).asm["ttgir"]
    loops, asynchronous = text.count("scf.for "), "pendings = 1" in text
    if triton.__version__ not in read_record():
        print(f"triton {triton.__version__}: {loops} loops, {'' if asynchronous else 'not '}asynchronous")
        return
    assert loops == 1 and asynchronous


def test_missing_fences_are_found():
    wait, fence, product = "cp.async.wait_group 2;", "fence.proxy.async.shared::cta;", "wgmma.mma_async.sync.aligned x;"
    for lines, missing in (
        ((wait, product, product), 1),
        ((wait, fence, product), 0),
        ((wait, fence, product, wait, product, fence), 1),
        ((product, "cp.async.bulk.tensor"), 0),
    ):
        assert unfenced_products("\n".join(lines)) == missing


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


@pytest.mark.parametrize("op", MODULES)
def test_a_launch_takes_every_kernels_arguments(op):
    """Triton binds arguments by code that it makes from their names; nothing else here runs it."""
    import torch
    from spml_kernels.cam_pool.tiles import descriptor
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
            elif parameter.name.endswith("_tiles"):
                given[parameter.name] = descriptor(torch.empty(64, 64, dtype=torch.float16), [64, 64])
            else:
                given[parameter.name] = (0.5,) if parameter.name == "numbers" else 160
        bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
        bound, kinds, options = bind(**given, num_warps=4)
        assert all(bound[name] is value for name, value in given.items())
        assert len(kinds) == len(given) and options == {"num_warps": 4}


@pytest.mark.parametrize(
    "op",
    [
        "cam_pool forward",
        "cam_pool persistent",
        "cam_pool sums",
        "cam_pool expand",
        "cam_pool count",
        "cam_pool list",
        "cam_pool lines",
        "cam_pool sparse dX",
        "cam_pool sparse dW",
        "label_loss",
        "label_loss backward",
        "large_select",
        "cam_mask image",
    ],
)
def test_offsets_are_64_bits_wide(op):
    """B * H * W * K and B * C pass 2^31: what is multiplied by a row length is int64 in the intermediate code."""
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


@pytest.mark.parametrize("name", sorted({example.point.name for example in point_examples()}))
def test_every_method_has_a_point_function_that_compiles(name):
    example = next(e for e in point_examples() if e.point.name == name)
    if example.point.kernel is None:
        pytest.skip(f"method {example.method} has no kernel: its reference runs on every device")
    for op in ("label_loss", "label_loss backward"):
        assert compile_and_check(find(op, f"{name} fp32 1229440", METHODS_ARCH)).loads.get(128, 0) > 0


@pytest.mark.parametrize("method", ["asl", "p_asl"])
def test_a_nan_is_not_lost_in_a_maximum(method):
    """A GPU's plain maximum of a NaN and a number is the number; no interpreter shows it."""
    assembly = compiled_code(find("label_loss", f"{method} fp32 1229440", METHODS_ARCH).case, METHODS_ARCH).asm["ptx"]
    assert "max.NaN.f32" in assembly

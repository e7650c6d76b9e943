"""Ahead-of-time compiles for absent GPUs: what a kernel costs in registers, stack and shared memory.

`cases` (the package beside this file) lists every kernel with the launch parameters that the ops would choose;
`compile_case` compiles one for a compute capability and reads the machine code. Used by tests and by
`benchmarks/bench_kernels.py --aot`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spml_kernels.common.jit import INTERPRETED, LAUNCH, triton

ARCHITECTURES = (80, 90, 100)
# Their smaller and later relatives, for which fewer cases are compiled.
MORE_ARCHITECTURES = (86, 89, 103, 120, 121)

# Registers of one multiprocessor, threads it can hold, shared memory of one block in bytes. On sm_75 cam_pool's
# products are PyTorch's, since the tile spills there.
LIMITS = {
    75: (65536, 1024, 64 * 1024),
    80: (65536, 2048, 163 * 1024),
    86: (65536, 1536, 99 * 1024),
    89: (65536, 1536, 99 * 1024),
    90: (65536, 2048, 227 * 1024),
    100: (65536, 2048, 227 * 1024),
    103: (65536, 2048, 227 * 1024),
    120: (65536, 1536, 99 * 1024),
    121: (65536, 1536, 99 * 1024),
}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        op: name of the op.
        shape: what makes this case, in words.
        kernel: the jit function.
        types: argument name -> type, for arguments that are not constexpr, in the kernel's order; a tuple of types for
            a tuple of numbers.
        constants: constexpr arguments.
        aligned: arguments whose value is a multiple of 16; those that the kernel does not specialise on are left out.
        warps: warps per program.
        stages: depth of software pipelining.
        streamed: whether the operands' loads are expected to be 128 bits wide.
        tensor_cores: whether matrix instructions are expected.
    """

    op: str
    shape: str
    kernel: Any
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    streamed: bool = True
    tensor_cores: bool = False


@dataclass(frozen=True)
class Report:
    """What the machine code of a case takes.

    Attributes:
        registers: a thread.
        stack: bytes per thread; not 0 means spills.
        shared: bytes per block.
        warps: of a block.
        loads: width in bits -> number of load instructions from global memory, plain, asynchronous and by tensor copy.
        stores: the same of store instructions.
        spills: number of instructions that write to the stack.
        matrix: kinds of matrix instructions found.
        read: whether triton's disassembler knows the card; without it there are no loads, stores, spills and matrix.
        longest: instructions of the longest way through the kernel with every loop taken once.
        loops: the same of every loop that has no other within, in the order of the code.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    loads: dict[int, int]
    stores: dict[int, int]
    spills: int
    matrix: tuple[str, ...]
    read: bool = True
    longest: int = 0
    loops: tuple[int, ...] = ()

    def occupancy(self, arch: int) -> float:
        """Share of a multiprocessor's threads that can be resident, by registers and shared memory."""
        registers, threads, shared = LIMITS[arch]
        per_block = max(self.registers, 1) * 32 * self.warps
        blocks = min(registers // per_block, shared // max(self.shared, 1), threads // (32 * self.warps), 32)
        return blocks * 32 * self.warps / threads


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassemble(flag: str, file: str, check: bool = True) -> str:
    return subprocess.run([_tool("cuobjdump"), flag, file], check=check, capture_output=True, text=True).stdout


def _widths(sass: str, instruction: str) -> dict[int, int]:
    """Width in bits -> how often, of LDG or STG style instructions (no suffix is 32 bits)."""
    widths: dict[int, int] = {}
    for suffix in re.findall(rf"\b{instruction}((?:\.[A-Z0-9_]+)+)", sass):
        parts = suffix.split(".")
        width = 32
        for part in parts:
            if part in ("64", "128", "256"):
                width = int(part)
            elif part in ("U8", "S8"):
                width = 8
            elif part in ("U16", "S16"):
                width = 16
        widths[width] = widths.get(width, 0) + 1
    return dict(sorted(widths.items()))


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def instructions(sass: str) -> tuple[int, tuple[int, ...]]:
    """Instructions of the longest way through a kernel, and of every innermost loop.

    What a warp issues, if it takes the longer side of every branch: of two sides of one test only one is counted.

    Args:
        sass: the kernel as `cuobjdump -sass` prints it.
    """
    code = [(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in _INSTRUCTION.finditer(sass)]
    places = {address: place for place, (address, *_) in enumerate(code)}
    follow: list[list[int]] = []
    back: list[tuple[int, int]] = []
    for place, (_, guarded, name, operands) in enumerate(code):
        following = [] if name == "EXIT" and not guarded else [place + 1]
        if name.startswith("BRA"):
            # The address may follow a predicate or a uniform register.
            target = places[int(operands.split()[-1], 16)]
            if target > place:
                following = [target, place + 1] if guarded else [target]
            elif target < place:
                back.append((target, place))
        follow.append([p for p in following if p < len(code)])

    def longest(first: int, last: int) -> int:
        """From one place to another; 0 where no way leads there."""
        length = {first: 1}
        for place in range(first, last):
            for other in follow[place] if place in length else ():
                length[other] = max(length.get(other, 0), length[place] + 1)
        return length.get(last, 0)

    ends = [place for place, (_, guarded, name, _) in enumerate(code) if name == "EXIT" and not guarded]
    inner = [loop for loop in back if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in back)]
    return max((longest(0, end) for end in ends), default=0), tuple(longest(*loop) for loop in sorted(inner))


def compiled_code(case: Case, arch: int) -> Any:
    """Triton's compiled kernel for sm_`arch`, made without a GPU; `asm` holds its stages, `ttir` to `cubin`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are not compiled in this process")
    names = list(case.kernel.arg_names)
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    plain = {p.name for p in case.kernel.params if p.do_not_specialize}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned if n not in plain}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, **LAUNCH}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_case(case: Case, arch: int) -> Report:
    """Compile for sm_`arch`, without a GPU, and read what came out."""
    compiled = compiled_code(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _disassemble("-res-usage", file.name)
        # A compiler may know a card that came after its disassembler: 3.6.0 does of sm_103 and sm_121.
        sass = _disassemble("-sass", file.name, check=False)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    loads = _widths(sass, "LDG")
    for width, count in _widths(sass, "LDGSTS").items():
        loads[width] = loads.get(width, 0) + count
    if copies := len(re.findall(r"\bUTMALDG", sass)):
        loads[1024] = copies
    longest, loops = instructions(sass)
    kinds = ("HGMMA", "HMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "OMMA")
    return Report(
        registers=numbers["REG"],
        stack=numbers["STACK"],
        shared=compiled.metadata.shared,
        warps=case.warps,
        loads=dict(sorted(loads.items())),
        stores=_widths(sass, "STG"),
        spills=len(re.findall(r"\bSTL\b", sass)),
        matrix=tuple(k for k in kinds if re.search(rf"\b{k}\b", sass)),
        read="EXIT" in sass,
        longest=longest,
        loops=loops,
    )


def unfenced_products(ptx: str) -> int:
    """How many groups of Hopper's matrix instructions read what asynchronous copies wrote without a fence in between.

    Those copies (`cp.async`) write shared memory by one way, and `wgmma` reads it by another; what a wait has made
    visible to the first becomes visible to the second by `fence.proxy.async`. Copies of tiles need none.

    Args:
        ptx: of a kernel.
    """
    found, waited = 0, False
    for line in ptx.splitlines():
        if "cp.async.wait" in line:
            waited = True
        elif "fence.proxy.async" in line:
            waited = False
        elif "wgmma.mma_async" in line and waited:
            found, waited = found + 1, False
    return found

"""What a compiler makes of chosen kernels, one record per version of triton: `python -m tests.kernels.aot.record`.

The command compiles every chosen case with the installed triton, without a GPU, and puts what it finds into record.json
in the place of that version's record; records of other versions stay. Run it after a change of a kernel or of its block
sizes that costs registers for a reason, and in an environment with a version that is to be supported; read the
difference before it is committed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypedDict

from spml_kernels.common.jit import triton
from spml_kernels.devtools.aot import MORE_ARCHITECTURES, Case, Report, compile_case
from spml_kernels.devtools.cases import cases

from benchmarks.kernel_losses import method_cases

RECORD = Path(__file__).parent / "record.json"

# (op, how the shape begins, architectures).
CHOSEN = [
    ("label_loss", "an fp32 1229440", (75, 80, 90, 100, *MORE_ARCHITECTURES)),
    ("label_loss", "an bf16 2673", (90,)),
    ("label_loss backward", "an fp32 1229440", (80, 90, 100)),
    ("large_histogram", "fp32 128 x 5000 pass 2", (80, 90, 100)),
    ("large_counts", "fp32 128 x 5000 pass 2", (80, 90, 100)),
    ("large_threshold", "fp32 128 x 5000 after histogram", (90,)),
    ("large_select", "fp32 128 x 5000 with loss and list", (80, 86, 90, 100, 121)),
    ("large_single", "fp32 128 x 81 with list", (80, 90, 100)),
    ("large_single", "bf16 16 x 20 without list", (90,)),
    ("label_rows", "9605 classes", (90,)),
    ("cam_pool forward", "bf16 C 5000 K 2048 HW 196 B 128", (80, 90, 100, *MORE_ARCHITECTURES)),
    ("cam_pool forward", "bf16 C 20 K 2048", (90,)),
    ("cam_pool forward", "bf16 C 312 K 1280 HW 49", (90,)),
    ("cam_pool forward", "fp32 C 80 K 2048", (86, 90, 120)),
    ("cam_pool persistent", "bf16 C 5000 K 2048 HW 196 B 128", (90, 100)),
    ("cam_pool persistent", "bf16 C 5000 K 512 HW 1024", (90,)),
    ("cam_pool sums", "bf16 C 5000 K 2048 HW 196 B 128", (75, 80, 90)),
    ("cam_pool sums", "fp16 C 80 K 2048", (75,)),
    ("cam_pool expand", "bf16 C 5000 K 2048 HW 196 B 128", (75, 80, 90, 100)),
    ("cam_pool expand", "fp16 C 80 K 2048", (90,)),
    ("cam_pool expand", "fp32 C 80 K 2048", (80, 90)),
    ("cam_pool count", "C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_pool list", "C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_pool lines", "C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_pool sparse dX", "bf16 C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_pool sparse dX", "fp32 C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_pool sparse dW", "bf16 C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_pool sparse dW", "fp32 C 5000 K 2048 HW 196 B 128", (80, 90)),
    ("cam_mask maps", "bf16 K 2048 HW 14x14 N 1", (90,)),
    ("cam_mask maps", "fp32 K 2048 HW 14x14 N 6", (80,)),
    ("cam_mask per_image", "14x14", (90,)),
    ("cam_mask batch", "14x14", (90,)),
    ("cam_mask image", "i16 448x448 map 14x14 N 1 channels_last", (80, 89, 90, 100)),
    ("cam_mask image", "i32 448x448 map 14x14 N 6 contiguous", (90,)),
    ("ignore_statistics", "bf16 128 x 5000", (90,)),
    ("ignore_statistics end", "fp32 128 x 81", (90,)),
    ("ignore_loss", "fp32 128 x 5000 logits", (80, 90, 100)),
    ("ignore_loss backward", "fp32 128 x 5000 epsilon", (90,)),
]
# The point functions of methods are compiled for this one.
METHODS_ARCH = 90


class Fact(TypedDict):
    """What the machine code of a case takes.

    Attributes:
        registers: per thread.
        stack: bytes per thread.
        spills: instructions that write to the stack.
        loads: width in bits -> number of load instructions from global memory.
    """

    registers: int
    stack: int
    spills: int
    loads: dict[str, int]


Record = dict[str, dict[str, Fact]]


class Chosen(NamedTuple):
    """A case to be looked at.

    Attributes:
        case: the kernel at its shape.
        arch: compute capability, times 10.
    """

    case: Case
    arch: int

    @property
    def name(self) -> str:
        """The case's name in a record."""
        return f"sm_{self.arch} {self.case.op}: {self.case.shape}"


def find(op: str, words: str, arch: int) -> Chosen:
    """The first case of `op` whose shape begins with these words; methods' own point functions come first."""
    for case in (*method_cases(arch), *cases(arch)):
        if case.op == op and case.shape.startswith(words):
            return Chosen(case, arch)
    raise LookupError(f"no case of {op} whose shape begins with {words!r}")


def chosen() -> list[Chosen]:
    """The cases in CHOSEN and the point functions of methods, each once."""
    found = [find(op, words, arch) for op, words, archs in CHOSEN for arch in archs]
    found += [Chosen(case, METHODS_ARCH) for case in method_cases(METHODS_ARCH)]
    return list({entry.name: entry for entry in found}.values())


def fact(report: Report) -> Fact:
    """What a record keeps of a report."""
    loads = {str(width): number for width, number in report.loads.items()}
    return {"registers": report.registers, "stack": report.stack, "spills": report.spills, "loads": loads}


def newest(record: Record) -> str:
    """The newest version on record."""
    return max(record, key=lambda version: [int(number) for number in re.findall(r"\d+", version)])


def differences(found: Fact, known: Fact) -> list[str]:
    """What is not as on record, in words."""
    pairs = [(name, found[name], known[name]) for name in ("registers", "stack", "spills", "loads")]  # type: ignore[literal-required]
    return [f"{name} {now}, on record {then}" for name, now, then in pairs if now != then]


def regressions(found: Fact, known: Fact) -> list[str]:
    """What is worse than on record: registers, stack or spills that have grown; in words."""
    words = differences(found, known)
    return [w for w in words if (key := w.split()[0]) != "loads" and found[key] > known[key]]  # type: ignore[literal-required]


def check(name: str, found: Fact, record: Record, version: str) -> str:
    """Compare a case with the record.

    Args:
        name: of the case.
        found: what it takes now.
        record: all versions'.
        version: of the compiler that made it.

    Returns:
        What differs, in words, empty if nothing does.

    Raises:
        AssertionError: this version is on record, and the case is worse than there or missing.
    """
    if version in record:
        assert name in record[version], f"{name} is not on record for triton {version}: run {__doc__.split('`')[1]}"
        worse = regressions(found, record[version][name])
        assert not worse, f"{name}, triton {version}: {'; '.join(worse)}"
        return "; ".join(differences(found, record[version][name]))
    known = newest(record)
    if name not in record[known]:
        return f"not on record for triton {known}"
    words = differences(found, record[known][name])
    return f"other than with triton {known}: {'; '.join(words)}" if words else ""


def read_record() -> Record:
    """All versions' records."""
    record: Record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    return record


def write_record(record: Record) -> None:
    """Write the file, a line per case, so that a change is a line in a diff."""
    versions = []
    for version in sorted(record, key=lambda v: [int(number) for number in re.findall(r"\d+", v)]):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(f)}" for name, f in sorted(record[version].items()))
        versions.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    RECORD.write_text("{\n" + ",\n".join(versions) + "\n}\n", encoding="utf-8")


def _compile(place: int) -> Fact:
    entry = chosen()[place]
    return fact(compile_case(entry.case, entry.arch))


def main() -> None:
    """Record the installed version; names that are no longer chosen leave every version's record."""
    entries, record, version = chosen(), read_record(), triton.__version__
    before = record.get(version, {})
    record[version] = {}
    workers = min(os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for entry, found in zip(entries, pool.map(_compile, range(len(entries))), strict=True):
            record[version][entry.name] = found
            change = "; ".join(differences(found, before[entry.name])) if entry.name in before else "new"
            spilled = "  SPILLS" if found["stack"] or found["spills"] else ""
            print(f"{entry.name}: {found['registers']} registers{spilled}  {change}", flush=True)
    names = {entry.name for entry in entries}
    write_record({v: {name: f for name, f in facts.items() if name in names} for v, facts in record.items()})
    print(f"triton {version}: {len(entries)} cases in {RECORD}")


if __name__ == "__main__":
    main()

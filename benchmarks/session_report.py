"""Tables for docs/performance.md from the results of a GPU session, and what they say about the heuristics.

    python benchmarks/session_report.py DIR [DIR ...] [--out FILE.md]

Prints Markdown: the card, what was reached, correctness, cam_pool against its rivals, its kernels one by one, the other
ops, ways and block sizes, training steps. Rows of other versions or another card than the first are refused. A proposal
is made where another launch than the shipped one is at least `MARGIN` faster, by more than the spread of both.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.gpu_session import TABLE  # noqa: E402
from benchmarks.kernel_report import KEY, KINDS, Row, best_rival, by_place, judge, read_csv  # noqa: E402
from benchmarks.kernel_sweep import SHIPPED  # noqa: E402
from spml_fast.core.errors import UserError, run_command  # noqa: E402

# A launch that is faster by less is not worth a change.
MARGIN = 0.03
FACTS = ("gpu", "torch", "triton", "commit")
# A way of the backward that wins with some signs and loses with others is for those who know theirs.
SPARSER = "heuristics.CAM_POOL_BACKWARD, or SPML_CAM_POOL_BACKWARD, is sparse where signs are as sparse as here"
# What to change for a try, by how its name begins.
CHANGES = {
    r"way (\w+), tile (.*)": "heuristics.{op}_way answers {0}, heuristics.{op}_launch has the tile {1}",
    r"way (\w+), scratch of (.*)": "heuristics.{op}_way answers {0}, heuristics.map_scratch_bytes allows {1}",
    r"way (\w+)": "heuristics.{op}_way answers {0}",
    r"backward sparse, chunks of (\d+) cells": f"{SPARSER}, heuristics.SPARSE_LINES is {{0}} / 32",
    r"backward sparse, tiles of (\d+) channels": f"{SPARSER}, heuristics.cam_pool_sparse_launch gives {{0}} channels",
    r"backward (\w+)": SPARSER,
    r"chunks of (.*)": "heuristics.chunk_bytes gives {0}",
    r"tile (.*)": "heuristics.mask_launch gives {0}",
    r"several programs": "heuristics.SINGLE_LAUNCH_ENTRIES is below this shape",
}


def numbers(row: Row) -> Row:
    """A row of a CSV with what is a number as one."""
    found: Row = {}
    for name, value in row.items():
        try:
            found[name] = float(value) if name not in (*KEY, *FACTS, "item", "kernel", "name") else value
        except ValueError:
            found[name] = {"True": True, "False": False}.get(value, value)
    return {name: value for name, value in found.items() if value != ""}


def read(folders: Iterable[Path], pattern: str) -> list[Row]:
    """Rows of all tables that match, of every folder."""
    return [numbers(row) for folder in folders for path in sorted(folder.glob(pattern)) for row in read_csv(path)]


def table(heads: list[str], rows: Iterable[list[Any]]) -> Iterator[str]:
    """Lines of a Markdown table; the first column is text."""
    yield "| " + " | ".join(heads) + " |"
    yield "|---" + "|--:" * (len(heads) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |"
    yield ""


def microseconds(value: Any) -> str:
    """A time in ms as microseconds."""
    if value is None:
        return ""
    us = 1000 * float(value)
    return f"{us:.0f}" if us >= 100 else f"{us:.3g}"


def facts_of(rows: list[Row]) -> str:
    """Card and versions of all rows in one line.

    Raises:
        UserError: they are of several.
    """
    found = list(dict.fromkeys(tuple(str(row.get(name, "")) for name in FACTS) for row in rows))
    if len(found) > 1:
        raise UserError(
            f"the results are of several machines or versions, {found[0]} and {found[1]}; report on one at a time"
        )
    return ", ".join(f"{name} {value}" for name, value in zip(FACTS, found[0], strict=True))


def rival_rows(rows: list[Row], cam: bool) -> Iterator[list[Any]]:
    """A line for every op, shape and mode: the op, the best of each kind of rival, and what bounds it."""
    for (op, shape, mode), providers in by_place(rows).items():
        fused = providers.get("fused")
        if fused is None or (op == "cam_pool") != cam:
            continue
        line: list[Any] = [f"{op} {shape}, {mode}", microseconds(fused["p50"]), microseconds(fused.get("graph_p50"))]
        line.append(f"{fused['enqueue_us']:.0f}" if "enqueue_us" in fused else "")
        for kind in KINDS:
            for time in ("p50", "graph_p50"):
                rival = best_rival(providers, kind, time)
                line.append(f"{microseconds(rival[1])} ({rival[0]})" if rival else "")
        if cam:
            line += [microseconds(providers[n]["p50"]) if n in providers else "" for n in ("chunked", "matmul")]
            line.append(f"{fused['pair_ratio']:.2f}" if "pair_ratio" in fused else "")
        else:
            line.append(f"{fused['copy']:.0%}")
        yield line


def kernel_rows(rows: list[Row]) -> Iterator[list[Any]]:
    """Kernels of the fused ops, one by one, in the order of their time."""
    for row in rows:
        if row["provider"] == "fused":
            place = f"{row['op']} {row['shape']}, {row['mode']}"
            yield [place, f"`{str(row['name'])[:60]}`", f"{row['launches']:g}", f"{row['us']:.1f}"]


def change_of(op: str, variant: str) -> str:
    """What to change in the heuristics for a try."""
    for pattern, change in CHANGES.items():
        match = re.fullmatch(pattern, variant)
        if match:
            return change.format(*match.groups(), op=op)
    return f"launch it as {variant}"


def proposals(rows: list[Row]) -> list[str]:
    """A sentence for every op, shape and mode of a sweep: what to change, or that nothing is to be changed."""
    sentences = []
    for (op, shape, mode), tries in by_place(rows).items():
        shipped = tries.get(SHIPPED)
        if shipped is None:
            sentences.append(f"{op} {shape} {mode}: the shipped launch was not timed, so nothing can be said")
            continue
        best = min(tries.values(), key=lambda row: float(row["p50"]))
        gain = 1 - best["p50"] / shipped["p50"]
        times = f"{microseconds(best['p50'])} us against {microseconds(shipped['p50'])} as shipped"
        if best is shipped or gain < MARGIN:
            kept = f"as shipped ({microseconds(shipped['p50'])} us)"
            sentences.append(f"{op} {shape} {mode}: {kept}, {len(tries)} tried")
        elif best["p80"] >= shipped["p20"]:
            sentences.append(f"{op} {shape} {mode}: {best['provider']} may be faster ({times}), within the spread")
        else:
            change = change_of(op, best["provider"])
            sentences.append(f"{op} {shape} {mode}: {change} ({times}, {gain:.0%} less)")
    return sentences


def report(folders: list[Path]) -> Iterator[str]:
    """Lines of the whole report.

    Raises:
        UserError: a folder has no session, or the results do not belong together.
    """
    for folder in folders:
        if not (folder / TABLE).is_file():
            raise UserError(f"{folder} has no {TABLE}; give folders that gpu_session.py has written")
    steps, compiled, checks = (read(folders, name) for name in (TABLE, "compile.csv", "checks.csv"))
    kernels, profile = read(folders, "*_kernels.csv"), read(folders, "*_kernels_profile.csv")
    sweep, training = read(folders, "*_sweep.csv"), read(folders, "*_steps.csv")
    yield f"Measured on: {facts_of([*steps, *compiled, *kernels, *profile, *sweep, *training])}."
    others = {(c["gpu"], c["commit"]) for c in checks} - {(s["gpu"], s["commit"]) for s in steps}
    if others:
        raise UserError(f"checks.csv is of {others.pop()}, another machine or commit than the session; leave it out")
    for path in (folder / "ceilings.json" for folder in folders):
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))["workspace_mb"]
            yield f"cuBLAS keeps {kept:.1f} MB of workspace, which no figure of extra memory holds."
    yield ""
    rows = [[s["step"], s["status"], f"{s['seconds']:.0f}", f"{s['planned_s']:.0f}"] for s in steps]
    yield from table(["step", "outcome", "seconds", "planned"], rows)
    correct = [row for row in compiled if row["set"] == "checks"]
    passed = sum(row["status"] == "ok" for row in correct)
    yield f"Against fp64: {passed} of {len(correct)} pieces passed."
    yield from (f"- {row['item']}: {row['status']}" for row in correct if row["status"] != "ok")
    yield from (f"- {row['check']}: {row['outcome']}, {row['note']}" for row in checks)
    yield ""
    rivals = [f"{kind} ({time})" for kind in KINDS for time in ("p50", "graph")]
    heads = ["us", "fused", "as a graph", "host", *rivals]
    yield from table([*heads, "chunked", "bare products", "x product"], rival_rows(kernels, cam=True))
    yield from table([*heads, "of copy"], rival_rows(kernels, cam=False))
    yield from table(["kernels of the fused op", "name", "launches", "us"], kernel_rows(profile))
    yield from judge(kernels)
    yield ""
    if training:
        parts = [name for name in training[0] if name.endswith("_s")]
        lines = (
            [
                f"{row['shape']}, {row['mode']}",
                row["provider"],
                f"{row['images_per_second']:.0f}",
                *(f"{1000 * float(row.get(part, 0)):.1f}" for part in parts),
                f"{row['memory_gib']:.1f}" if "memory_gib" in row else "",
            ]
            for row in training
        )
        heads = [f"{name.removesuffix('_s')} ms" for name in parts]
        yield from table(["training step", "variant", "images/s", *heads, "GiB"], lines)
    yield "Proposals for heuristics:"
    yield ""
    yield from (f"- {sentence}" for sentence in proposals(sweep) or ["no sweep was reached"])
    missing = [r for r in (*kernels, *sweep, *training) if str(r.get("status", "")).startswith("FAILED")]
    if missing:
        yield ""
        yield f"Not reached or failed, {len(missing)} rows:"
        yield ""
        yield from (f"- {' '.join(str(row.get(name, '')) for name in KEY)}: {row['status']}" for row in missing)


def main() -> int:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="results of a session, or of its two parts"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write to this new file instead of printing")
    options = parser.parse_args()
    text = "\n".join(report(options.folders)) + "\n"
    if options.out is None:
        print(text, end="")
        return 0
    if options.out.exists():
        raise UserError(f"--out {options.out} is there already; give another name")
    options.out.write_text(text, encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    run_command(main)

"""Rows of the kernel benchmark: tables in files, goals, and plots."""

from __future__ import annotations

import csv
import itertools
import math
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from spml_kernels.common.jit import HAVE_TRITON, triton

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
# What distinguishes the rows of one table.
KEY = ("op", "shape", "provider", "mode")
# The same of a table of kernels, by their place among those of a call.
KERNEL_KEY = (*KEY, "kernel")


def commit() -> str:
    """Short hash of the checked-out commit, with + when files differ from it."""
    answers = []
    for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain")):
        try:
            done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def machine(gpu: str, known: str | None = None) -> Row:
    """What a row was made with; `known` is the commit where git is not at hand."""
    version = triton.__version__ if HAVE_TRITON else "none"
    return {"gpu": gpu, "torch": torch.__version__, "triton": version, "commit": known or commit()}


def file_name(gpu: str) -> str:
    """A card's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")


def kernel_table(table: Path) -> Path:
    """The table of kernels that belongs to a table of ops."""
    return table.with_name(table.stem + "_profile.csv")


def read_csv(path: Path) -> list[Row]:
    """Rows of a table, all values as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def merge_csv(
    path: Path, rows: list[Row], keep: bool = True, key: tuple[str, ...] = KEY, whole: tuple[str, ...] = ()
) -> None:
    """Write rows into a table, in the place of rows of the same key; the file is replaced whole or not at all.

    Without `keep` the table becomes these rows alone; rows that agree with a new one in `whole` are replaced together.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table: dict[tuple[str, ...], Row] = {}
    if keep:
        given = {_cells(r, whole) for r in rows} if whole else set()
        kept = (r for r in read_csv(path) if tuple(r.get(k, "") for k in whole) not in given)
        table = {tuple(r.get(k, "") for k in key): r for r in kept}
    table |= {_cells(r, key): r for r in rows}
    columns = list(dict.fromkeys(name for row in (*rows, *table.values()) for name in row))
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in row.items()} for row in table.values())
    os.replace(part, path)


def _cells(row: Row, names: tuple[str, ...]) -> tuple[str, ...]:
    """Some values of a row as the file has them, where None is nothing."""
    return tuple("" if row.get(name) is None else str(row[name]) for name in names)


def _short(value: Any) -> Any:
    """Five digits are more than a timing has."""
    return f"{value:.5g}" if isinstance(value, float) and not value.is_integer() else value


Times = dict[tuple[str, str, str], dict[str, Row]]


def by_place(rows: Iterable[Row]) -> Times:
    """(op, shape, mode) -> provider -> row, of rows that have a time."""
    groups: Times = {}
    for row in rows:
        if row.get("status") == "ok":
            groups.setdefault((row["op"], row["shape"], row["mode"]), {})[row["provider"]] = row
    return groups


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


# The shape that the goals of cam_pool are stated for.
GOAL_SHAPE = "bf16 B 128 HW 14x14 K 2048 C 5000 dense"


# Providers whose names begin so are of one kind; the op is held against the best of each.
KINDS = {"torch.compile": "compile", "eager PyTorch": "eager"}
# Geometric means over all shapes that forward and backward are to reach.
MEANS = {"torch.compile": 1.2, "eager PyTorch": 2.0}
# cam_pool's time as a multiple of the bare products.
PRODUCTS = {"fwd": 1.15, "step": 1.30}


def best_rival(providers: dict[str, Row], kind: str, time: str) -> tuple[str, float] | None:
    """The fastest provider of a kind by `p50` or `graph_p50`; one that is a CUDA graph by itself has but `p50`."""
    found = []
    for name, row in providers.items():
        own = row["p50"] if name.endswith("_graphs") else row.get(time)
        if name.startswith(KINDS[kind]) and own:
            found.append((float(own), name))
    return (min(found)[1], min(found)[0]) if found else None


def judge(rows: list[Row]) -> list[str]:
    """Mark every fused row with the goals that it meets or misses (`goal`); returns sentences on all of them.

    Every time is judged: with launch gaps (`p50`) and as a CUDA graph (`graph_p50`).
    """
    sentences = []
    ratios: dict[tuple[str, str], list[float]] = {}
    slower: list[str] = []
    compared = 0
    for (op, shape, mode), providers in by_place(rows).items():
        fused = providers.get("fused")
        if fused is None:
            continue
        verdicts = []
        for time, kind in itertools.product(("p50", "graph_p50"), KINDS):
            rival = best_rival(providers, kind, time)
            if rival is None or not fused.get(time):
                continue
            name, ratio = rival[0], float(fused[time]) / rival[1]
            if kind == "torch.compile":
                compared += 1
                if ratio > 1:
                    graph = " as a CUDA graph" if time == "graph_p50" else ""
                    verdicts.append(f"MISSED: slower than {name}{graph} ({ratio:.2f}x its time)")
                    slower.append(f"{op} {shape} {mode}{graph}: {ratio:.2f}x {name}")
            if mode == ("step" if fused["has_backward"] else "fwd"):
                ratios.setdefault((kind, time), []).append(1 / ratio)
        if op == "cam_pool" and shape == GOAL_SHAPE and mode in PRODUCTS and "matmul" in providers:
            goal = PRODUCTS[mode]
            # In turn if they were timed so: a clock that moves changes the ratio of times that lie apart.
            ratio = float(fused.get("pair_ratio") or fused["p50"] / providers["matmul"]["p50"])
            comparison = f"{ratio:.2f}x the bare product{'' if mode == 'fwd' else 's'}, goal {goal:.2f}x"
            verdicts.append(f"{'met' if ratio <= goal else 'MISSED'}: {comparison}")
            sentences.append(f"cam_pool {mode} at {shape}: {verdicts[-1]}")
        if fused.get("cam_mb") and mode == "step":
            share = fused["extra_mb"] / fused["cam_mb"]
            verdicts.append(f"{'met' if share <= 0.1 else 'MISSED'}: extra memory {share:.3f} of a bf16 map, goal 0.1")
        if op == "cam_mask":
            verdicts.append(f"{'met' if fused['copy'] >= 0.85 else 'MISSED'}: {fused['copy']:.0%} of copy, goal 85%")
        fused["goal"] = "; ".join(verdicts)
    for (kind, time), found in sorted(ratios.items()):
        mean, goal = _mean(found), MEANS[kind]
        word, graph = "met" if mean >= goal else "MISSED", " as CUDA graphs" if time == "graph_p50" else ""
        sentences.append(
            f"forward and backward against the best of {kind}{graph}, geometric mean of {len(found)}: {mean:.2f}x, "
            f"goal {goal}x, {word}"
        )
    if compared:
        sentences.append(f"slower than torch.compile in {len(slower)} of {compared}")
        sentences += [f"  {sentence}" for sentence in slower]
    return sentences


def plot_times(rows: list[Row], path: Path, title: str) -> None:
    """Speed-up over the rivals, and the share of the card's ceiling, of every shape."""
    places = [(place, group) for place, group in by_place(rows).items() if "fused" in group and place[2] != "bwd"]
    names = [f"{op} {shape} {mode}" for (op, shape, mode), _ in places]
    speed: dict[str, list[float]] = {}
    for kind in KINDS:
        best = [(best_rival(g, kind, "p50"), g["fused"]["p50"]) for _, g in places]
        speed[f"best of {kind}"] = [rival[1] / own if rival else float("nan") for rival, own in best]
    for rival in ("chunked", "matmul"):
        speed[rival] = [g[rival]["p50"] / g["fused"]["p50"] if rival in g else float("nan") for _, g in places]
    ceiling = {
        "of copy rate": [g["fused"]["copy"] for _, g in places],
        "of product rate": [g["fused"]["matmul"] or float("nan") for _, g in places],
    }
    _dots(names, [("times faster than", speed, True), ("share of the measured ceiling", ceiling, False)], path, title)


def plot_bytes(rows: list[Row], path: Path, title: str) -> None:
    """Bytes and launches of PyTorch as multiples of the fused op's, and the fused op's as multiples of the floor.

    Of ops with a backward, forward and backward together.
    """
    both = {(r["op"], r["shape"]) for r in rows if r["mode"] == "step"}
    rows = [r for r in rows if r["mode"] == "step" or (r["op"], r["shape"]) not in both]
    names = [f"{r['op']} {r['shape']} {r['mode']}" for r in rows]
    saved = {
        "bytes": [r["eager_bytes"] / r["fused_bytes"] for r in rows],
        "launches": [r["eager_launches"] / r["fused_launches"] for r in rows],
    }
    floor = {"fused": [r["fused_bytes"] / r["floor_bytes"] for r in rows]}
    panels = [("PyTorch over fused", saved, True), ("bytes over the least there can be", floor, True)]
    _dots(names, panels, path, title)


def _dots(names: list[str], panels: list[tuple[str, dict[str, list[float]], bool]], path: Path, title: str) -> None:
    """Panels side by side with a line per name, a mark per series; the vertical line is 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.4 + 0.2 * len(names)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, height), sharey=True, layout="constrained")
    for axis, (label, series, logarithmic) in zip(axes, panels, strict=True):
        for (name, values), mark, color in zip(
            series.items(), "osD^", ("#3b5b92", "#c8553d", "#5b8c5a", "#8c6bb1"), strict=False
        ):
            axis.plot(values, range(len(values)), mark, label=name, color=color, markersize=4.5)
        axis.axvline(1, color="#888888", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=8, frameon=False)
        if not logarithmic:
            axis.set_xlim(0, 1.05)
        # Less than two octaves would leave a logarithmic axis with one number on it.
        elif max((v for values in series.values() for v in values if not math.isnan(v)), default=1.0) > 4:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)

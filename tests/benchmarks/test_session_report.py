"""Tables and proposals of a session's results, from tables that the benchmark itself has written."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import session_report
from benchmarks.kernel_gpu import work_through
from benchmarks.kernel_losses import label_loss_work
from benchmarks.kernel_maps import cam_work
from benchmarks.kernel_report import merge_csv
from benchmarks.kernel_sweep import SHIPPED
from benchmarks.session_report import change_of, proposals, report
from spml_fast.core.errors import UserError
from spml_fast.methods.assume_negative import AssumeNegative
from tests.support.kernel_card import CEILINGS, Cpu

FACTS = {"gpu": "Some Card", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Results as a session leaves them; nothing but the times is made up."""
    monkeypatch.setenv("SPML_KERNELS", "reference")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    works = [cam_work(2, 5, 8, 4, torch.float32), label_loss_work(5, 7, AssumeNegative.point, ())]
    for work in works:
        work.providers = {name: call for name, call in work.providers.items() if "compile" not in name}
    facts = {"ceilings": CEILINGS, "machine": FACTS}
    out = tmp_path / "session"
    out.mkdir()
    work_through(Cpu(), works, 0, tmp_path / "events", out / "some_card_kernels.csv", facts, 60)
    fused = {"fused": works[0].providers["fused"]}
    tries = [dataclasses.replace(works[0], providers=fused, variant=name, only=("fwd",)) for name in (SHIPPED, "way a")]
    work_through(Cpu(), tries, 0, tmp_path / "events", out / "some_card_sweep.csv", facts, 60)
    merge_csv(
        out / "session.csv",
        [{"step": "headline", "status": "ok", "planned_s": 120.0, "seconds": 61.5, **FACTS}],
        key=("step",),
    )
    pieces = [("ops (1)", "ok"), ("ops (2)", "FAILED AssertionError: two runs differ"), ("x | fused", "ok")]
    rows = [{"set": "checks" if n.startswith("ops") else "sweep", "item": n, "status": s, **FACTS} for n, s in pieces]
    merge_csv(out / "compile.csv", rows, key=("set", "item"))
    merge_csv(out / "checks.csv", [{"check": "repeat", "outcome": "passed", "note": "all", **FACTS}], key=("check",))
    (out / "ceilings.json").write_text(json.dumps({"ceilings": CEILINGS, "workspace_mb": 33.5, "machine": FACTS}))
    step = {"op": "step", "shape": "ll_r resnet50 448 px B 32 C 80", "mode": "memory torch", "status": "ok", **FACTS}
    step |= {"images_per_second": 812.3, "forward_s": 0.01, "backward_s": 0.02, "memory_gib": 9.5}
    merge_csv(out / "some_card_steps.csv", [{**step, "provider": "spml_fast"}])
    return out


def test_a_report_has_everything_that_was_measured(folder):
    text = "\n".join(report([folder]))
    assert text.startswith("Measured on: gpu Some Card, torch 2.11.0, triton 3.6.0, commit abc1234.\n")
    assert "| headline | ok | 62 | 120 |" in text or "| headline | ok | 61 | 120 |" in text
    assert "Against fp64: 1 of 2 pieces passed.\n- ops (2): FAILED AssertionError: two runs differ" in text
    assert "- repeat: passed, all" in text
    assert "cuBLAS keeps 33.5 MB of workspace" in text
    # 2 ms by the made-up clock, host 7 us, the best eager form of three, chunked, bare product, times in turn.
    place = "cam_pool fp32 B 2 HW 5x5 K 8 C 4 dense, step"
    cam = next(line for line in text.splitlines() if line.startswith(f"| {place} |"))
    cells = [cell.strip() for cell in cam.split("|")[2:-1]]
    assert cells[:3] == ["2000", "", "7"] and cells[5] == "2000 (eager)" and cells[-3:] == ["2000", "2000", "1.50"]
    assert "| label_loss an 5 x 7, bwd |" in text
    assert f"| {place} | `long` | 1 | 20.0 |" in text
    assert "| ll_r resnet50 448 px B 32 C 80, memory torch | spml_fast | 812 | 10.0 | 20.0 | 9.5 |" in text
    assert "- cam_pool fp32 B 2 HW 5x5 K 8 C 4 dense fwd: as shipped (2000 us), 2 tried" in text
    assert "Not reached" not in text


def test_results_of_two_machines_are_not_mixed(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    row = {"step": "sweep", "status": "ok", "planned_s": 1, "seconds": 1, **FACTS, "gpu": "Another"}
    merge_csv(other / "session.csv", [row], key=("step",))
    with pytest.raises(UserError, match="of several machines or versions"):
        list(report([folder, other]))
    with pytest.raises(UserError, match=r"has no session\.csv; give folders"):
        list(report([tmp_path]))


def test_a_file_that_is_there_is_not_replaced(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["session_report.py", str(folder), "--out", str(out)])
    assert session_report.main() == 0 and out.read_text().startswith("Measured on: gpu Some Card")
    with pytest.raises(UserError, match="is there already; give another name"):
        session_report.main()


def tries(**times: tuple[float, float, float]) -> list[dict]:
    row = {"op": "cam_pool", "shape": "some", "mode": "fwd", "status": "ok"}
    names = {"shipped": SHIPPED, "way": "way vendor", "tile": "way tile, tile (256, 128, 8, 4)"}
    return [{**row, "provider": names[n], "p20": a, "p50": b, "p80": c} for n, (a, b, c) in times.items()]


def test_a_proposal_needs_a_gain_beyond_the_spread():
    shipped = (1.9, 2.0, 2.1)
    (kept,) = proposals(tries(shipped=shipped, way=(1.9, 1.97, 2.0)))
    assert "as shipped" in kept and "2 tried" in kept
    (close,) = proposals(tries(shipped=shipped, way=(1.7, 1.85, 1.95)))
    assert "way vendor may be faster" in close and "within the spread" in close
    (clear,) = proposals(tries(shipped=shipped, way=(1.7, 1.85, 1.89), tile=(1.4, 1.5, 1.6)))
    assert "heuristics.cam_pool_way answers tile, heuristics.cam_pool_launch has the tile (256, 128, 8, 4)" in clear
    assert "25% less" in clear
    (nothing,) = proposals(tries(way=shipped))
    assert "nothing can be said" in nothing


def test_every_try_of_the_sweep_says_what_to_change():
    from benchmarks.kernel_works import SWEEPS, works

    for work in works(list(SWEEPS)):
        change = change_of(work.op, work.variant)
        assert work.variant == SHIPPED or change.startswith("heuristics."), work.variant


def test_rows_that_failed_are_listed(folder):
    path = folder / "some_card_sweep.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    merge_csv(path, [{**rows[0], "provider": "way b", "status": "FAILED no time left", "p50": ""}])
    text = "\n".join(report([folder]))
    assert "Not reached or failed, 1 rows:" in text
    assert "way b" in text.split("Not reached")[1]

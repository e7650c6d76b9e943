"""The kernel benchmark's machinery, which a GPU would meet: gates, failures, workers that die, goals, tables."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from spml_kernels.common.jit import HAVE_TRITON, INTERPRETED

from benchmarks import bench_kernels, kernel_gpu
from benchmarks.bench_kernels import facts_of_card
from benchmarks.kernel_base import KernelWork, make_call
from benchmarks.kernel_card import Card
from benchmarks.kernel_gate import gate
from benchmarks.kernel_gpu import bench_work, run, work_through
from benchmarks.kernel_losses import label_loss_work, large_loss_work
from benchmarks.kernel_maps import cam_work
from benchmarks.kernel_report import GOAL_SHAPE, judge, machine, merge_csv, plot_times, read_csv
from spml_fast.methods.assume_negative import AssumeNegative
from tests.support.kernel_card import CEILINGS, Cpu


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv("SPML_KERNELS", "reference")
    # Workers set it for themselves, which must not outlast a test.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))


def small_works() -> list[KernelWork]:
    """Without torch.compile, which would take minutes."""
    found = [
        label_loss_work(5, 7, AssumeNegative.point, ()),
        large_loss_work(5, 7, 3),
        cam_work(2, 5, 8, 4, torch.float32),
    ]
    for work in found:
        work.providers = {name: call for name, call in work.providers.items() if "compile" not in name}
    return found


def rows_of(work: KernelWork, card: Card | None = None, late: bool = False) -> dict[tuple[str, str], dict]:
    """The last row of every provider and mode; kernels' rows have their own key."""
    found = list(bench_work(card or Cpu(), work, CEILINGS, lambda: late))
    return {(row["provider"], row["mode"], *([row["kernel"]] if "kernel" in row else [])): row for row in found}


@pytest.mark.parametrize("work", small_works(), ids=lambda w: w.op)
def test_every_provider_and_mode_has_a_row(work):
    rows = rows_of(work)
    assert rows["fused", "gate"]["status"] == "passed" and rows["fused", "gate"]["error"] < 1e-5
    timed = {(p, m) for p in work.providers for m in ("fwd", "bwd", "step")}
    kernels = {(p, m, place) for p, m in timed if m != "bwd" for place in (0, 1)}
    assert set(rows) == {("fused", "gate")} | timed | kernels
    for key in timed:
        row, mode = rows[key], key[1]
        assert row["status"] == "ok" and row["p50"] == 2.0 and row["bytes"] > 0 and row["enqueue_us"] == 7.0
        assert row["gb_s"] == pytest.approx(row["bytes"] / 2e6) and row["copy"] == row["gb_s"] / 1000
        assert ("no CUDA graph" in row.get("note", "")) == (mode != "bwd")
        assert (row["tflop_s"] > 0) == (work.op == "cam_pool")
        assert ("pair_ratio" in row) == (work.op == "cam_pool" and key[0] == "fused")
    for key in kernels:
        assert rows[key]["name"] == ("long", "short")[key[2]] and rows[key]["us"] == (20, 3)[key[2]]
    step = rows["fused", "step"]
    assert step["bytes"] == rows["fused", "fwd"]["bytes"] + rows["fused", "bwd"]["bytes"] == work.floor["step"]


def test_a_wrong_kernel_is_not_timed_and_the_others_are():
    work = small_works()[0]
    right = work.providers["fused"]
    work.providers["fused"] = lambda *t: (right(*t)[0] * 1.01,)
    with pytest.raises(AssertionError, match=r"result 0 is off by 0\.01"):
        gate(work, work.inputs("cpu"))
    rows = rows_of(work)
    assert rows["fused", "gate"]["status"].startswith("FAILED AssertionError: result 0")
    assert {key[0] for key in rows if key[1] == "step"} == {"eager"} and rows["eager", "step"]["status"] == "ok"


def test_a_failing_provider_costs_its_own_rows():
    work = small_works()[0]

    def broken(*inputs):
        raise torch.OutOfMemoryError("too large\nand more")

    work.providers["compile"] = broken
    rows = rows_of(work)
    assert rows["compile", "bwd"]["status"] == "FAILED OutOfMemoryError: too large"
    assert rows["fused", "step"]["status"] == "ok"


def test_time_that_runs_out_is_said():
    rows = rows_of(small_works()[0], late=True)
    assert rows["fused", "step"]["status"] == rows["eager", "fwd"]["status"] == "FAILED no time left"


def test_a_broken_card_ends_the_worker_after_its_row(tmp_path):
    work, card = small_works()[0], Cpu()
    right = work.providers["fused"]

    def breaking(*inputs):
        card.broken = card.broken or len(events.read_text().splitlines()) > 4
        if card.broken:
            card.synchronize()
        return right(*inputs)

    work.providers["fused"] = breaking
    events = tmp_path / "events"
    facts = {"ceilings": CEILINGS, "machine": {"gpu": "none"}}
    with pytest.raises(RuntimeError, match="illegal memory"):
        work_through(card, [work], 0, events, tmp_path / "table.csv", facts, 60)
    seen = [json.loads(line) for line in events.read_text().splitlines()]
    assert seen[0] == {"begun": 0} and not any("done" in e for e in seen)
    assert seen[-1]["row"]["status"].startswith("FAILED RuntimeError: CUDA error")


# What stands in for a worker: dies at work 1 without a word, measures the others.
WORKER = """
import json, sys
task = json.loads(sys.argv[-1])
with open(task["events"], "a") as file:
    for place in range(task["first"], task["number"]):
        file.write(json.dumps({"begun": place}) + "\\n")
        file.flush()
        if place == 1:
            file.write('{"row": {"op": "hal')
            file.flush()
            sys.exit(9)
        row = {"op": task["ops"][0], "shape": str(place), "provider": "fused", "mode": "fwd"}
        row |= {"status": "ok", "p50": 1.0}
        file.write(json.dumps({"row": row}) + "\\n" + json.dumps({"done": place}) + "\\n")
"""


def test_a_worker_that_dies_is_recorded_and_followed_by_another(tmp_path, monkeypatch):
    found = small_works()
    monkeypatch.setattr(kernel_gpu, "works", lambda ops, small, shapes: found)
    table = tmp_path / "table.csv"
    facts = {"machine": {"gpu": "none"}, "number": len(found)}
    rows = run(["some"], True, table, facts, 60, [sys.executable, "-c", WORKER])
    assert [(r["shape"], r["status"]) for r in rows] == [
        ("0", "ok"),
        (found[1].shape, "FAILED worker ended with status 9"),
        ("2", "ok"),
    ]
    assert "worker ended with status 9" in table.read_text()
    late = run(["some"], True, table, facts, 0, [sys.executable, "-c", WORKER])
    assert [(r["status"], r["gpu"]) for r in late] == [("FAILED no time left", "none")] * 3


# What stands in for the worker that measures a card.
CEILINGS_WORKER = """
import json, sys
task = json.loads(sys.argv[-1])
facts = {"ceilings": {"copy": 1.0}, "machine": {"gpu": "new"}}
open(task["events"], "w").write(json.dumps(facts))
"""


def test_rates_are_measured_again_for_another_card_or_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some Card")
    command, file = [sys.executable, "-c", CEILINGS_WORKER], tmp_path / "ceilings.json"
    assert facts_of_card(command, "abc", file)["machine"] == {"gpu": "new"}
    kept = {"ceilings": {"copy": 2.0}, "machine": machine("Some Card", "abc")}
    file.write_text(json.dumps(kept))
    assert facts_of_card(command, "abc", file) == kept
    assert facts_of_card(command, "other", file)["ceilings"] == {"copy": 1.0}
    assert facts_of_card([sys.executable, "-c", "raise SystemExit(1)"], "abc", None) is None


def test_shapes_that_do_not_exist_are_said(monkeypatch, capsys):
    if not HAVE_TRITON or INTERPRETED:
        pytest.skip("needs triton, not interpreting")
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--ops", "cam_pool", "--shapes", "C 4999", "K 7 "])
    assert bench_kernels.main() == 2
    assert capsys.readouterr().err == "no shape of cam_pool contains C 4999 or K 7 \n"


def test_an_op_that_cannot_be_made_costs_its_own_rows(tmp_path, monkeypatch):
    def works(ops, small, shapes):
        if ops == ["bad"]:
            raise ImportError("no timm")
        return small_works()

    monkeypatch.setattr(kernel_gpu, "works", works)
    facts = {"machine": {"gpu": "none"}, "number": 3}
    rows = run(["bad", "some"], True, tmp_path / "t.csv", facts, 60, [sys.executable, "-c", WORKER])
    assert (rows[0]["op"], rows[0]["status"]) == ("bad", "FAILED ImportError: no timm")
    assert [(r["op"], r["status"]) for r in rows[1:] if r["status"] == "ok"] == [("some", "ok")] * 2


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    found = small_works()[:1]
    monkeypatch.setattr(kernel_gpu, "works", lambda ops, small, shapes: found)
    monkeypatch.setattr(kernel_gpu, "PATIENCE", 0.5)
    start = time.monotonic()
    rows = run(
        ["some"], True, tmp_path / "t.csv", {"machine": {}}, 0.5, [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert [r["status"] for r in rows] == ["FAILED worker took too long"] and time.monotonic() - start < 30


def row(provider: str, mode: str, p50: float, **more) -> dict:
    facts = {"op": "cam_pool", "shape": GOAL_SHAPE, "status": "ok", "has_backward": True, "extra_mb": 20.0}
    return {
        **facts,
        "cam_mb": 250.0,
        "copy": 0.5,
        "matmul": 0.4,
        "provider": provider,
        "mode": mode,
        "p50": p50,
        **more,
    }


def test_goals_are_judged_in_the_rows(tmp_path):
    """Against the best rival of each kind, with launch gaps and as CUDA graphs."""
    times = {("fused", "fwd"): 1.1, ("matmul", "fwd"): 1.0, ("compile", "fwd"): 1.3, ("compile_pooled", "fwd"): 1.0}
    times |= {("fused", "step"): 4.2, ("matmul", "step"): 3.0, ("compile", "step"): 8.4, ("eager", "step"): 8.4}
    rows = [row(*place, p50) for place, p50 in times.items()]
    sentences = judge(rows)
    fwd, step = rows[0]["goal"], rows[4]["goal"]
    assert "met: 1.10x the bare product, goal 1.15x" in fwd
    assert "MISSED: slower than compile_pooled (1.10x its time)" in fwd and "compile_pooled" not in step
    assert "MISSED: 1.40x the bare products, goal 1.30x" in step and "met: extra memory 0.080" in step
    mean = "forward and backward against the best of {}, geometric mean of 1: 2.00x, goal {}x, met"
    assert {mean.format("torch.compile", 1.2), mean.format("eager PyTorch", 2.0)} < set(sentences)
    assert "slower than torch.compile in 1 of 2" in sentences
    plot_times(rows, tmp_path / "plot.png", "made up")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_graphs_and_times_in_turn_are_judged_too():
    rows = [
        row("fused", "step", 1.0, graph_p50=0.5, pair_ratio=1.25),
        row("compile", "step", 2.0, graph_p50=0.45),
        # It is a graph by itself, and so what the op as a graph is held against.
        row("compile_graphs", "step", 0.4),
        row("matmul", "step", 0.1),
    ]
    sentences = judge(rows)
    goal = rows[0]["goal"]
    assert "slower than compile_graphs (2.50x its time)" in goal and "as a CUDA graph (1.25x its time)" in goal
    assert "met: 1.25x the bare products" in goal
    assert "slower than torch.compile in 2 of 2" in sentences
    assert any("as CUDA graphs, geometric mean of 1: 0.80x" in s for s in sentences)


def test_tables_keep_other_rows_and_take_new_columns(tmp_path):
    path = tmp_path / "results" / "t.csv"
    merge_csv(path, [row("fused", "fwd", 1.0), row("eager", "fwd", 2.0)])
    merge_csv(path, [row("fused", "fwd", 3.123456789, note="later")])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["provider"], r["p50"], r["note"]) for r in rows] == [("fused", "3.1235", "later"), ("eager", "2.0", "")]
    # A value that is missing is the empty one of the file.
    for gpu in (None, None, "H100"):
        merge_csv(tmp_path / "machines.csv", [{"part": "step", "gpu": gpu}], key=("part", "gpu"))
    assert [r["gpu"] for r in read_csv(tmp_path / "machines.csv")] == ["", "H100"]
    merge_csv(path, [row("eager", "bwd", 1.0)], keep=False)
    assert len(path.read_text().splitlines()) == 2 and [p.name for p in path.parent.iterdir()] == ["t.csv"]


@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="needs triton, not interpreting")
def test_rows_without_a_gpu(monkeypatch):
    from benchmarks.kernel_bytes import Compiler, traffic_row

    work = cam_work(128, 14, 2048, 5000, torch.bfloat16)
    row = traffic_row(work, "fwd", None)
    assert row["provider"] == "fused" and row["kernel_launches"] == 2
    assert row["floor_bytes"] <= row["fused_bytes"] < row["eager_bytes"] / 5
    # 2 x 128 x 196 x 5000 x 2048 operations at 989 TFLOP/s; an A100 is bound by them too.
    assert row["H100_us"] == pytest.approx(2 * 128 * 196 * 5000 * 2048 / 989e6)
    loss = traffic_row(label_loss_work(16, 80, AssumeNegative.point, ()), "step", Compiler(90))
    assert loss["H200_us"] == pytest.approx(loss["fused_bytes"] / 4800e3)
    assert 0 < loss["registers"] < 255 and loss["spills"] == 0 and 0 < loss["occupancy"] <= 1


@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="needs triton, not interpreting")
def test_bytes_of_all_ops_at_few_shapes(capsys):
    """Every op has its rows; cam_pool's once, whatever its signs are."""
    from benchmarks.kernel_bytes import bytes_table
    from benchmarks.kernel_works import OPS, works

    rows = bytes_table(list(OPS), True, None)
    assert {row["op"] for row in rows} == set(OPS)
    shapes = [(row["op"], row["shape"], row["mode"]) for row in rows]
    assert len(set(shapes)) == len(shapes) == capsys.readouterr().out.count("\n") - 2
    signs = {work.shape.split()[-1] for work in works(["cam_pool"], True)}
    assert signs == {"dense", "sparse", "zipf"}
    assert all(row["shape"].endswith("dense") for row in rows if row["op"] == "cam_pool")


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="needs triton, not interpreting")
def test_kernels_between_the_products_of_cam_pool_do_not_spill():
    from benchmarks.kernel_bytes import Compiler, launches_of

    compiler = Compiler(90)
    seen = launches_of(cam_work(128, 14, 2048, 5000, torch.bfloat16), "fused", "step")
    few = launches_of(cam_work(128, 14, 2048, 80, torch.bfloat16), "fused", "step")
    between = [s for s in seen + few if s.kernel is not None and s.name != "_cam_pool_fwd_kernel"]
    for launch in between:
        report = compiler.report(launch)
        assert report.spills == report.stack == 0 and report.registers <= 128, (launch.name, report)
    # One launch a chunk of cells, which is not compiled again for the next.
    assert [s.name for s in seen if s.kernel is not None].count("_cam_pool_expand_kernel") > 10
    assert [s.name for s in few if s.kernel is not None].count("_cam_pool_expand_kernel") == 1
    assert {s.name for s in between} == {f"_cam_pool_{n}_kernel" for n in ("finish", "expand")}
    assert len(compiler.reports) <= 5


def test_matmul_is_the_bare_product():
    work = cam_work(2, 5, 8, 4, torch.float32)
    inputs = work.inputs("cpu")
    features, weight = inputs[0].flatten(0, 2), inputs[1]
    torch.testing.assert_close(make_call(work, "matmul", "fwd", inputs)(), features @ weight.T)
    assert [t.shape for t in make_call(work, "matmul", "bwd", inputs)()] == [features.shape, weight.shape]

"""The comparison with timm: both sides say the same before they are timed, and every row has its goal."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_vs_timm, own_training
from benchmarks.bench_vs_timm import metric_calls, parse, peak_beside, row_of, same_losses, time_to
from benchmarks.timm_rival import LOSSES, TimmTraining
from spml_fast.core.errors import UserError
from spml_fast.data.manifest import Manifest
from tests.support.paths import ROOT
from tests.support.runs import Run


@pytest.mark.parametrize("name", LOSSES)
def test_both_have_the_same_loss(name: str) -> None:
    assert same_losses(name) < 1e-5


def test_another_loss_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, method, own = LOSSES["asl"]
    monkeypatch.setitem(LOSSES, "asl", (theirs | {"asl_gamma_neg": 3.0}, method, own))
    with pytest.raises(UserError, match="the losses asl of both differ by"):
        same_losses("asl")


@pytest.mark.parametrize(("case", "size"), [("coco", (300, 7, 2.0)), ("openimages", (200, 9, 400))])
def test_both_have_the_same_average_precision(case: str, size: tuple[int, int, float]) -> None:
    found = []
    for side in bench_vs_timm.SIDES:
        call, ap_of = metric_calls(side, case, size)
        found.append(np.array(ap_of(call())))
    assert len(found[0]) == size[1] and found[0].max() > 10
    assert np.abs(found[0] - found[1]).max() < 1e-7


def _measure_memory() -> tuple[float, int, int]:
    kept = np.ones(1 << 22)
    return *peak_beside(lambda: float((kept * 2).sum())), kept.nbytes


def test_memory_beside_what_there_was() -> None:
    # This process may have memory that it keeps for the next array.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        total, extra, size = pool.apply(_measure_memory)
    # The system counts pages a few at a time.
    assert total == 2 * (1 << 22) and 0.9 * size < extra < 1.5 * size


def test_rows() -> None:
    epochs = [{"train_s": 3.0, "eval_s": 1.0, "map": m} for m in (50.0, 90.0, 95.0)]
    assert time_to(epochs, 90.0) == 8.0 and time_to(epochs, 96.0) is None
    faster = row_of("step", "", "images/s", {"spml_fast": 130.0, "timm": 100.0}, 1.2, larger=True)
    assert faster["ratio"] == 1.3 and faster["reached"] is True
    slower = row_of("metric", "", "evaluation s", {"spml_fast": 1.0, "timm": 4.0}, 5.0)
    assert slower["ratio"] == 4.0 and slower["reached"] is False
    assert row_of("step", "", "s to mAP 90", {"spml_fast": 1.0, "timm": None}, None)["ratio"] is None


def test_words_of_a_worker_say_the_same() -> None:
    options = parse(["--quick", "--backbone", "resnet18", "--lr", "0.1", "--epochs", "4"])
    again = parse(options.words)
    for name in ("quick", "backbone", "lr", "epochs", "image_size", "loss", "precision", "threads", "seed"):
        assert getattr(again, name) == getattr(options, name)


def test_both_update_as_fast_as_they_can(small_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one kernel."""
    made: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(own_training, "Engine", lambda module, optimizer, *_: made.append(optimizer))
    manifest, cpu = Manifest(small_digits), torch.device("cpu")
    splits = [manifest.split(name) for name in ("train", "test")]
    options = parse(["--threads", "1"])
    made.append(TimmTraining(splits, manifest.num_classes, options, cpu).optimizer)
    own_training.OwnTraining(splits, manifest.classes, options, cpu, small_digits)
    assert [bool(one.param_groups[0]["fused"]) for one in made] == [True, True]


@pytest.mark.slow
def test_whole_comparison(run_script: Run, small_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--data.dir", small_digits, "--quick", "--parts", "step", "--image-size", 32, "--batch-size", 8]
    words += ["--eval-batch-size", 16, "--threads", 1, "--epochs", 1, "--target", 1, "--results", tmp_path]
    done = run_script(ROOT / "benchmarks" / "bench_vs_timm.py", *map(str, words), "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["figure"] for row in rows] == [
        "images/s",
        "s to mAP 1",
        "evaluation with forward s",
        "memory bytes",
        "mAP after 1 epochs",
    ]
    for row in rows:
        assert row["spml_fast"] > 0 and row["timm"] > 0 and row["ratio"] > 0, row
        assert (row["goal"] is None) == (row["reached"] is None)
    with (tmp_path / "vs_timm.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["figure"] for row in written] == [row["figure"] for row in rows]
    for side in ("spml_fast", "timm"):
        assert [float(row[side]) for row in written] == pytest.approx([row[side] for row in rows], rel=1e-4)
    assert all(row["torch"] == torch.__version__ and row["cpu"] and row["date"] for row in written)
